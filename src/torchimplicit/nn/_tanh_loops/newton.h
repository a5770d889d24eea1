// Newton's steps for a few samples, each by itself.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mv.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "loop.h"

namespace torchimplicit {

constexpr int64_t kFew = 16, kNewtonSteps = 20;  // samples that such steps are taken for, and how many

// The linear systems of NewtonKrylov, as its options have them.
struct Krylov {
  int64_t restart, max_steps;  // of GMRES; none at all where restart is 0
  double forcing, goal;        // 0 is Eisenstat and Walker's; no further than half of this residual is needed

  // The forcing term after a step that took the residual from one norm to another: see _newton._forcing.
  double next(double eta, double before, double after) const {
    if (forcing > 0.0) return forcing;
    const double ratio = after / before, memory = 0.9 * eta * eta;
    eta = std::max(0.9 * ratio * ratio, memory > 0.1 ? memory : 0.0);
    return std::isfinite(eta) ? std::clamp(eta, 0.01, 0.5) : 0.5;
  }
};

// One sample: Newton's steps for z = tanh(W z + x), each system solved by GMRES (Saad & Schultz 1986).
template <class T>
class NewtonKrylov {
 public:
  NewtonKrylov(const Tensor& weight, const Krylov& krylov)
      : weight_(weight), krylov_(krylov), n_(weight.size(0)), length_(std::min(krylov.restart, krylov.max_steps)),
        basis_(at::empty({length_ + 1, n_}, weight.options())), image_(at::empty({n_}, weight.options())),
        z_(at::empty({n_}, weight.options())), right_side_(n_), residual_(n_), slope_(n_), value_(n_), delta_(n_),
        hessenberg_((length_ + 1) * length_), cosine_(length_), sine_(length_), right_(length_ + 1) {}

  // z and value are changed by steps that are good ones: so many, and whether they came to an end.
  template <class Within>
  std::pair<int64_t, bool> solve(T* z, T* value, const T* x, double& norm, Within within) {
    double eta = krylov_.forcing > 0.0 ? krylov_.forcing : 0.1;
    T *there = z_.template mutable_data_ptr<T>(), *image = image_.template mutable_data_ptr<T>();
    for (int64_t step = 0; step < kNewtonSteps; ++step) {
      for (int64_t i = 0; i < n_; ++i) {
        right_side_[i] = value[i] - z[i];
        slope_[i] = T(1) - value[i] * value[i];
      }
      // No further than convergence asks (Kelley 1995, 6.20).
      direction(krylov_.goal > 0.0 ? std::max(eta, 0.5 * krylov_.goal / std::max(norm, krylov_.goal)) : eta);
      for (int64_t i = 0; i < n_; ++i) there[i] = z[i] + delta_[i];
      at::mv_out(image_, weight_, z_);
      for (int64_t i = 0; i < n_; ++i) value_[i] = tanh_of(image[i] + x[i]);
      const double before = norm, after = distance(value_.data(), there, n_);
      if (!(after <= (1 - 1e-4) * before)) return {step, false};  // what needs a search is not for here
      std::memcpy(z, there, n_ * sizeof(T));
      std::memcpy(value, value_.data(), n_ * sizeof(T));
      norm = after;
      eta = krylov_.next(eta, before, after);
      if (within(norm, value, z)) return {step + 1, true};
    }
    return {kNewtonSteps, false};
  }

 private:
  // delta_ ← about (I − D W)⁻¹ right_side_, as far as the tolerance asks, or products are left.
  void direction(double rtol) {
    std::fill(delta_.begin(), delta_.end(), T(0));
    residual_ = right_side_;
    double norm = two(residual_.data(), n_);
    const double target = rtol * norm;
    for (int64_t left = krylov_.max_steps; left > 0;) {
      const int64_t taken = cycle(norm, target, std::min(left, length_));
      left -= taken;
      if (taken < length_ || left <= 0) return;
      T *there = z_.template mutable_data_ptr<T>(), *image = image_.template mutable_data_ptr<T>();
      std::copy(delta_.begin(), delta_.end(), there);
      at::mv_out(image_, weight_, z_);
      for (int64_t i = 0; i < n_; ++i) residual_[i] = right_side_[i] - (delta_[i] - slope_[i] * image[i]);
      norm = two(residual_.data(), n_);
      if (!(norm > target)) return;
    }
  }

