// The matrix of the shifted steps.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linalg_solve_ex.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>

#include <cmath>
#include <optional>
#include <type_traits>
#include <utility>

#include "rows.h"

namespace torchimplicit {

constexpr int64_t kSeries = 256;  // unknowns up to which a matrix is inverted by its powers

// Pᵀ, P = W (I − c W)⁻¹, in single precision by the first 24 powers of c W: six products, where LAPACK takes as long as
// fifteen with a hundred unknowns. None if these powers are not enough: a vector says so.
inline std::optional<Tensor> by_series(const Tensor& weight, double shift, const Tensor& vector) {
  const Tensor x = at::mul(weight.t(), shift), square = at::mm(x, x);
  const Tensor low = at::addmm(at::add(x, square), square, at::add(x, square));  // X + … + X⁴
  const Tensor fifth = at::addmm(at::sub(x, low), x, low), tenth = at::mm(fifth, fifth);
  const Tensor high = at::addmm(at::add(fifth, tenth), tenth, at::add(fifth, tenth));  // X⁵ + … + X²⁰
  const Tensor all = at::addmm(at::add(low, high), low, high);
  const Tensor solved = at::add(vector, at::mv(all, vector));
  const Tensor rest = at::sub(at::sub(solved, at::mv(x, solved)), vector);
  const int64_t n = vector.size(0);
  const double left = two(rest.const_data_ptr<float>(), n), whole = two(solved.const_data_ptr<float>(), n);
  if (!(left <= 1e-6 * whole)) return std::nullopt;
  return at::div(all, shift);
}

// Pᵀ and c of ShiftedTanh for these weights (see _shifted_tanh.py, which this is); none where it cannot be had.
template <class T>
std::pair<std::optional<Tensor>, double> shifted_form(const Tensor& weight) {
  constexpr int64_t kProducts = 12, kLast = 4;
  constexpr double kPart = 0.4, kLargest = 0.5;
  const int64_t n = weight.size(0);
  Tensor vector = at::empty({n}, weight.options()), image = at::empty_like(vector);
  for (int64_t i = 0; i < n; ++i) vector.mutable_data_ptr<T>()[i] = std::cos(T(i) * T(i));
  double before = 0.0;
  for (int64_t product = 0; product < kProducts; ++product) {
    at::mv_out(image, weight, vector);
    std::swap(vector, image);
    if (product == kProducts - kLast - 1) before = two(vector.const_data_ptr<T>(), n);
  }
  const double after = two(vector.const_data_ptr<T>(), n);
  const double radius = before > 0.0 ? std::pow(after / before, 1.0 / kLast) : before;
  const double shift = radius * kLargest <= kPart ? kLargest : kPart / radius;
  if (!(shift > 0.0)) return {std::nullopt, 0.0};  // an infinite radius, or NaN
  if (std::is_same_v<T, float> && n <= kSeries)
    if (auto product = by_series(weight, shift, vector)) return {product, shift};
  Tensor matrix = at::mul(weight, -shift);
  matrix.diagonal().add_(1.0);
  const Tensor product = std::get<0>(at::linalg_solve_ex(matrix, weight));
  if (!std::isfinite(product.sum().item<double>())) return {std::nullopt, 0.0};
  return {product.t().contiguous(), shift};
}

}  // namespace torchimplicit
