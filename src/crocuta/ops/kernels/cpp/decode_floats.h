// Blocks of kBlockRows outputs of y = W x for floating point weights (decode_linear.h, where the layouts are): the sums
// of a few rows and a few blocks.
#pragma once

#include <algorithm>

#include "fft_filter.h"
#include "simd.h"

namespace {

constexpr int64_t kBlockRows = 32;
constexpr int64_t kAhead = 1024;  // bytes that a stream is fetched ahead

// How far behind place `at` of a block lies what its stream reads kAhead bytes later: in the same block, or in the one
// that takes its place when `streams` blocks of `stride` bytes are done.
CROCUTA_INLINE int64_t ahead_of(int64_t at, int64_t stride, int64_t streams) {
  return at + kAhead < stride ? kAhead : kAhead + (streams - 1) * stride;
}

// --- bfloat16 -----------------------------------------------------------------------------------------------------

// Sums run over 256 inputs at a time, so that rounding does not add up over all of them.
constexpr int64_t kRun = 256;

struct Bfloat16Product {
  static constexpr int64_t vectors = kBlockRows / kLanes<float>;
  const uint16_t* weights;
  const float* x;
  int64_t k;

  // to[row][stream][32] for rows [row, row + B) and blocks [block, block + S).
  template <int B, int S>
  void dot(int64_t block, int64_t row, float* to) const {
    const int64_t stride = k * kBlockRows;
    const uint16_t* w = weights + block * stride;
    const float* in = x + row * k;
    for (int64_t from = 0; from < k || from == 0; from += kRun) {
      const int64_t end = std::min(k, from + kRun);
      Vec<float> sum[B][S][vectors] = {};
      for (int64_t i = from; i < end; ++i) {
        const int64_t ahead = ahead_of(2 * i * kBlockRows, 2 * stride, S);
        for (int s = 0; s < S; ++s) {
          const uint16_t* next = w + s * stride + i * kBlockRows;
          Vec<float> v[vectors];
          widen(next, v);
          __builtin_prefetch(reinterpret_cast<const char*>(next) + ahead, 0, 2);
          for (int r = 0; r < B; ++r)
            for (int64_t n = 0; n < vectors; ++n) sum[r][s][n] = sum[r][s][n] + v[n] * in[r * k + i];
        }
      }
      for (int r = 0; r < B; ++r)
        for (int s = 0; s < S; ++s)
          for (int64_t n = 0; n < vectors; ++n) {
            float* out = to + (r * S + s) * kBlockRows + n * kLanes<float>;
            store(out, from ? load(out) + sum[r][s][n] : sum[r][s][n]);
          }
    }
  }

 private:
  CROCUTA_INLINE static void widen(const uint16_t* w, Vec<float>* to) {
    typedef uint32_t Pairs __attribute__((vector_size(CROCUTA_VECTOR_BYTES)));
    constexpr int64_t half = vectors / 2;
    for (int64_t n = 0; n < half; ++n) {
      Pairs pairs;
      std::memcpy(&pairs, w + 2 * n * kLanes<float>, sizeof pairs);
      to[n] = (Vec<float>)(pairs << 16);
      to[n + half] = (Vec<float>)(pairs & 0xffff0000u);
    }
  }
};

// --- weights where they are ---------------------------------------------------------------------------------------

// v[0] becomes the sums of the lanes of each vector: lane i has that of v[i].
template <typename T, int S = 1>
CROCUTA_INLINE void lane_sums(Vec<T>* v) {
#ifdef CROCUTA_SHUFFLE
  if constexpr (S < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * S) {
      exchange<T, S>(v[i], v[i + S], std::make_integer_sequence<int, kLanes<T>>());
      v[i] = v[i] + v[i + S];
    }
    lane_sums<T, 2 * S>(v);
  }
#else
  transpose<T>(v);
  for (int i = 1; i < kLanes<T>; ++i) v[0] = v[0] + v[i];
#endif
}

// Each sum is a vector of partial ones, added up at the end in an order that does not depend on the number of rows.
template <typename T>
struct InPlaceProduct {
  static constexpr int64_t vectors = 2;  // rows at once: as many as leave room for a few outputs each
  static constexpr int kRowsRead = 4;    // side by side: memory is slower where more are
  const T *weights, *other;              // rows of k; in a gated product blocks of both in turn
  int64_t outputs, k;
  const T* x;

  template <int B, int S>
  void dot(int64_t block, int64_t row, T* to) const {
    constexpr int R = std::max(1, static_cast<int>(kLanes<T>) / B);
    for (int s = 0; s < S; ++s)
      for (int64_t o = 0; o < kBlockRows; o += R)
        few<B, R>(block + s, o, row, to + s * kBlockRows + o, S * kBlockRows);
  }

 private:
  const T* row_of(int64_t block, int64_t o) const {
    const int64_t row = (other ? block / 2 : block) * kBlockRows + o;
    return (other && block % 2 ? other : weights) + std::min(row, outputs - 1) * k;
  }

  // Outputs [o, o + R) of a block for B rows.
  template <int B, int R>
  CROCUTA_INLINE void few(int64_t block, int64_t o, int64_t row, T* to, int64_t apart) const {
    constexpr int L = static_cast<int>(kLanes<T>), G = std::min(R, kRowsRead);
    const T* in = x + row * k;
    Vec<T> sum[std::max(L, B * R)] = {};
#pragma GCC unroll 16
    for (int from = 0; from < R; from += G) {
      const int64_t behind = o + from + G;
      const T *w[G], *next = behind < kBlockRows ? row_of(block, behind) : row_of(block + 1, 0);
      for (int n = 0; n < G; ++n) w[n] = row_of(block, o + from + n);
      Vec<T> own[B * G] = {};
      int64_t i = 0;
      for (; i + L <= k; i += L)
        for (int n = 0; n < G; ++n) {
          const Vec<T> v = load(w[n] + i);
          __builtin_prefetch(next + n * k + i, 0, 2);
          for (int r = 0; r < B; ++r) own[r * G + n] = own[r * G + n] + v * load(in + r * k + i);
        }
      if (i < k)
        for (int n = 0; n < G; ++n)
          for (int r = 0; r < B; ++r)
            own[r * G + n] = own[r * G + n] + load(w[n] + i, k - i) * load(in + r * k + i, k - i);
      for (int r = 0; r < B; ++r)
        for (int n = 0; n < G; ++n) sum[r * R + from + n] = own[r * G + n];
    }
    T sums[std::max(L, B * R)];
    for (int at = 0; at < B * R; at += L) {
      lane_sums<T>(sum + at);
      store(sums + at, sum[at]);
    }
    for (int r = 0; r < B; ++r) std::memcpy(to + r * apart, sums + r * R, R * sizeof(T));
  }
};

}  // namespace
