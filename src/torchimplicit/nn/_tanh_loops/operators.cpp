// A whole solve of z = tanh(W z + x), and a whole adjoint solve, as one call each, for TanhEquilibrium(compiled=True).
//
// The decisions are those of _books.py, _tolerance.py and Neumann for what usually happens: steps until a sample has
// converged, which then leaves the batch. What else may happen is not decided here: such a sample is given up, and
// left to the loop that knows all. Norms are two-norms.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "form.h"
#include "loop.h"
#include "mixed.h"
#include "newton.h"
#include "shifted.h"
#include "steps.h"

namespace torchimplicit {
namespace {

constexpr double kReach = 4.0;         // _tolerance._REACH
constexpr double kUnderflow = 1e-140;  // below it a sum of squares has lost digits

template <class T>
Found solve(const Tensor& weight, const Tensor& x, const Tensor& start, const std::optional<Tensor>& product,
            double shift, double rtol, double atol, double atol_first, const Pace& pace, const Krylov& krylov) {
  const double eps = std::numeric_limits<T>::epsilon(), tiny = std::numeric_limits<T>::min();
  const double above = 1 + kReach * eps;
  const int64_t rows = x.size(0), n = x.size(1);
  // The residual with the true tanh is larger than that with the quotient by no more than this part of the value.
  if (std::is_same_v<T, float>) rtol -= kTanhError * eps;
  const Tensor transposed = weight.t();
  const Rows<T> xs(x), starts(start);
  const T* numbers = starts.at(0);
  const bool zero = std::all_of(numbers, numbers + starts.numel(), [](T number) { return number == 0; });
  const Tensor image = zero ? at::zeros_like(start) : at::mm(start, transposed);
  Rows<T> value(x, rows);
  tanh_of_sum(value, Rows<T>(image), xs);
  Found found = begin(start, value.tensor());
  const double least = std::max(atol, tiny);
  std::vector<double> first(rows), atols(rows);
  std::vector<char> passed(rows);
  for (int64_t i = 0; i < rows; ++i) {
    first[i] = distance(std::as_const(value).at(i), starts.at(i), n);
    atols[i] = std::max(atol + atol_first * first[i], tiny);
    passed[i] = first[i] < atols[i] + rtol * two(std::as_const(value).at(i), n);
  }
  const auto within = [&](int64_t row, double norm, const T* value, const T* z, double peak) {
    // A residual must have fallen, and far enough out rounding hides any (see Tolerance.credible).
    const double fallen = std::max(0.5 * above * peak, least);
    return norm < fallen && norm < atols[row] + rtol * two(value, n) && eps * two(z, n) <= fallen;
  };
  if (std::is_same_v<T, float> && pace.mixed) {
    if constexpr (std::is_same_v<T, float>) {
      MixedSteps<MixedCell> steps({transposed, xs}, starts, value, true);
      loop<T>(steps, found, first, passed, pace, within);
    }
  } else if (product.has_value()) {
    ShiftedSteps<T> steps(transposed, *product, shift, xs, image);
    loop<T>(steps, found, first, passed, pace, within);
  } else {
    PlainSteps<T, Cell<T>> steps({transposed, xs}, value, pace.extrapolate);
    loop<T>(steps, found, first, passed, pace, within);
  }
  if (!found.clean && krylov.restart > 0) found.taken += go_on(found, weight, xs, krylov, within);
  return found;
}

template <class T>
std::tuple<Found, Tensor> pull_back(const Tensor& weight, const Tensor& value, const Tensor& v,
                                    const std::optional<Tensor>& product, double shift, double rtol, const Pace& pace) {
  const int64_t rows = v.size(0), n = v.size(1);
  const Rows<T> vs(v), values(value);
  Rows<T> slope(v, rows), image(v, rows);
  const T* f = values.at(0);
  each(slope, [=](int64_t i) { return T(1) - f[i] * f[i]; });
  const bool mixed = std::is_same_v<T, float> && pace.mixed;  // begins at zero, the others at v
  Found found = mixed ? begin(at::zeros_like(v), v) : begin(v, v);
  std::vector<double> first(rows), target(rows);
  std::vector<char> passed(rows);
  const auto judge = [&](const Rows<T>& start, const Rows<T>& image) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* row = vs.at(i);
      const double size = two(row, n);
      first[i] = distance(image.at(i), start.at(i), n);
      // Nothing is known of a gradient whose squares overflow, or underflow: such a row never passes.
      const bool lost = !std::isfinite(size) ||
                        (size < kUnderflow && std::any_of(row, row + n, [](T number) { return number != 0; }));
      target[i] = lost ? -1.0 : rtol * size;
      passed[i] = first[i] <= target[i];
    }
  };
  const auto within = [&](int64_t row, double norm, const T*, const T*, double) { return norm <= target[row]; };
  if constexpr (std::is_same_v<T, float>) {
    if (mixed) {
      const Rows<T> zero(found.z);
      judge(zero, vs);
      MixedSteps<MixedPullback> steps({weight, slope, vs}, zero, vs, false);
      loop<T>(steps, found, first, passed, pace, within);
    }
  }
  if (!mixed) {
    Pullback<T> map(weight, slope, vs);
    map(vs, image);
    found.value.copy_(image.tensor());
    judge(vs, image);
    if (product.has_value()) {
      ShiftedAdjointSteps<T> steps(std::move(map), product->t(), shift, vs, image);
      loop<T>(steps, found, first, passed, pace, within);
    } else {
      PlainSteps<T, Pullback<T>> steps(std::move(map), image, pace.extrapolate);
      loop<T>(steps, found, first, passed, pace, within);
    }
  }
  // Relative to the gradient.
  for (int64_t i = 0; i < rows; ++i)
    if (const double size = two(vs.at(i), n); size > 0.0) found.norm.mutable_data_ptr<T>()[i] /= size;
  // Once more from the values: `slope` may have lost rows.
  Tensor scaled = at::empty_like(found.z);
  T* o = scaled.mutable_data_ptr<T>();
  const T* u = found.z.const_data_ptr<T>();
  for (int64_t i = 0; i < scaled.numel(); ++i) o[i] = (T(1) - f[i] * f[i]) * u[i];
  return {found, scaled};
}

