// tanh, as the loops have it.

#pragma once

#include <cmath>

namespace torchimplicit {

// In float, p P(p²)/Q(p²) with both of degree four: at most kTanhError rounding units off (measured: 3.1). The
// coefficients make the largest relative error on [−8, 8] least (Lawson's iteration on the linearised problem), with
// P(0) = Q(0) = 1: small numbers are exact. Beyond kOne it is 1: a slope that is not zero there would be a gradient.
constexpr double kTanhError = 4.0;
constexpr float kEnd = 8.0f, kOne = 9.0109f;

inline float tanh_of(float p) {
  const float q = p < -kEnd ? -kEnd : (p > kEnd ? kEnd : p);
  const float s = q * q;
  float a = 1.5292592081550538e-08f;
  a = a * s + 2.1939216821920127e-05f;
  a = a * s + 0.003574318950995803f;
  a = a * s + 0.13446800410747528f;
  a = a * s + 1.0f;
  float b = 8.547747256670846e-07f;
  b = b * s + 0.00034157276969471706f;
  b = b * s + 0.026174824684858322f;
  b = b * s + 0.4678013026714325f;
  b = b * s + 1.0f;
  const float inside = q * a / b;
  return p > kOne ? 1.0f : (p < -kOne ? -1.0f : inside);
}

inline double tanh_of(double p) { return std::tanh(p); }

}  // namespace torchimplicit
