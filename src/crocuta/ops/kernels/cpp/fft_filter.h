// Taps, whose rows have time contiguous, brought into lanes and transformed. fft_conv.cpp and online_conv.cpp share it.
#pragma once

#include <algorithm>
#include <utility>

#include "fft_parts.h"

namespace {

// Lane j of result i is lane i of v[j].
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CROCUTA_SHUFFLE 1
#endif
#endif

#ifdef CROCUTA_SHUFFLE
template <typename T, int S, int... J>
CROCUTA_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, J...>) {
  constexpr int N = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, ((J & S) ? N + J - S : J)...);
  b = __builtin_shufflevector(a, b, ((J & S) ? N + J : J + S)...);
  a = low;
}

template <typename T, int S>
CROCUTA_INLINE void transpose_from(Vec<T>* v) {
  constexpr int N = kLanes<T>;
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & S)) exchange<T, S>(v[i], v[i + S], std::make_integer_sequence<int, N>());
    transpose_from<T, 2 * S>(v);
  }
}

template <typename T>
CROCUTA_INLINE void transpose(Vec<T>* v) {
  transpose_from<T, 1>(v);
}
#else
template <typename T>
CROCUTA_INLINE void transpose(Vec<T>* v) {
  constexpr int N = kLanes<T>;
  T in[N * N], out[N * N];
  std::memcpy(in, v, sizeof in);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) out[i * N + j] = in[j * N + i];
  std::memcpy(v, out, sizeof out);
}
#endif

// Taps [groups][k] as the lanes of a vector want them: lane i has the row (phase + i) / repeat of those from `taps` on;
// `used` of them count. Lanes from `lanes` on are 0.
template <typename T>
struct Rows {
  Rows(const T* all, int64_t k, int64_t used, int64_t channel, int64_t channels, int64_t repeat)
      : taps(all + channel / repeat * k), k(k), used(used), lanes(std::min(kLanes<T>, channels - channel)),
        phase(channel % repeat), repeat(repeat) {}
  const T* row(int64_t lane) const { return taps + (phase + lane) / repeat * k; }

  const T* taps;
  int64_t k, used, lanes, phase, repeat;
};

// Columns [first, first + count) of rows become vectors, `step` apart, times a sign. Runs of rows are copied first:
// rows often lie powers of two apart, where few lines at a time stay in a cache.
template <typename T>
void to_lanes(const Rows<T>& rows, int64_t first, int64_t count, T sign, T* vectors, int64_t step) {
  constexpr int64_t L = kLanes<T>, kRun = L < 8 ? 16 : 2 * L;
  alignas(64) T run[L * kRun];
  for (int64_t t = 0; t < count; t += kRun) {
    const int64_t now = std::min(kRun, count - t), whole = (now + L - 1) / L * L;
    for (int64_t i = 0; i < L; ++i) {
      const T* from = i < rows.lanes ? rows.row(i) + first + t : nullptr;
      for (int64_t n = 0; n < whole; n += L) store(run + i * kRun + n, from ? load(from + n, now - n) : Vec<T>{});
    }
    for (int64_t from = 0; from < whole; from += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) v[i] = load(run + i * kRun + from);
      transpose<T>(v);
      const int64_t end = std::min(L, now - from);
      if (end == L) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i) store(vectors + (t + from + i) * step, sign * v[i]);
      } else {
        for (int64_t i = 0; i < end; ++i) store(vectors + (t + from + i) * step, sign * v[i]);
      }
    }
  }
}

// The reverse, to rows [lanes][count] that are `row` apart; `step` may be negative.
template <typename T>
void from_lanes(const T* vectors, int64_t step, int64_t lanes, int64_t count, T* rows, int64_t row) {
  constexpr int64_t L = kLanes<T>;
  int64_t t = 0;
  if (lanes == L)
    for (; t + L <= count; t += L) {
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) v[i] = load(vectors + (t + i) * step);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) store(rows + i * row + t, v[i]);
    }
  for (; t < count; ++t)
    for (int64_t i = 0; i < lanes; ++i) rows[i * row + t] = vectors[t * step + i];
}

// The first passes of the spectrum of h_j, the taps [j N, (j + 1) N), or, if not Real, of h_j - i h_(j-1).
// Points are brought from rows into lanes just before the passes take them: where they fit a tile, or where what is
// written goes past the caches, by way of a tile, else in the place where they are to be.
template <typename T, bool Real>
void filter_first(const Plan<T>& plan, const Rows<T>& rows, int64_t j, T* points, bool far) {
  constexpr int64_t L = kLanes<T>, kTile = 1024;
  alignas(64) T tile[(Real ? 1 : 2) * kTile * L];
  const bool in_place = plan.size > kTile && !far;
  const int64_t parts = parts_of(plan.size), part = plan.size / parts;
  const int64_t run = in_place ? part : std::min(part, kTile / parts);
  const int64_t step = in_place ? kPoint<T> : L;
  const auto place = [&](int64_t i) { return (in_place ? place_of(plan.size, i) : i * run) * step; };
  T *const real = in_place ? points : tile, *const imaginary = real + (in_place ? L : kTile * L);
  for (int64_t from = 0; from < part; from += run) {
    const auto fill = [&](int64_t first, T sign, T* to) {
      for (int64_t i = 0; i < parts; ++i, first += part) {
        T* at = to + place(i);
        const int64_t count = std::clamp<int64_t>(rows.used - first, 0, run);
        to_lanes(rows, first, count, sign, at, step);
        for (int64_t n = count; n < run; ++n) store(at + n * step, Vec<T>{});
        if (far)
          for (int64_t lane = 0; lane < rows.lanes; ++lane) __builtin_prefetch(rows.row(lane) + first + run, 0, 2);
      }
    };
    fill(j * plan.size + from, T(1), real);
    if (!Real) fill((j - 1) * plan.size + from, T(-1), imaginary);
    split_first<T, Real>(plan, points, from, run, far, [&](int64_t i, int64_t n, Vec<T>& re, Vec<T>& im) {
      re = load(real + place(i) + (n - from) * step);
      if (!Real) im = load(imaginary + place(i) + (n - from) * step);
    });
  }
}

template <typename T, bool Real = false>
void filter_spectrum(const Plan<T>& plan, const Rows<T>& rows, int64_t j, T* points) {
  filter_first<T, Real>(plan, rows, j, points, false);
  for (int64_t part = 0; part < parts_of(plan.size); ++part) split_part(plan, points, part);
}

}  // namespace
