// Causal depthwise filters on a block of time and one vector of channels; what fir.cpp and the fused Hyena operators
// are made of.
//
//     y[t] = bias + sum_j taps[j] x[t-j],      x[t] for t < 0 from the tail, or 0
//
// A block needs no state, only the k - 1 inputs before it, which it reads itself: blocks can be done in any order and
// on any thread with the same bits. 3, 4 and 7 taps stay in registers.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "simd.h"

namespace {

constexpr int64_t kFirShort = 8;  // up to so many taps a filter is short
constexpr int64_t kFirSteps = 16;  // steps that are copied at once where inputs cannot be read in place

// One row of a batch: its inputs, and the k - 1 before them, oldest first, or null for zeros.
template <typename T>
struct FirInputs {
  const T* rows;
  int64_t step;
  const T* tail;
  int64_t tail_step;
};

// taps [k][channels] (fir_pack_taps) and bias [channels] or null.
template <typename T>
struct FirFilter {
  const T *taps, *bias;
  int64_t k, channels;
};

// [groups][k] to [k][channels].
template <typename T>
void fir_pack_taps(const T* taps, int64_t groups, int64_t k, int64_t channels, T* packed) {
  const int64_t each = groups ? channels / groups : 0;
  for (int64_t ch = 0; ch < channels; ++ch)
    for (int64_t j = 0; j < k; ++j) packed[j * channels + ch] = taps[ch / each * k + j];
}

// Times [from, to) of one vector of channels as whole vectors, zeros in lanes that are not there.
template <typename T>
void fir_pack(const FirInputs<T>& in, int64_t k, int64_t ch, int64_t lanes, int64_t from, int64_t to, T* packed) {
  for (int64_t t = from; t < to; ++t, packed += kLanes<T>) {
    const T* at = t >= 0 ? in.rows + t * in.step : in.tail ? in.tail + (k - 1 + t) * in.tail_step : nullptr;
    store(packed, at ? load(at + ch, lanes) : Vec<T>{});
  }
}

// Room for kFirSteps inputs and the k - 1 before them, `count` times; on the stack for short filters.
template <typename T>
struct FirScratch {
  FirScratch(int64_t k, int64_t count) : room((kFirSteps + k - 1) * kLanes<T>) {
    if (k > kFirShort) many.reset(new T[static_cast<size_t>(count * room)]);
  }
  T* at(int64_t index) { return (many ? many.get() : few) + index * room; }

  const int64_t room;

 private:
  std::unique_ptr<T[]> many;
  alignas(64) T few[3 * (kFirSteps + kFirShort - 1) * kLanes<T>];
};

// Calls work(std::integral_constant<int, K>) with K = k for the filters that models have, else with 0: any number.
template <typename Work>
CROCUTA_INLINE void fir_with_taps(int64_t k, Work&& work) {
  switch (k) {
    case 3: return work(std::integral_constant<int, 3>{});
    case 4: return work(std::integral_constant<int, 4>{});
    case 7: return work(std::integral_constant<int, 7>{});
    default: return work(std::integral_constant<int, 0>{});
  }
}

// --- forward ----------------------------------------------------------------------------------------------------

// Taps and bias of one vector of channels in registers, and the last K - 1 inputs; K = 0: any number, not kept.
template <typename T, int K>
struct FirWindow {
  Vec<T> h[K ? K : 1], x[K > 1 ? K - 1 : 1], bias;
  const T *taps, *from;  // for K = 0; `from` is the oldest input of the next step
  int64_t lanes, k, channels, step;

  // `from` is the input at t0 - (k - 1).
  CROCUTA_INLINE FirWindow(const FirFilter<T>& f, int64_t ch, int64_t lanes, const T* from, int64_t step)
      : taps(f.taps + ch), from(from), lanes(lanes), k(f.k), channels(f.channels), step(step) {
    bias = f.bias ? load(f.bias + ch, lanes) : Vec<T>{};
    for (int j = 0; j < K; ++j) h[j] = load(taps + j * channels, lanes);
    for (int j = 0; j < K - 1; ++j) x[K - 2 - j] = load(from + j * step);
  }