using Solved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, int64_t, bool>;

// Products with W or P, for the whole batch each: of the steps, and of the looks where these take their own.
int64_t evaluations(const Found& found, bool looks) { return 1 + found.taken + (looks ? found.looks : 0); }

Solved solution(const Tensor& weight, const Tensor& x, const Tensor& start, const std::optional<Tensor>& product,
                double shift, double rtol, double atol, double atol_first, int64_t max_steps, int64_t block,
                bool extrapolate, bool mixed, int64_t patience, double progress, int64_t restart, int64_t products,
                double forcing, double goal, double unit) {
  const Pace pace{max_steps, block, extrapolate, mixed, patience, progress};
  const Krylov krylov{restart, products, forcing, goal};
  const auto function = x.scalar_type() == at::kFloat ? solve<float> : solve<double>;
  Found f = function(weight, x.contiguous(), start.contiguous(), product, shift, rtol, atol, atol_first, pace, krylov);
  return {f.z, f.value, f.norm.mul_(unit), f.steps, f.done, evaluations(f, mixed || product.has_value()), f.clean};
}

std::tuple<std::optional<Tensor>, double> shifted(const Tensor& weight) {
  return weight.scalar_type() == at::kFloat ? shifted_form<float>(weight) : shifted_form<double>(weight);
}

using Pulled = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, bool>;

Pulled gradient(const Tensor& weight, const Tensor& z, const Tensor& value, const Tensor& v,
                const std::optional<Tensor>& product, double shift, double rtol, int64_t max_steps, int64_t block,
                bool extrapolate, bool mixed, int64_t patience, double progress, bool of_weight) {
  const Pace pace{max_steps, block, extrapolate, mixed, patience, progress};
  const auto function = v.scalar_type() == at::kFloat ? pull_back<float> : pull_back<double>;
  auto [f, of_x] = function(weight, value.contiguous(), v.contiguous(), product, shift, rtol, pace);
  Tensor of_w = of_weight && f.clean ? at::mm(of_x.t(), z) : at::empty({0}, z.options());
  return {of_x, of_w, f.norm, f.steps, evaluations(f, mixed || product.has_value()), f.clean};
}

// That of the loops, for tests.
Tensor tanh_values(const Tensor& p) {
  const Tensor given = p.contiguous().view({1, -1});
  if (p.scalar_type() != at::kFloat) return at::tanh(p);
  Rows<float> out(given, 1);
  const float* ps = given.const_data_ptr<float>();
  each(out, [=](int64_t i) { return tanh_of(ps[i]); });
  return out.tensor().view(p.sizes());
}

}  // namespace

TORCH_LIBRARY(torchimplicit_tanh_loops, m) {
  m.def(
      "solution(Tensor weight, Tensor x, Tensor start, Tensor? product, float shift, float rtol, float atol, "
      "float atol_first, int max_steps, int block, bool extrapolate, bool mixed, int patience, float progress, "
      "int restart, int products, float forcing, float goal, float unit) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, int, bool)");
  m.def(
      "gradient(Tensor weight, Tensor z, Tensor value, Tensor v, Tensor? product, float shift, float rtol, "
      "int max_steps, int block, bool extrapolate, bool mixed, int patience, float progress, bool of_weight) "
      "-> (Tensor, Tensor, Tensor, Tensor, int, bool)");
  m.def("shifted(Tensor weight) -> (Tensor?, float)");
  m.def("tanh(Tensor p) -> Tensor");
}

TORCH_LIBRARY_IMPL(torchimplicit_tanh_loops, CPU, m) {
  m.impl("solution", solution);
  m.impl("gradient", gradient);
  m.impl("shifted", shifted);
  m.impl("tanh", tanh_values);
}

}  // namespace torchimplicit