  T* vector(int64_t k) { return basis_.template mutable_data_ptr<T>() + k * n_; }
  double& h(int64_t row, int64_t column) { return hessenberg_[row * length_ + column]; }

  // delta_ ← delta_ + about (I − D W)⁻¹ residual_, by at most so many products. Returns how many.
  int64_t cycle(double norm, double target, int64_t most) {
    for (int64_t i = 0; i < n_; ++i) vector(0)[i] = residual_[i] / norm;
    std::fill(right_.begin(), right_.end(), 0.0);
    right_[0] = norm;
    int64_t k = 0;
    while (k < most) {
      const T* p = vector(k);
      T *w = image_.template mutable_data_ptr<T>(), *next = vector(k + 1);
      at::mv_out(image_, weight_, basis_.select(0, k));
      for (int64_t i = 0; i < n_; ++i) next[i] = p[i] - slope_[i] * w[i];
      const double whole = two(next, n_);
      for (int64_t j = 0; j <= k; ++j) {
        const T* q = vector(j);
        const double part = h(j, k) = sum(n_, [=](int64_t i) { return double(q[i]) * double(next[i]); });
        for (int64_t i = 0; i < n_; ++i) next[i] -= T(part) * q[i];
      }
      const double size = h(k + 1, k) = two(next, n_);
      for (int64_t j = 0; j < k; ++j) {
        const double upper = h(j, k), lower = h(j + 1, k);
        h(j, k) = cosine_[j] * upper + sine_[j] * lower;
        h(j + 1, k) = cosine_[j] * lower - sine_[j] * upper;
      }
      const double length = std::hypot(h(k, k), size);
      if (!(length > 0.0) || !std::isfinite(length)) break;
      cosine_[k] = h(k, k) / length;
      sine_[k] = size / length;
      h(k, k) = length;
      right_[k + 1] = -sine_[k] * right_[k];
      right_[k] *= cosine_[k];
      ++k;
      const bool exhausted = size <= 4 * std::numeric_limits<T>::epsilon() * whole;
      if (std::abs(right_[k]) <= target || exhausted) break;
      for (int64_t i = 0; i < n_; ++i) next[i] /= T(size);
    }
    for (int64_t j = k - 1; j >= 0; --j) {
      for (int64_t l = j + 1; l < k; ++l) right_[j] -= h(j, l) * right_[l];
      right_[j] /= h(j, j);
      for (int64_t i = 0; i < n_; ++i) delta_[i] += T(right_[j]) * vector(j)[i];
    }
    return k;
  }

  Tensor weight_;
  Krylov krylov_;
  int64_t n_, length_;
  Tensor basis_, image_, z_;
  std::vector<T> right_side_, residual_, slope_, value_, delta_;
  std::vector<double> hessenberg_, cosine_, sine_, right_;
};

// Newton's steps for the samples that a loop left, where these are few. Returns the most that one took.
template <class T, class Within>
int64_t go_on(Found& found, const Tensor& weight, const Rows<T>& x, const Krylov& krylov, Within within) {
  const int64_t rows = found.z.size(0), n = found.z.size(1);
  bool* done = found.done.mutable_data_ptr<bool>();
  if (std::count(done, done + rows, false) > kFew) return 0;
  NewtonKrylov<T> newton(weight, krylov);
  int64_t most = 0;
  found.clean = true;
  for (int64_t i = 0; i < rows; ++i) {
    if (done[i]) continue;
    T* norm_out = found.norm.mutable_data_ptr<T>() + i;
    T *z = found.z.mutable_data_ptr<T>() + i * n, *value = found.value.mutable_data_ptr<T>() + i * n;
    double norm = distance(value, z, n);
    const auto ready = [&](double norm, const T* value, const T* z) { return within(i, norm, value, z, found.peak[i]); };
    int64_t steps = 0;
    if (std::isfinite(norm)) std::tie(steps, done[i]) = newton.solve(z, value, x.at(i), norm, ready);
    *norm_out = norm;
    found.steps.mutable_data_ptr<int64_t>()[i] += steps;
    found.clean = found.clean && done[i];
    most = std::max(most, steps);
  }
  return most;
}

}  // namespace torchimplicit
