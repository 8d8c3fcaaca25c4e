// Functions of vectors: the exponential, and the activations of MLPs with their derivatives.
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
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i] < -708 ? -708 : x[i] > 709 ? 709 : x[i]);
  return x;
}

// erfc(y / sqrt 2) / 2 for y >= 0, where `gauss` is e^(-y^2 / 2): the probability of a normal number beyond y.
template <typename T>
CROCUTA_INLINE Vec<T> upper_tail(Vec<T> y, Vec<T> gauss);

// gauss * t * P(t) with t = 3 / (3 + y / sqrt 2); P was fitted in float64 to 1e-8 relative.
template <>
CROCUTA_INLINE Vec<float> upper_tail<float>(Vec<float> y, Vec<float> gauss) {
  const Vec<float> t = 3.0f / (3.0f + y * 0.70710678f);
  Vec<float> p = splat(0.05185291258f);
  p = p * t - 0.27133262357f;
  p = p * t + 0.48718332044f;
  p = p * t - 0.37696788793f;
  p = p * t + 0.35053044304f;
  p = p * t + 0.02630338149f;
  p = p * t + 0.18245473230f;
  p = p * t + 0.17348802359f;
  p = p * t + 0.18843929992f;
  p = p * t + 0.18804839062f;
  return 0.5f * gauss * t * p;
}

template <>
CROCUTA_INLINE Vec<double> upper_tail<double>(Vec<double> y, Vec<double>) {
  for (int64_t i = 0; i < kLanes<double>; ++i) y[i] = 0.5 * std::erfc(y[i] * 0.70710678118654752440);
  return y;
}

// The numbers are those of crocuta.ops.kernels.activation.
enum Activation : int64_t { kIdentity, kSilu, kGelu, kGeluTanh };

// act(x), and act'(x) where asked for.
template <typename T, int64_t activation, bool Slope>
CROCUTA_INLINE Vec<T> activate(Vec<T> x, Vec<T>& slope) {
  const Vec<T> one = splat(T(1));
  if (activation == kIdentity) {
    if (Slope) slope = one;
    return x;
  }
  if (activation == kGelu) {
    const Vec<T> gauss = vector_exp<T>(T(-0.5) * x * x), y = x < T(0) ? -x : x, tail = upper_tail<T>(y, gauss);
    const Vec<T> below = x < T(0) ? tail : one - tail;
    if (Slope) slope = below + T(0.39894228040143267794) * x * gauss;
    return x * below;
  }
  Vec<T> inner = x, dinner = one;  // silu: x sigmoid(x); tanh gelu: x sigmoid(2 y), as (1 + tanh y) / 2 = sigmoid(2 y)
  if (activation == kGeluTanh) {
    inner = T(1.59576912160573071176) * (x + T(0.044715) * x * x * x);
    dinner = T(1.59576912160573071176) * (one + T(0.134145) * x * x);
  }
  const Vec<T> e = vector_exp<T>(-inner), s = one / (one + e);
  if (Slope) slope = s + x * s * (e * s) * dinner;  // e s = 1 - s, without what the difference loses
  return x * s;
}

template <typename T>
CROCUTA_INLINE Vec<T> activate(Vec<T> x, int64_t activation) {
  Vec<T> unused;
  switch (activation) {
    case kSilu:
      return activate<T, kSilu, false>(x, unused);
    case kGelu:
      return activate<T, kGelu, false>(x, unused);
    case kGeluTanh:
      return activate<T, kGeluTanh, false>(x, unused);
    default:
      return x;
  }
}

}  // namespace
