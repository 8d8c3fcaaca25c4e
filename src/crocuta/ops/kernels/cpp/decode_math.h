// Functions of vectors that a decoding step needs: the exponential, and the activations of MLPs.
#pragma once

#include <cmath>

#include "simd.h"

namespace {

template <typename T>
CROCUTA_INLINE Vec<T> vector_exp(Vec<T> x);

// 2^n e^r with x = n ln 2 + r, |r| <= ln 2 / 2, and the series of e^r to r^7: 1e-7 relative. What would overflow or
// be denormal stays at the limits; NaN stays NaN.
template <>
CROCUTA_INLINE Vec<float> vector_exp<float>(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(CROCUTA_VECTOR_BYTES)));
  const Vec<float> low = splat(-87.33654f), high = splat(88.37626f), round = splat(12582912.0f);  // 1.5 * 2^23
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec<float> shifted = x * 1.44269504f + round, n = shifted - round;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Ints scale = ((Ints)shifted << 23) + 0x3f800000;
  return y * (Vec<float>)scale;
}

template <>
CROCUTA_INLINE Vec<double> vector_exp<double>(Vec<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename T>
CROCUTA_INLINE Vec<T> vector_erfc(Vec<T> x) {
  for (int64_t i = 0; i < kLanes<T>; ++i) x[i] = std::erfc(x[i]);
  return x;
}

// The numbers are those of crocuta.ops.kernels.decode.
enum Activation : int64_t { kIdentity, kSilu, kGelu, kGeluTanh };

template <typename T>
CROCUTA_INLINE Vec<T> activate(Vec<T> x, int64_t activation) {
  const Vec<T> one = splat(T(1));
  switch (activation) {
    case kSilu:
      return x / (one + vector_exp<T>(-x));
    case kGelu:
      return T(0.5) * x * vector_erfc<T>(x * T(-0.70710678118654752440));  // 1 + erf y = erfc -y
    case kGeluTanh: {  // (1 + tanh y) / 2 = 1 / (1 + e^(-2 y))
      const Vec<T> y = T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
      return x / (one + vector_exp<T>(T(-2) * y));
    }
    default:
      return x;
  }
}

}  // namespace
