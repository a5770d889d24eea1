// Steps in mixed precision.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "steps.h"

namespace torchimplicit {

constexpr int64_t kPadded = 16;  // rows of a product in bfloat16 are multiples of it

using Low = at::BFloat16;

// To nearest, ties to even. (NaN may become another number: the map's value, in full precision, tells.)
inline uint16_t low_of(float number) {
  const uint32_t bits = std::bit_cast<uint32_t>(number);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float full_of(uint16_t number) { return std::bit_cast<float>(uint32_t(number) << 16); }

inline uint16_t* bits_of(Rows<Low>& rows) { return reinterpret_cast<uint16_t*>(rows.at(0)); }

// Iterative refinement (Wilkinson 1963): the products of a block are in bfloat16, the one after it, which says whether
// the equation holds, in float. The first block is `rough`: steps of the equation itself. The others solve the
// linearised equation for what is left, by Neumann's series. `Map` is Cell or Pullback, and says how.
template <class Map>
class MixedSteps {
 public:
  MixedSteps(Map map, const Rows<float>& z, const Rows<float>& value, bool rough) : map_(std::move(map)), rough_(rough) {
    const int64_t rows = z.tensor().size(0);
    for (Rows<float>* made : {&z_, &value_, &residual_}) *made = Rows<float>(z.tensor(), rows);
    std::memcpy(z_.at(0), z.at(0), z.numel() * sizeof(float));
    std::memcpy(value_.at(0), value.at(0), value.numel() * sizeof(float));
    const Tensor like = at::empty({0, z.tensor().size(1)}, z.tensor().options().dtype(at::kBFloat16));
    for (Rows<Low>* made : {&low_, &image_}) *made = Rows<Low>(like, rows);
    matrix_ = map_.matrix().to(at::kBFloat16);
  }
  const Rows<float>& z() const { return z_; }
  const Rows<float>& value() const { return value_; }

  void walk(int64_t block) {
    float *z = z_.at(0), *value = value_.at(0), *residual = residual_.at(0);
    uint16_t *low = bits_of(low_), *image = bits_of(image_);
    const int64_t numbers = z_.numel();
    if (rough_) {
      for (int64_t i = 0; i < numbers; ++i) low[i] = low_of(value[i]);
    } else {
      each(residual_, [=](int64_t i) { return value[i] - z[i]; });
      map_.begin(value_);
      map_.scale(residual, low, numbers);
    }
    for (int64_t step = 1; step <= block; ++step) {
      at::mm_out(image_.tensor(), low_.tensor(), matrix_);
      if (rough_)
        map_.rough(image, z, low, numbers, step == block);
      else
        map_.term(residual, image, z, low, numbers, step == block);
    }
    rough_ = false;
    map_(z_, value_);
  }
  void go_on(int64_t, const Judged&) {}
  void keep(const std::vector<int64_t>& kept) {
    for (Rows<float>* rows : {&z_, &value_, &residual_}) rows->keep(kept);
    // Of no definite content from here on. oneDNN takes a millisecond for a product of a size that it has not seen yet:
    // only multiples of kPadded come up.
    const int64_t rows = std::min<int64_t>((kept.size() + kPadded - 1) / kPadded * kPadded, low_.tensor().size(0));
    for (Rows<Low>* padded : {&low_, &image_}) *padded = Rows<Low>(padded->tensor().narrow(0, 0, 0), rows);
    map_.keep(kept);
  }

 private:
  Map map_;
  bool rough_;
  Tensor matrix_;
  Rows<float> z_, value_, residual_;
  Rows<Low> low_, image_;
};

// z ← tanh(W z + x), and (I − D W) e = r.
struct MixedCell : Cell<float> {
  Rows<float> slope;

  MixedCell(Tensor transposed, const Rows<float>& x)
      : Cell<float>{std::move(transposed), x}, slope(x.tensor(), x.tensor().size(0)) {}
  const Tensor& matrix() const { return transposed; }
  void begin(const Rows<float>& value) {
    const float* f = value.at(0);
    each(slope, [=](int64_t i) { return 1.0f - f[i] * f[i]; });
  }
  void scale(const float* e, uint16_t* low, int64_t numbers) {
    for (int64_t i = 0; i < numbers; ++i) low[i] = low_of(e[i]);
  }
  void rough(const uint16_t* image, float* z, uint16_t* low, int64_t numbers, bool last) {
    const float* xs = std::as_const(x).at(0);
    if (last)
      for (int64_t i = 0; i < numbers; ++i) z[i] = tanh_of(full_of(image[i]) + xs[i]);
    else
      for (int64_t i = 0; i < numbers; ++i) low[i] = low_of(tanh_of(full_of(image[i]) + xs[i]));
  }
  void term(const float* residual, const uint16_t* image, float* z, uint16_t* low, int64_t numbers, bool last) {
    const float* d = std::as_const(slope).at(0);
    if (last)
      for (int64_t i = 0; i < numbers; ++i) z[i] += residual[i] + d[i] * full_of(image[i]);
    else
      for (int64_t i = 0; i < numbers; ++i) low[i] = low_of(residual[i] + d[i] * full_of(image[i]));
  }
  void keep(const std::vector<int64_t>& kept) {
    Cell<float>::keep(kept);
    slope.keep(kept);
  }
};

// u ← v + Wᵀ D u, and (I − Wᵀ D) e = r.
struct MixedPullback : Pullback<float> {
  using Pullback<float>::Pullback;
  const Tensor& matrix() const { return weight; }
  void begin(const Rows<float>&) {}
  void scale(const float* e, uint16_t* low, int64_t numbers) {
    const float* d = std::as_const(slope).at(0);
    for (int64_t i = 0; i < numbers; ++i) low[i] = low_of(d[i] * e[i]);
  }
  void rough(const uint16_t*, float*, uint16_t*, int64_t, bool) {}  // linear from the beginning
  void term(const float* residual, const uint16_t* image, float* u, uint16_t* low, int64_t numbers, bool last) {
    const float* d = std::as_const(slope).at(0);
    if (last)
      for (int64_t i = 0; i < numbers; ++i) u[i] += residual[i] + full_of(image[i]);
    else
      for (int64_t i = 0; i < numbers; ++i) low[i] = low_of(d[i] * (residual[i] + full_of(image[i])));
  }
};

}  // namespace torchimplicit
