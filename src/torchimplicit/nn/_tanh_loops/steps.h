// The equation, its adjoint, and blocks of plain steps of either.
//
// Each kind has walk(block), a block of steps; z() and value(), where it ends and the map's value there; go_on(row, …),
// which prepares a row for the next block; and keep(rows).

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "rows.h"

namespace torchimplicit {

constexpr double kLongest = -50.0, kShortest = 0.5;  // bounds of an extrapolation, as in _picard.py

// How a row stands at a look.
struct Judged {
  double norm, before;  // of the residual, now and at the last look
  bool first;           // whether there was no look before
};

// z ← tanh(W z + x).
template <class T>
struct Cell {
  Tensor transposed;  // Wᵀ
  Rows<T> x;

  void operator()(const Rows<T>& from, Rows<T>& to) {
    at::mm_out(to.tensor(), from.tensor(), transposed);
    tanh_of_sum(to, to, x);
  }
  void keep(const std::vector<int64_t>& kept) { x.keep(kept); }
};

// u ← v + Wᵀ D u.
template <class T>
struct Pullback {
  Tensor weight;
  Rows<T> slope, v, scaled;

  Pullback(Tensor weight, const Rows<T>& slope, const Rows<T>& v)
      : weight(std::move(weight)), slope(slope), v(v), scaled(v.tensor(), v.tensor().size(0)) {}
  void operator()(const Rows<T>& from, Rows<T>& to) {
    const T *d = std::as_const(slope).at(0), *u = from.at(0), *vs = std::as_const(v).at(0);
    each(scaled, [=](int64_t i) { return d[i] * u[i]; });
    at::mm_out(to.tensor(), scaled.tensor(), weight);
    T* t = to.at(0);
    each(to, [=](int64_t i) { return t[i] + vs[i]; });
  }
  void keep(const std::vector<int64_t>& kept) {
    for (Rows<T>* rows : {&slope, &v, &scaled}) rows->keep(kept);
  }
};

// z ← map(z), and after each block, if wanted, one along the last step (see Picard(extrapolate_every=…)).
template <class T, class Map>
class PlainSteps {
 public:
  PlainSteps(Map map, const Rows<T>& value, bool extrapolate)
      : map_(std::move(map)), extrapolate_(extrapolate), off_(value.tensor().size(0), 0) {
    const int64_t rows = off_.size(), bytes = value.numel() * sizeof(T);
    for (Rows<T>* made : {&before_, &z_, &value_}) *made = Rows<T>(value.tensor(), rows);
    std::memcpy(before_.at(0), value.at(0), bytes);
    if (extrapolate_) {
      plain_ = Rows<T>(value.tensor(), rows);
      std::memcpy(plain_.at(0), value.at(0), bytes);
    }
  }
  const Rows<T>& z() const { return z_; }
  const Rows<T>& value() const { return value_; }

  void walk(int64_t block) {
    std::swap(z_, before_);
    map_(z_, value_);
    for (int64_t step = 1; step < block; ++step) {
      std::swap(before_, z_);
      std::swap(z_, value_);
      map_(z_, value_);
    }
  }

  // The block begins at the value, or further along, or back where that was of no use.
  void go_on(int64_t row, const Judged& judged) {
    const int64_t n = z_.tensor().size(1);
    T* next = before_.at(row);
    const T *z = std::as_const(z_).at(row), *value = std::as_const(value_).at(row), *before = next;
    if (!extrapolate_) {
      std::memcpy(next, value, n * sizeof(T));
      return;
    }
    T* plain = plain_.at(row);
    const bool worse = !judged.first && !off_[row] && !(judged.norm <= judged.before);
    if (worse) off_[row] = 1;
    if (worse) {
      std::memcpy(next, plain, n * sizeof(T));
    } else if (off_[row]) {
      std::memcpy(next, value, n * sizeof(T));
    } else {
      const auto residual = [=](int64_t i) { return double(value[i]) - double(z[i]); };
      const auto change = [=](int64_t i) { return residual(i) - (double(z[i]) - double(before[i])); };
      const double square = sum(n, [=](int64_t i) { return change(i) * change(i); });
      const double across = sum(n, [=](int64_t i) { return change(i) * residual(i); });
      const double tiny = std::numeric_limits<T>::min();
      const T length = std::clamp(across / std::max(square, tiny), kLongest, kShortest);
      for (int64_t i = 0; i < n; ++i) next[i] = value[i] - length * (value[i] - z[i]);
    }
    std::memcpy(plain, value, n * sizeof(T));
  }

  void keep(const std::vector<int64_t>& kept) {
    for (Rows<T>* rows : {&before_, &z_, &value_, &plain_}) rows->keep(kept);
    map_.keep(kept);
    for (size_t j = 0; j < kept.size(); ++j) off_[j] = off_[kept[j]];
  }

 private:
  Map map_;
  bool extrapolate_;
  std::vector<char> off_;  // rows that are extrapolated no more, since their residual has grown after it
  Rows<T> before_, z_, value_, plain_;  // plain_: where the block would have begun without an extrapolation
};

}  // namespace torchimplicit