  // The outputs of the next R steps; every one is summed in the same order.
  template <int R>
  CROCUTA_INLINE void next(Vec<T> (&y)[R]) {
    if constexpr (K == 0) {
      for (int i = 0; i < R; ++i) y[i] = bias;
      for (int64_t j = 0; j < k; ++j) {
        const Vec<T> tap = load(taps + j * channels, lanes);
        for (int i = 0; i < R; ++i) y[i] = y[i] + tap * load(from + (i + k - 1 - j) * step);
      }
    } else {
      for (int i = 0; i < R; ++i) {
        const Vec<T> newest = load(from + (i + K - 1) * step);
        y[i] = bias + h[0] * newest;
        for (int j = 1; j < K; ++j) y[i] = y[i] + h[j] * x[j - 1];
        for (int j = K - 2; j > 0; --j) x[j] = x[j - 1];
        x[0] = newest;
      }
    }
    from += R * step;
  }
};

// Which thirds of FIR(z) are wanted: x2, or x1 and v, or all.
enum FirThirds { kFirst = 1, kRest = 2, kAll = 3 };

// `from` is the first third's input at t0 - (k - 1), the others' `third` and 2 `third` behind it.
template <typename T, int K, int Wanted, typename Sink>
CROCUTA_INLINE void fir_thirds_steps(const FirFilter<T>& f, int64_t ch, int64_t lanes, const T* from, int64_t third,
                                     int64_t step, int64_t n, Sink&& sink) {
  constexpr int R = 4;
  const int64_t d = f.channels / 3;
  FirWindow<T, K> a(f, ch, lanes, from, step), b(f, d + ch, lanes, from + third, step),
      c(f, 2 * d + ch, lanes, from + 2 * third, step);
  const auto steps = [&](auto count, int64_t t) {
    constexpr int N = decltype(count)::value;
    Vec<T> x2[N] = {}, x1[N] = {}, v[N] = {};
    if (Wanted & kFirst) a.next(x2);
    if (Wanted & kRest) {
      b.next(x1);
      c.next(v);
    }
    for (int i = 0; i < N; ++i) sink(t + i, x2[i], x1[i], v[i]);
  };
  int64_t t = 0;
  for (; t + R <= n; t += R) steps(std::integral_constant<int, R>{}, t);
  for (; t < n; ++t) steps(std::integral_constant<int, 1>{}, t);
}

// Calls sink(i, x2, x1, v) for the times t0 + i, 0 <= i < n, of channels [ch, ch + lanes) of a third; (x2, x1, v) are
// the thirds of FIR(z) + bias over f.channels = 3 d channels, zeros where they are not wanted.
template <typename T, int Wanted, typename Sink>
void fir_thirds(const FirFilter<T>& f, const FirInputs<T>& z, int64_t ch, int64_t lanes, int64_t t0, int64_t n,
                Sink&& sink) {
  const int64_t d = f.channels / 3;
  const auto run = [&](const T* from, int64_t third, int64_t step, int64_t first, int64_t steps) {
    fir_with_taps(f.k, [&](auto taps) {
      fir_thirds_steps<T, decltype(taps)::value, Wanted>(
          f, ch, lanes, from, third, step, steps,
          [=](int64_t i, Vec<T> x2, Vec<T> x1, Vec<T> v) { sink(first + i, x2, x1, v); });
    });
  };
  if (lanes == kLanes<T> && t0 >= f.k - 1) return run(z.rows + (t0 - (f.k - 1)) * z.step + ch, d, z.step, 0, n);
  FirScratch<T> packed(f.k, 3);
  for (int64_t t = 0; t < n; t += kFirSteps) {
    const int64_t steps = std::min(kFirSteps, n - t);
    for (int part = 0; part < 3; ++part)
      fir_pack(z, f.k, part * d + ch, lanes, t0 + t - (f.k - 1), t0 + t + steps, packed.at(part));
    run(packed.at(0), packed.room, kLanes<T>, t, steps);
  }
}

// Where the results of a block go: rows of `step` values, whole vectors each. Either pair, x2 and u or x1 and v, may be
// null.
template <typename T>
struct FirGateOutputs {
  T *x2, *u, *x1, *v;
  int64_t step;
};

// x2 and u = x1 v, or x1 and v, or all, at times [t0, t0 + n) of channels [ch, ch + lanes) of a third.
template <typename T>
void fir_gate_block(const FirFilter<T>& f, const FirInputs<T>& z, int64_t ch, int64_t lanes, int64_t t0, int64_t n,
                    const FirGateOutputs<T>& out) {
  const auto gated = [&](int64_t i, Vec<T> x2, Vec<T> x1, Vec<T> v) {
    store(out.x2 + i * out.step, x2);
    store(out.u + i * out.step, x1 * v);
  };
  const auto operands = [&](int64_t i, Vec<T>, Vec<T> x1, Vec<T> v) {
    store(out.x1 + i * out.step, x1);
    store(out.v + i * out.step, v);
  };
  const auto all = [&](int64_t i, Vec<T> x2, Vec<T> x1, Vec<T> v) {
    gated(i, x2, x1, v);
    operands(i, x2, x1, v);
  };
  if (!out.x1) fir_thirds<T, kAll>(f, z, ch, lanes, t0, n, gated);
  else if (!out.x2) fir_thirds<T, kRest>(f, z, ch, lanes, t0, n, operands);
  else fir_thirds<T, kAll>(f, z, ch, lanes, t0, n, all);
}

// y at times [t0, t0 + n) of channels [ch, ch + lanes), rows of y_step values.
template <typename T>
void fir_block(const FirFilter<T>& f, const FirInputs<T>& x, int64_t ch, int64_t lanes, int64_t t0, int64_t n, T* y,
               int64_t y_step) {
  const auto run = [&](const T* from, int64_t step, int64_t steps, T* to) {
    fir_with_taps(f.k, [&](auto taps) {
      constexpr int R = 4;
      FirWindow<T, decltype(taps)::value> window(f, ch, lanes, from, step);
      int64_t t = 0;
      for (Vec<T> out[R]; t + R <= steps; t += R) {
        window.next(out);
        for (int i = 0; i < R; ++i) store(to + (t + i) * y_step, out[i], lanes);
      }
      for (Vec<T> out[1]; t < steps; ++t) {
        window.next(out);
        store(to + t * y_step, out[0], lanes);
      }
    });
  };
  if (lanes == kLanes<T> && t0 >= f.k - 1) return run(x.rows + (t0 - (f.k - 1)) * x.step + ch, x.step, n, y);
  FirScratch<T> packed(f.k, 1);
  for (int64_t t = 0; t < n; t += kFirSteps) {
    const int64_t steps = std::min(kFirSteps, n - t);
    fir_pack(x, f.k, ch, lanes, t0 + t - (f.k - 1), t0 + t + steps, packed.at(0));
    run(packed.at(0), kLanes<T>, steps, y + t * y_step);
  }
}

// --- backward ---------------------------------------------------------------------------------------------------
//
// With dx[s] = sum_j taps[j] dy[s+j] and dtaps[j] = sum_s x[s] dy[s+j], a block of inputs [t0, t0 + n) needs nothing
// but the k - 1 gradients dy behind it. Sums over a block are added to doubles.

// One vector, added to doubles.
template <typename T>
CROCUTA_INLINE void fir_add(double* to, Vec<T> value, int64_t lanes) {
  T each[kLanes<T>];
  store(each, value);
  for (int64_t i = 0; i < lanes; ++i) to[i] += static_cast<double>(each[i]);
}

// dx and the sums of the taps [k][channels] from n inputs x and the n + k - 1 gradients dy that begin at their time.
template <typename T, int K, bool Full, bool Far>
void fir_adjoint_unrolled(const FirFilter<T>& f, int64_t ch, int64_t lanes, const T* dy, int64_t dy_step, const T* x,
                          int64_t x_step, int64_t n, T* dx, int64_t dx_step, double* sums) {
  const int64_t count = Full ? kLanes<T> : lanes;
  Vec<T> h[K], sum[K] = {}, window[K];  // the gradients at s + j
  for (int j = 0; j < K; ++j) h[j] = load(f.taps + j * f.channels + ch, count);
  for (int j = 1; j < K; ++j) window[j] = load(dy + (j - 1) * dy_step, count);
  const auto step = [&](int64_t s) {
    for (int j = 0; j < K - 1; ++j) window[j] = window[j + 1];
    window[K - 1] = load(dy + (s + K - 1) * dy_step, count);
    const Vec<T> input = load(x + s * x_step, count);
    Vec<T> total = h[0] * window[0];
    for (int j = 1; j < K; ++j) total = total + h[j] * window[j];
    for (int j = 0; j < K; ++j) sum[j] = sum[j] + input * window[j];
    if (Far) store_far(dx + s * dx_step, total);
    else store(dx + s * dx_step, total, count);
  };
  int64_t s = 0;
  for (; s + 4 <= n; s += 4)
    for (int i = 0; i < 4; ++i) step(s + i);
  for (; s < n; ++s) step(s);
  for (int j = 0; j < K; ++j) fir_add<T>(sums + j * f.channels + ch, sum[j], count);
}

// The same for any number of taps.
template <typename T>
void fir_adjoint_any(const FirFilter<T>& f, int64_t ch, int64_t lanes, const T* dy, int64_t dy_step, const T* x,
                     int64_t x_step, int64_t n, T* dx, int64_t dx_step, double* sums) {
  for (int64_t s = 0; s < n; ++s) {
    Vec<T> total = {};
    for (int64_t j = 0; j < f.k; ++j)
      total = total + load(f.taps + j * f.channels + ch, lanes) * load(dy + (s + j) * dy_step, lanes);
    store(dx + s * dx_step, total, lanes);
  }
  for (int64_t j = 0; j < f.k; ++j) {
    Vec<T> sum = {};
    for (int64_t s = 0; s < n; ++s) sum = sum + load(x + s * x_step, lanes) * load(dy + (s + j) * dy_step, lanes);
    fir_add<T>(sums + j * f.channels + ch, sum, lanes);
  }
}

template <typename T>
void fir_adjoint_steps(const FirFilter<T>& f, int64_t ch, int64_t lanes, const T* dy, int64_t dy_step, const T* x,
                       int64_t x_step, int64_t n, T* dx, int64_t dx_step, double* sums, bool far = false) {
  fir_with_taps(f.k, [&](auto taps) {
    constexpr int K = decltype(taps)::value;
    if constexpr (K == 0)
      fir_adjoint_any<T>(f, ch, lanes, dy, dy_step, x, x_step, n, dx, dx_step, sums);
    else if (lanes < kLanes<T>)
      fir_adjoint_unrolled<T, K, false, false>(f, ch, lanes, dy, dy_step, x, x_step, n, dx, dx_step, sums);
    else if (far)
      fir_adjoint_unrolled<T, K, true, true>(f, ch, lanes, dy, dy_step, x, x_step, n, dx, dx_step, sums);
    else
      fir_adjoint_unrolled<T, K, true, false>(f, ch, lanes, dy, dy_step, x, x_step, n, dx, dx_step, sums);
  });
}

// What a filter of `channels` leads back to: dx and dtail like the inputs; sums [k + 1][channels] of the taps and, in
// the last row, of the bias. dtail may be null. `far`: dx is written past the caches (writes_far).
template <typename T>
struct FirGradients {
  T* dx;
  int64_t dx_step;
  T* dtail;
  int64_t dtail_step;
  double* sums;
  bool far = false;
};

// The adjoint of y = FIR(x) + bias at the inputs [t0, t0 + n) of channels [ch, ch + lanes). dy has the gradients at
// [t0, t0 + n + k - 1), zeros past the end of the sequence; lanes that are not there are not read. The block at t0 = 0
// does the tail also. Blocks of some hundred steps at most: their sums are added up in T.
template <typename T>
void fir_adjoint_block(const FirFilter<T>& f, const FirInputs<T>& x, int64_t ch, int64_t lanes, int64_t t0, int64_t n,
                       const T* dy, int64_t dy_step, const FirGradients<T>& to) {
  fir_adjoint_steps<T>(f, ch, lanes, dy, dy_step, x.rows + t0 * x.step + ch, x.step, n, to.dx + t0 * to.dx_step + ch,
                       to.dx_step, to.sums, to.far);
  Vec<T> sum = {};
  for (int64_t t = 0; t < n; ++t) sum = sum + load(dy + t * dy_step, lanes);
  fir_add<T>(to.sums + f.k * f.channels + ch, sum, lanes);
  const int64_t past = f.k - 1;
  if (t0 || !past || !x.tail) return;
  constexpr int64_t L = kLanes<T>;
  const std::unique_ptr<T[]> room(new T[static_cast<size_t>(3 * past * L)]());
  T *before = room.get(), *unused = before + 2 * past * L;  // dy at [-past, past), zeros for t < 0
  for (int64_t t = 0; t < past; ++t) store(before + (past + t) * L, load(dy + t * dy_step, lanes));
  fir_adjoint_steps<T>(f, ch, lanes, before, L, x.tail + ch, x.tail_step, past, to.dtail ? to.dtail + ch : unused,
                       to.dtail ? to.dtail_step : L, to.sums);
}

// The adjoint of FIR(z) + bias for the three thirds of a block: `dy` are the gradients of x2, `third` values behind
// them those of x1, and as far again those of v; rows as for fir_adjoint_block.
template <typename T>
void fir_gate_adjoint_block(const FirFilter<T>& f, const FirInputs<T>& z, int64_t ch, int64_t lanes, int64_t t0,
                            int64_t n, const T* dy, int64_t third, int64_t dy_step, const FirGradients<T>& to) {
  for (int part = 0; part < 3; ++part)
    fir_adjoint_block<T>(f, z, part * (f.channels / 3) + ch, lanes, t0, n, dy + part * third, dy_step, to);
}

// --- medium filters ----------------------------------------------------------------------------------------------

// R outputs at once, so that one tap is read for R products; every output is summed in the same order.
template <typename T, int R>
CROCUTA_INLINE void fir_correlate_tile(const T* taps, int64_t k, const T* in, T* out, Vec<T> bias) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> sum[R];
  for (int i = 0; i < R; ++i) sum[i] = bias;
  for (int64_t j = 0; j < k; ++j, in += L) {
    const Vec<T> tap = load(taps + j * L);
    for (int i = 0; i < R; ++i) sum[i] = sum[i] + tap * load(in + i * L);
  }
  for (int i = 0; i < R; ++i) store(out + i * L, sum[i]);
}

// out[i] = bias + sum_{j < k} taps[j] in[i + j] for i < n; everything whole vectors, one behind the other, aligned. A
// filter is one with its taps reversed; its adjoint one with its taps; and the gradients of the taps are those of the
// outputs' with the inputs as taps.
template <typename T>
void fir_correlate(const T* taps, int64_t k, const T* in, int64_t n, T* out, Vec<T> bias) {
  constexpr int64_t L = kLanes<T>;
  constexpr int R = 12;
  int64_t i = 0;
  for (; i + R <= n; i += R) fir_correlate_tile<T, R>(taps, k, in + i * L, out + i * L, bias);
  for (; i + 4 <= n; i += 4) fir_correlate_tile<T, 4>(taps, k, in + i * L, out + i * L, bias);
  for (; i < n; ++i) fir_correlate_tile<T, 1>(taps, k, in + i * L, out + i * L, bias);
}

}  // namespace
