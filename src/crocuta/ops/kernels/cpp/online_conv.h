// Exact convolution of inputs that come one by one: a step of crocuta.ops.online_conv, whose buffers these are.
//
// Inside a block of kBlock tokens each input is added to the later outputs of the block at once. Where a block begins,
// at a place that U divides and 2 U does not, the U inputs before it are carried to the next U outputs: to outputs
// [U, 2 U) of the product of these inputs and the taps [0, 2 U). The product modulo x^U - i (fft.h) with h_1 - i h_0,
// where h_0 and h_1 are the halves of the taps, has them as its real part: of h_0 comes the upper half, times i, and of
// h_1 the lower.

#pragma once

#include <algorithm>

#include "fft.h"
#include "fft_filter.h"

namespace {

constexpr int64_t kBlock = 64;  // BLOCK of crocuta.ops.online_conv

template <typename T>
struct Taps {
  const T* taps;  // [g][k]
  const T* near;  // [kBlock][d]: the first of them, for each channel
  const int64_t* kept;  // [log2 U] addresses of spectra [vectors of channels][U + 9] points, or 0: transform the taps
  int64_t d, g, k, period;
};

template <typename T>
struct Buffers {
  T *wide, *near;  // `wide`: [room], rows `step` apart; `near`: [kBlock][d]
  int64_t step, room;
};

int levels_of(int64_t size) {
  int levels = 0;
  while ((int64_t{1} << levels) < size) ++levels;
  return levels;
}

template <typename T>
void tile_spectrum(const Taps<T>& filter, int64_t size, int64_t vector, T* points) {
  const int64_t used = std::min(filter.k, 2 * size);
  const Rows<T> rows(filter.taps, filter.k, used, vector * kLanes<T>, filter.d, filter.d / filter.g);
  filter_spectrum(plan<T>(size), rows, 1, points);
}

// Carries the inputs before `at`, a multiple of kBlock, to the outputs from it on. run(tasks, work) does work(task) for
// every task, by whatever threads there are.
template <typename T, typename Run>
void tile(const Taps<T>& filter, const Buffers<T>& to, int64_t at, const Run& run) {
  if (at == 0) return;
  const int64_t place = at % filter.period, size = place ? place & -place : filter.period;
  const int64_t begin = (place ? place : filter.period) - size, count = std::min(size, to.room - place);
  const Plan<T>& transforms = plan<T>(size);
  const T* kept = reinterpret_cast<const T*>(filter.kept[levels_of(size)]);
  const int64_t vectors = (filter.d + kLanes<T> - 1) / kLanes<T>, numbers = spaced(size) * kPoint<T>;
  run(vectors, [&](int64_t vector) {
    const int64_t channel = vector * kLanes<T>, lanes = std::min(kLanes<T>, filter.d - channel);
    Scratch<T> memory(kept ? numbers : 2 * numbers);
    T* points = memory + 0;
    const T* h = kept ? kept + vector * numbers : memory + numbers;
    if (!kept) tile_spectrum(filter, size, vector, memory + numbers);
    const T* inputs = to.wide + begin * to.step + channel;
    T* outputs = to.wide + place * to.step + channel;
    transform_real(transforms, points, [&](int64_t t) { return load(inputs + t * to.step, lanes); });
    for (int64_t eighth = 0; eighth < 8; ++eighth)
      for (int64_t n = 0; n < size / 8; ++n) {
        const int64_t f = (eighth * spacing(size) + n) * kPoint<T>;
        const Vec<T> ar = load(points + f), ai = load(points + f + kLanes<T>);
        const Vec<T> br = load(h + f), bi = load(h + f + kLanes<T>);
        store(points + f, ar * br - ai * bi);
        store(points + f + kLanes<T>, ar * bi + ai * br);
      }
    inverse_real(transforms, points, [&](int64_t t, Vec<T> v) {
      if (t >= count) return;
      T* out = outputs + t * to.step;
      store(out, place ? load(out, lanes) + v : v, lanes);  // a full buffer: outputs take the place of the inputs
    });
  });
}

// One token of one row: u and y [d].
template <typename T, typename Run>
void online_step(const Taps<T>& filter, const Buffers<T>& to, int64_t at, const T* u, const T* skip, T* y,
                 const Run& run) {
  const int64_t d = filter.d, place = at % kBlock;
  T* block = to.wide + (at % filter.period - place) * to.step;
  if (place == 0) {
    tile(filter, to, at, run);
    for (int64_t t = 0; t < kBlock; ++t) std::copy(block + t * to.step, block + t * to.step + d, to.near + t * d);
  }
  T* out = to.near + place * d;
  for (int64_t c = 0; c < d; ++c) {
    y[c] = out[c] + (filter.near[c] + (skip ? skip[c] : T(0))) * u[c];
    out[c] = u[c];
  }
  for (int64_t t = 1; t < kBlock - place; ++t) {  // rows follow one another: this is one pass over memory
    T* row = out + t * d;
    const T* h = filter.near + t * d;
    int64_t c = 0;
    for (; c + kLanes<T> <= d; c += kLanes<T>) store(row + c, load<T>(row + c) + load<T>(h + c) * load<T>(u + c));
    for (; c < d; ++c) row[c] += h[c] * u[c];
  }
  if (place == kBlock - 1)
    for (int64_t t = 0; t < kBlock; ++t) std::copy(to.near + t * d, to.near + (t + 1) * d, block + t * to.step);
}

// What does not change from token to token is bound once: addresses and sizes, in this order (Bound of
// crocuta.ops.kernels.online_conv).
enum Bound {
  kLong, kNearRows, kTaps, kNearTaps, kKept, kSkip, kLongRow, kLongStep, kB, kD, kG, kK, kPeriod, kRoom, kThreads
};

// One token of every row: u and y [b][d]; row r has read lengths[r] before, and then one more.
template <typename T, typename Run>
void online_rows(const int64_t* bound, const T* u, int64_t* lengths, T* y, const Run& run) {
  const auto numbers = [&](Bound which) { return reinterpret_cast<T*>(bound[which]); };
  const int64_t d = bound[kD];
  const Taps<T> filter{numbers(kTaps), numbers(kNearTaps), reinterpret_cast<const int64_t*>(bound[kKept]), d,
                       bound[kG], bound[kK], bound[kPeriod]};
  for (int64_t row = 0; row < bound[kB]; ++row) {
    T *wide = numbers(kLong) + row * bound[kLongRow], *near = numbers(kNearRows) + row * kBlock * d;
    online_step<T>(filter, {wide, near, bound[kLongStep], bound[kRoom]}, lengths[row]++, u + row * d, numbers(kSkip),
                   y + row * d, run);
  }
}

}  // namespace
