// Transforms in parts: those of fft.h for sequences that are longer than what is near holds.
//
// The first pass, or for large transforms the first two in one, reads and writes far memory and leaves parts; what is
// done to a part after that needs no other, so that spectra are made, multiplied and turned back part by part, while
// they are near (split_part, combine_part). The last passes put the parts together again.
#pragma once

#include "fft.h"

namespace {

constexpr int64_t parts_of(int64_t size) { return size < 4096 ? 8 : 64; }

// Points from one eighth of a transform to the next, from its beginning to a part, and of all with what lies between
// eighths and behind: powers of two apart, they would compete for the same places of the caches.
constexpr int64_t spacing(int64_t size) { return size / 8 + 1; }
constexpr int64_t place_of(int64_t size, int64_t part) {
  return part * (size / parts_of(size)) + part * 8 / parts_of(size);
}
constexpr int64_t spaced(int64_t size) { return size + 9; }

template <typename T>
CROCUTA_INLINE void get(const T* points, int64_t apart, Vec<T>* re, Vec<T>* im) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    re[j] = load(points + j * apart);
    im[j] = load(points + j * apart + kLanes<T>);
  }
}

template <typename T, bool Far = false>
CROCUTA_INLINE void put(T* points, int64_t apart, const Vec<T>* re, const Vec<T>* im) {
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j)
    if (Far) {
      store_far(points + j * apart, re[j]);
      store_far(points + j * apart + kLanes<T>, im[j]);
    } else {
      store(points + j * apart, re[j]);
      store(points + j * apart + kLanes<T>, im[j]);
    }
}

constexpr int64_t kStrip = 4;  // points of each of 64 parts that are brought near at a time, where two passes are one

// The first passes for points [from, from + count) of every part; source(j, n, re, im) sets point n of part j, and im
// only if not Real. `far`: large transforms are written past the caches.
template <typename T, bool Real, typename Source>
CROCUTA_INLINE void split_first(const Plan<T>& plan, T* points, int64_t from, int64_t count, bool far,
                                Source&& source) {
  const int64_t apart = place_of(plan.size, 1) * kPoint<T>;
  const T* nodes = plan.nodes.get();
  const auto first = [&](int64_t j, int64_t step, int64_t n, T* to, int64_t to_step) {
    Vec<T> re[8], im[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) source(j + i * step, n, re[i], im[i]);
    split<T, 3, Real>(re, im, 1, nodes);
    put(to, to_step, re, im);
  };
  if (parts_of(plan.size) == 8) {
    for (int64_t n = from; n < from + count; ++n) first(0, 1, n, points + n * kPoint<T>, apart);
    return;
  }
  constexpr int64_t kApart = kStrip * kPoint<T>, kEighth = 8 * kApart + kPoint<T>;
  alignas(64) T strip[8 * kEighth];
  for (int64_t begin = from; begin < from + count; begin += kStrip) {
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t n = 0; n < kStrip; ++n)
        first(j, 8, begin + n, strip + j * kApart + n * kPoint<T>, kEighth);
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t n = 0; n < kStrip; ++n) {
        Vec<T> re[8], im[8];
        get(strip + j * kEighth + n * kPoint<T>, kApart, re, im);
        split<T, 3, false>(re, im, 8 + j, nodes);
        T* to = points + place_of(plan.size, j * 8) * kPoint<T> + (begin + n) * kPoint<T>;
        if (far) put<T, true>(to, apart, re, im);
        else put(to, apart, re, im);
      }
  }
}

// All other passes of one part.
template <typename T>
CROCUTA_INLINE void split_part(const Plan<T>& plan, T* points, int64_t part) {
  const int64_t parts = parts_of(plan.size);
  split_block(plan, parts == 8 ? 1 : 2, points + place_of(plan.size, part) * kPoint<T>, parts + part);
}

template <typename T>
CROCUTA_INLINE void combine_part(const Plan<T>& plan, T* points, int64_t part) {
  combine_block(plan, parts_of(plan.size) == 8 ? 1 : 2, points + place_of(plan.size, part) * kPoint<T>);
}

// The last passes: real parts go to sink(t, vector), each t once, which may write to the points of its t.
template <typename T, typename Sink>
CROCUTA_INLINE void combine_last(const Plan<T>& plan, const T* points, Sink&& sink) {
  const int64_t eighth = plan.size / 8, part = plan.size / parts_of(plan.size);
  const int64_t apart = place_of(plan.size, 1) * kPoint<T>;
  const auto last = [&](const T* from, int64_t step, int64_t n) {
    Vec<T> re[8], im[8];
    get(from, step, re, im);
    combine<T, 3, false>(re, im, plan.inverse[0] + n * 8);
    const T* w = plan.weights.get() + n * 16;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sink(n + j * eighth, w[2 * j] * re[j] + w[2 * j + 1] * im[j]);
  };
  if (parts_of(plan.size) == 8) {
    for (int64_t n = 0; n < part; ++n) last(points + n * kPoint<T>, apart, n);
    return;
  }
  constexpr int64_t kApart = kStrip * kPoint<T>, kEighth = 8 * kApart + kPoint<T>;
  alignas(64) T strip[8 * kEighth];
  for (int64_t begin = 0; begin < part; begin += kStrip) {
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t n = 0; n < kStrip; ++n) {
        Vec<T> re[8], im[8];
        const T* from = points + place_of(plan.size, j * 8) * kPoint<T> + (begin + n) * kPoint<T>;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          __builtin_prefetch(from + i * apart + kStrip * kPoint<T>, 0, 2);
          __builtin_prefetch(from + i * apart + kStrip * kPoint<T> + kLanes<T>, 0, 2);
        }
        get(from, apart, re, im);
        combine<T, 3, false>(re, im, plan.inverse[1] + (begin + n) * 8);
        put(strip + j * kEighth + n * kPoint<T>, kApart, re, im);
      }
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t n = 0; n < kStrip; ++n)
        last(strip + j * kApart + n * kPoint<T>, kEighth, j * part + begin + n);
  }
}

// The spectrum of real numbers: source(t) is a vector, 0 <= t < plan.size.
template <typename T, typename Source>
void transform_real(const Plan<T>& plan, T* points, Source&& source) {
  const int64_t parts = parts_of(plan.size), part = plan.size / parts;
  split_first<T, true>(plan, points, 0, part, false, [&](int64_t j, int64_t n, Vec<T>& re, Vec<T>&) {
    re = source(j * part + n);
  });
  for (int64_t j = 0; j < parts; ++j) split_part(plan, points, j);
}

// The real parts of what has a spectrum: sink(t, vector), each t once, which may write to the points of its t.
template <typename T, typename Sink>
void inverse_real(const Plan<T>& plan, T* points, Sink&& sink) {
  for (int64_t j = 0; j < parts_of(plan.size); ++j) combine_part(plan, points, j);
  combine_last(plan, points, sink);
}

}  // namespace
