// Rows of a batch that samples leave, and sums over a row: squares are added up in double precision.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/tanh.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "tanh.h"

namespace torchimplicit {

using at::Tensor;

constexpr int64_t kMany = 1 << 16;  // numbers from which threads are of use

// Σ term(i) for i < n, in several sums side by side.
template <class Term>
inline double sum(int64_t n, Term term) {
  constexpr int64_t kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  double total = 0.0;
  for (; i < n; ++i) total += term(i);
  for (double lane : lanes) total += lane;
  return total;
}

template <class T>
double two(const T* a, int64_t n) {
  return std::sqrt(sum(n, [=](int64_t i) { return double(a[i]) * double(a[i]); }));
}

template <class T>
double distance(const T* a, const T* b, int64_t n) {
  return std::sqrt(sum(n, [=](int64_t i) {
    const double d = double(a[i]) - double(b[i]);
    return d * d;
  }));
}

// The rows of a (B, n) array that are still in the batch.
template <class T>
class Rows {
 public:
  Rows() = default;
  // A given array, which is not written to; rows leave a copy.
  explicit Rows(Tensor given) : whole_(std::move(given)), now_(whole_), own_(false) {}
  // A new one, of no definite content.
  Rows(const Tensor& like, int64_t rows)
      : whole_(at::empty({rows, like.size(1)}, like.options())), now_(whole_), own_(true) {}

  const Tensor& tensor() const { return now_; }
  Tensor& tensor() { return now_; }
  const T* at(int64_t row) const { return now_.template const_data_ptr<T>() + row * now_.size(1); }
  T* at(int64_t row) { return now_.template mutable_data_ptr<T>() + row * now_.size(1); }
  int64_t numel() const { return now_.numel(); }

  // Only these rows, in this order, which is ascending.
  void keep(const std::vector<int64_t>& kept) {
    if (!now_.defined() || int64_t(kept.size()) == now_.size(0)) return;
    const int64_t n = now_.size(1), rows = kept.size();
    if (!own_) {
      Rows copy(now_, rows);
      for (int64_t j = 0; j < rows; ++j) std::memcpy(copy.at(j), std::as_const(*this).at(kept[j]), n * sizeof(T));
      *this = std::move(copy);
      return;
    }
    for (int64_t j = 0; j < rows; ++j)
      if (kept[j] != j) std::memcpy(at(j), std::as_const(*this).at(kept[j]), n * sizeof(T));
    now_ = whole_.narrow(0, 0, rows);
  }

 private:
  Tensor whole_, now_;
  bool own_ = false;
};

// out ← op(i) for each number of an array.
template <class T, class Op>
inline void each(Rows<T>& out, Op op) {
  T* o = out.at(0);
  const int64_t n = out.numel();
  for (int64_t i = 0; i < n; ++i) o[i] = op(i);
}

// out ← tanh(b + x); out may be b.
template <class T>
void tanh_of_sum(Rows<T>& out, const Rows<T>& b, const Rows<T>& x) {
  if (!std::is_same_v<T, float> || (out.numel() >= kMany && at::get_num_threads() > 1)) {
    at::add_out(out.tensor(), b.tensor(), x.tensor());
    out.tensor().tanh_();
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    const float *bs = b.at(0), *xs = x.at(0);
    each(out, [=](int64_t i) { return tanh_of(bs[i] + xs[i]); });
  }
}

}  // namespace torchimplicit
