// Steps by one matrix for all samples: those of ShiftedTanh and of its Jacobian (see _shifted_tanh.py).

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <cstring>
#include <utility>
#include <vector>

#include "steps.h"

namespace torchimplicit {

// Those of ShiftedTanh (which see): b ← P (tanh(b + x) − c b), where b = W z.
template <class T>
class ShiftedSteps {
 public:
  ShiftedSteps(Tensor transposed, Tensor product, double shift, Rows<T> x, Tensor image)
      : transposed_(std::move(transposed)), product_(std::move(product)), shift_(shift), x_(std::move(x)) {
    const int64_t rows = image.size(0);
    for (Rows<T>* made : {&b_, &z_, &value_}) *made = Rows<T>(image, rows);
    std::memcpy(b_.at(0), Rows<T>(image).at(0), image.numel() * sizeof(T));
  }
  const Rows<T>& z() const { return z_; }
  const Rows<T>& value() const { return value_; }

  // So many products with P, and one with W, which says whether the equation holds.
  void walk(int64_t block) {
    const T c = shift_;
    for (int64_t step = 0; step < block; ++step) {
      tanh_of_sum(z_, b_, x_);
      T* z = z_.at(0);
      const T* b = std::as_const(b_).at(0);
      each(z_, [=](int64_t i) { return z[i] - c * b[i]; });
      at::mm_out(b_.tensor(), z_.tensor(), product_);
    }
    T* z = z_.at(0);
    const T* b = std::as_const(b_).at(0);
    each(z_, [=](int64_t i) { return z[i] + c * b[i]; });
    at::mm_out(b_.tensor(), z_.tensor(), transposed_);
    tanh_of_sum(value_, b_, x_);
  }
  void go_on(int64_t, const Judged&) {}
  void keep(const std::vector<int64_t>& kept) {
    for (Rows<T>* rows : {&x_, &b_, &z_, &value_}) rows->keep(kept);
  }

 private:
  Tensor transposed_, product_;
  double shift_;
  Rows<T> x_, b_, z_, value_;
};

// u = v + Wᵀ D u by corrections from the residual: those of ShiftedTanhJacobian.approach.
template <class T>
class ShiftedAdjointSteps {
 public:
  ShiftedAdjointSteps(Pullback<T> map, Tensor product, double shift, const Rows<T>& start, const Rows<T>& value)
      : map_(std::move(map)), product_(std::move(product)), shift_(shift) {
    const int64_t rows = start.tensor().size(0);
    for (Rows<T>* made : {&u_, &value_, &residual_, &first_, &y_, &q_}) *made = Rows<T>(start.tensor(), rows);
    std::memcpy(u_.at(0), start.at(0), start.numel() * sizeof(T));
    std::memcpy(value_.at(0), value.at(0), value.numel() * sizeof(T));
  }
  const Rows<T>& z() const { return u_; }
  const Rows<T>& value() const { return value_; }

  void walk(int64_t block) {
    const T c = shift_;
    T *u = u_.at(0), *r = residual_.at(0), *first = first_.at(0), *y = y_.at(0), *q = q_.at(0);
    const T *value = std::as_const(value_).at(0), *slope = std::as_const(map_.slope).at(0);
    each(residual_, [=](int64_t i) { return value[i] - u[i]; });
    at::mm_out(q_.tensor(), residual_.tensor(), product_);
    each(q_, [=](int64_t i) { return r[i] + c * q[i]; });
    each(first_, [=](int64_t i) { return (slope[i] - c) * q[i]; });
    std::memcpy(y, first, first_.numel() * sizeof(T));
    for (int64_t step = 0; step < block - 2; ++step) {
      at::mm_out(residual_.tensor(), y_.tensor(), product_);
      each(y_, [=](int64_t i) { return first[i] + (slope[i] - c) * r[i]; });
    }
    at::mm_out(residual_.tensor(), y_.tensor(), product_);
    each(u_, [=](int64_t i) { return u[i] + (q[i] + r[i]); });
    map_(u_, value_);
  }
  void go_on(int64_t, const Judged&) {}
  void keep(const std::vector<int64_t>& kept) {
    for (Rows<T>* rows : {&u_, &value_, &residual_, &first_, &y_, &q_}) rows->keep(kept);
    map_.keep(kept);
  }

 private:
  Pullback<T> map_;
  Tensor product_;  // P
  double shift_;
  Rows<T> u_, value_, residual_, first_, y_, q_;
};

}  // namespace torchimplicit
