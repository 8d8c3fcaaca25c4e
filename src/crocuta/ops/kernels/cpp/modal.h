// Modal filters on one block of time and a few vectors of channels; what modal.cpp and hyena_modal.cpp are made of.
//
//     s[t] = p s[t-1] + u[t],   y[t] = Re sum_n R_n s_n[t] + D u[t]      (complex or real modes)
//
// Modes are done in groups whose poles, residues and states fit the registers; y is added up over the groups. Poles are
// rounded to T, which over many steps would turn and damp by a little too much or too little. So the state carried from
// block to block is mended: s += c s_before with c = p_exact^steps - p^steps, to first order steps e p^(steps-1), where
// e = p_exact - p.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "simd.h"
#include "threads.h"

namespace {

constexpr int64_t kBlock = 64;  // steps between two kept states; crocuta.ops.kernels.modal has the same number

// Rows [n][d] of the filter of each channel; pi, ri and ei are null for real modes.
template <typename T>
struct Modes {
  const T *pr, *pi, *rr, *ri, *er, *ei;
  int64_t n, d;
};

template <typename T>
Modes<T> modes_at(const T* constants, bool complex, int64_t n, int64_t d) {
  const int64_t rows = n * d;
  if (complex) return {constants, constants + rows, constants + 2 * rows, constants + 3 * rows, constants + 4 * rows,
                       constants + 5 * rows, n, d};
  return {constants, nullptr, constants + rows, nullptr, constants + 2 * rows, nullptr, n, d};
}

// Rows of constants, and of sums of gradients without D: (p, R, e) and (p, R), each of one or two parts.
constexpr int64_t parts(bool complex) { return complex ? 2 : 1; }

// How many modes a group has: forward needs 6 (real: 3) registers a mode, backward 12 (real: 6).
template <bool Complex>
constexpr int kForwardModes = (CROCUTA_REGISTERS == 32 ? 4 : 2) * (Complex ? 1 : 2);
template <bool Complex>
constexpr int kBackwardModes = (CROCUTA_REGISTERS == 32 ? 2 : 1) * (Complex ? 1 : 2);

// A row of a state [parts * n][d]: the part of mode m.
CROCUTA_INLINE int64_t state_row(int64_t n, int64_t mode, int part) { return part * n + mode; }

// --- c of a block -----------------------------------------------------------------------------------------------

// c[parts][n][d] for `steps` steps, channels [from, to). Twice the same operations give twice the same bits.
template <typename T, bool Complex>
void block_correction(const Modes<T>& modes, int64_t steps, T* c, int64_t from, int64_t to) {
  for (int64_t m = 0; m < modes.n; ++m)
    for (int64_t ch = from; ch < to; ++ch) {
      const int64_t at = m * modes.d + ch;
      double re = 1, im = 0, sr = modes.pr[at], si = Complex ? modes.pi[at] : 0;
      for (int64_t left = steps - 1; left; left >>= 1) {
        if (left & 1) {
          const double next = re * sr - im * si;
          im = re * si + im * sr;
          re = next;
        }
        const double square = sr * sr - si * si;
        si = 2 * sr * si;
        sr = square;
      }
      const double er = modes.er[at], ei = Complex ? modes.ei[at] : 0;
      c[at] = static_cast<T>(steps * (er * re - ei * im));
      if (Complex) c[modes.n * modes.d + at] = static_cast<T>(steps * (er * im + ei * re));
    }
}

// work(size, first) for groups of G, then 4, 2 and 1 of `count`: sizes that are known to the compiler.
template <int G, typename Work>
CROCUTA_INLINE void in_groups(int64_t count, Work&& work) {
  int64_t first = 0;
  for (; first + G <= count; first += G) work(std::integral_constant<int, G>{}, first);
  if constexpr (G > 1)
    if (first < count) in_groups<G / 2>(count - first, [&](auto size, int64_t more) { work(size, first + more); });
}

// --- forward ----------------------------------------------------------------------------------------------------

// A group of M modes on W vectors of channels: y[t] (+)= ..., the state [parts n][d] moved on in place.
// `lanes` is how many channels the last vector really has; u and y rows have whole vectors.
template <typename T, bool Complex, int M, int W, bool First>
CROCUTA_INLINE void scan_group(const Modes<T>& f, int64_t mode, int64_t ch, int64_t lanes, const T* c, const T* skip,
                               const T* u, int64_t u_stride, T* y, int64_t y_stride, T* state, int64_t steps) {
  constexpr int64_t L = kLanes<T>;
  using V = Vec<T>;
  V pr[M][W], pi[M][W], rr[M][W], ri[M][W], re[M][W], im[M][W], D[W];
  const auto count = [&](int w) { return w == W - 1 ? lanes : L; };
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) {
      const int64_t at = (mode + m) * f.d + ch + w * L, st = state_row(f.n, mode + m, 0) * f.d + ch + w * L;
      pr[m][w] = load(f.pr + at, count(w));
      rr[m][w] = load(f.rr + at, count(w));
      re[m][w] = load(state + st, count(w));
      if (Complex) {
        pi[m][w] = load(f.pi + at, count(w));
        ri[m][w] = load(f.ri + at, count(w));
        im[m][w] = load(state + st + f.n * f.d, count(w));
      }
    }
  for (int w = 0; w < W; ++w) D[w] = First && skip ? load(skip + ch + w * L, count(w)) : V{};
  for (int64_t t = 0; t < steps; ++t) {
    const T* row = u + t * u_stride;
    __builtin_prefetch(row + kBlock * u_stride);
    for (int w = 0; w < W; ++w) {
      const V x = load(row + w * L);
      V sum = First ? D[w] * x : load(y + t * y_stride + w * L);
      for (int m = 0; m < M; ++m) {
        if (Complex) {
          const V next = x + pr[m][w] * re[m][w] - pi[m][w] * im[m][w];
          im[m][w] = pr[m][w] * im[m][w] + pi[m][w] * re[m][w];
          re[m][w] = next;
          sum = sum + rr[m][w] * re[m][w] - ri[m][w] * im[m][w];
        } else {
          re[m][w] = x + pr[m][w] * re[m][w];
          sum = sum + rr[m][w] * re[m][w];
        }
      }
      store(y + t * y_stride + w * L, sum);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int w = 0; w < W; ++w) {
      const int64_t rows = f.n * f.d, at = (mode + m) * f.d + ch + w * L;
      const V cr = load(c + at, count(w)), before = load(state + at, count(w));
      if (Complex) {
        const V ci = load(c + rows + at, count(w)), before_im = load(state + rows + at, count(w));
        store(state + at, re[m][w] + (cr * before - ci * before_im), count(w));
        store(state + rows + at, im[m][w] + (cr * before_im + ci * before), count(w));
      } else {
        store(state + at, re[m][w] + cr * before, count(w));
      }
    }
}

// All modes of W vectors of channels.
template <typename T, bool Complex, int W>
void scan_block(const Modes<T>& f, int64_t ch, int64_t lanes, const T* c, const T* skip, const T* u, int64_t us, T* y,
                int64_t ys, T* state, int64_t steps) {
  in_groups<kForwardModes<Complex> / W>(f.n, [&](auto size, int64_t mode) {
    constexpr int M = decltype(size)::value;
    if (mode == 0)
      scan_group<T, Complex, M, W, true>(f, mode, ch, lanes, c, skip, u, us, y, ys, state, steps);
    else
      scan_group<T, Complex, M, W, false>(f, mode, ch, lanes, c, skip, u, us, y, ys, state, steps);
  });
}

// --- backward ---------------------------------------------------------------------------------------------------

// Sums of one vector of channels over a block, added to doubles [..][d].
template <typename T>
CROCUTA_INLINE void add_sum(double* to, Vec<T> value, int64_t lanes) {
  T each[kLanes<T>];
  store(each, value);
  for (int64_t i = 0; i < lanes; ++i) to[i] += static_cast<double>(each[i]);
}

// The states of M modes on one vector of channels again: kept[t * stride ..] is the state before step t, from `start`
// [parts n][d] on. Where y is asked for (rows of whole vectors), it is made again as well.
template <typename T, bool Complex, int M, bool First, bool Outputs>
CROCUTA_INLINE void scan_again(const Modes<T>& f, int64_t mode, int64_t ch, int64_t lanes, const T* skip, const T* u,
                               int64_t us, const T* start, T* y, Vec<T>* kept, int64_t stride, int64_t steps) {
  using V = Vec<T>;
  constexpr int P = Complex ? 2 : 1;
  V pr[M], pi[M], rr[M], ri[M], sr[M], si[M];
  const V D = First && Outputs && skip ? load(skip + ch, lanes) : V{};
  for (int m = 0; m < M; ++m) {
    const int64_t at = (mode + m) * f.d + ch;
    pr[m] = load(f.pr + at, lanes);
    sr[m] = kept[m * P] = load(start + at, lanes);
    if (Outputs) rr[m] = load(f.rr + at, lanes);
    if (Complex) {
      pi[m] = load(f.pi + at, lanes);
      si[m] = kept[m * P + 1] = load(start + f.n * f.d + at, lanes);
      if (Outputs) ri[m] = load(f.ri + at, lanes);
    }
  }
  for (int64_t t = 0; t < steps; ++t) {
    const V x = load(u + t * us);
    V* here = kept + (t + 1) * stride;
    V out = !Outputs ? V{} : First ? D * x : load(y + t * kLanes<T>);
    for (int m = 0; m < M; ++m) {
      if (Complex) {
        const V next = x + pr[m] * sr[m] - pi[m] * si[m];
        si[m] = pr[m] * si[m] + pi[m] * sr[m];
        sr[m] = next;
        here[m * P + 1] = si[m];
        if (Outputs) out = out + rr[m] * sr[m] - ri[m] * si[m];
      } else {
        sr[m] = x + pr[m] * sr[m];
        if (Outputs) out = out + rr[m] * sr[m];
      }
      here[m * P] = sr[m];
    }
    if (Outputs) store(y + t * kLanes<T>, out);
  }
}

// The adjoint of M modes on one vector of channels, whose states are `kept` (scan_again). `carry` is the adjoint of
// the state after the block, replaced by that of the state before it. `sums` [2 parts n][d]: of p, then of R;
// `sum_skip` of D.
template <typename T, bool Complex, int M, bool First>
CROCUTA_INLINE void scan_group_adjoint(const Modes<T>& f, int64_t mode, int64_t ch, int64_t lanes, const T* c,
                                       const T* skip, const T* u, int64_t us, const T* dy, int64_t dys, T* du,
                                       int64_t dus, T* carry, double* sums, double* sum_skip, const Vec<T>* kept,
                                       int64_t stride, int64_t steps) {
  using V = Vec<T>;
  constexpr int P = Complex ? 2 : 1;
  const int64_t rows = f.n * f.d;
  V pr[M], pi[M], rr[M], ri[M], sr[M], si[M];
  const V D = First && skip ? load(skip + ch, lanes) : V{};
  for (int m = 0; m < M; ++m) {
    const int64_t at = (mode + m) * f.d + ch;
    pr[m] = load(f.pr + at, lanes);
    rr[m] = load(f.rr + at, lanes);
    sr[m] = kept[steps * stride + m * P];
    if (Complex) {
      pi[m] = load(f.pi + at, lanes);
      ri[m] = load(f.ri + at, lanes);
      si[m] = kept[steps * stride + m * P + 1];
    }
  }
  V gr[M], gi[M], dpr[M], dpi[M], drr[M], dri[M], dD = {};
  for (int m = 0; m < M; ++m) {
    const int64_t at = (mode + m) * f.d + ch;
    gr[m] = load(carry + at, lanes);
    dpr[m] = drr[m] = V{};
    if (Complex) {
      gi[m] = load(carry + rows + at, lanes);
      dpi[m] = dri[m] = V{};
    }
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const V e = load(dy + t * dys);
    const V* before = kept + t * stride;
    V sum = First ? D * e : load(du + t * dus);
    if (First) dD = dD + e * load(u + t * us);
    for (int m = 0; m < M; ++m) {
      const V br = before[m * P];
      drr[m] = drr[m] + e * sr[m];
      V ar = gr[m] + rr[m] * e;
      sum = sum + ar;
      if (Complex) {
        const V bi = before[m * P + 1];
        dri[m] = dri[m] - e * si[m];
        const V ai = gi[m] - ri[m] * e;
        dpr[m] = dpr[m] + ar * br + ai * bi;
        dpi[m] = dpi[m] - ar * bi + ai * br;
        gr[m] = pr[m] * ar + pi[m] * ai;
        gi[m] = pr[m] * ai - pi[m] * ar;
        si[m] = bi;
      } else {
        dpr[m] = dpr[m] + ar * br;
        gr[m] = pr[m] * ar;
      }
      sr[m] = br;
    }
    store(du + t * dus, sum);
  }
  if (First) add_sum<T>(sum_skip + ch, dD, lanes);
  for (int m = 0; m < M; ++m) {
    const int64_t at = (mode + m) * f.d + ch;
    const V cr = load(c + at, lanes), ar = load(carry + at, lanes);
    add_sum<T>(sums + at, dpr[m], lanes);
    if (Complex) {
      const V ci = load(c + rows + at, lanes), ai = load(carry + rows + at, lanes);
      store(carry + at, gr[m] + (cr * ar + ci * ai), lanes);
      store(carry + rows + at, gi[m] + (cr * ai - ci * ar), lanes);
      add_sum<T>(sums + rows + at, dpi[m], lanes);
      add_sum<T>(sums + 2 * rows + at, drr[m], lanes);
      add_sum<T>(sums + 3 * rows + at, dri[m], lanes);
    } else {
      store(carry + at, gr[m] + cr * ar, lanes);
      add_sum<T>(sums + rows + at, drr[m], lanes);
    }
  }
}

// Modes whose states are made again at a time: more than have their adjoint at a time, to fill the adders.
template <bool Complex>
constexpr int kAgainModes = 2 * kBackwardModes<Complex>;

template <typename T, bool Complex>
constexpr int64_t kKeptVectors = (kBlock + 1) * kAgainModes<Complex> * (Complex ? 2 : 1);

// All modes of one vector of channels; `kept` has room for kKeptVectors.
template <typename T, bool Complex, bool Outputs>
void scan_block_adjoint(const Modes<T>& f, int64_t ch, int64_t lanes, const T* c, const T* skip, const T* u, int64_t us,
                        const T* dy, int64_t dys, T* du, int64_t dus, const T* start, T* carry, double* sums,
                        double* sum_skip, T* y, Vec<T>* kept, int64_t steps) {
  constexpr int A = kAgainModes<Complex>, G = kBackwardModes<Complex>, P = Complex ? 2 : 1;
  for (int64_t mode = 0, count; mode < f.n; mode += count) {
    count = std::min<int64_t>(A, f.n - mode);
    const int64_t stride = count * P;
    in_groups<A>(count, [&](auto size, int64_t first) {
      constexpr int M = decltype(size)::value;
      const auto again = [&](auto is_first) {
        scan_again<T, Complex, M, decltype(is_first)::value, Outputs>(f, mode + first, ch, lanes, skip, u, us, start, y,
                                                                      kept + first * P, stride, steps);
      };
      mode + first ? again(std::false_type{}) : again(std::true_type{});
    });
    in_groups<G>(count, [&](auto size, int64_t first) {
      constexpr int M = decltype(size)::value;
      const auto adjoint = [&](auto is_first) {
        scan_group_adjoint<T, Complex, M, decltype(is_first)::value>(f, mode + first, ch, lanes, c, skip, u, us, dy,
                                                                     dys, du, dus, carry, sums, sum_skip,
                                                                     kept + first * P, stride, steps);
      };
      mode + first ? adjoint(std::false_type{}) : adjoint(std::true_type{});
    });
  }
}

// --- walks over the blocks of a sequence ------------------------------------------------------------------------

// What forward and backward share: sizes, the corrections of a whole block, and the work of a task, which is one row
// and kChannels channels.
template <typename T, bool Complex>
class ModalWalk {
 public:
  // Channels a task does: a row of them is a few cache lines, and there is work for many threads.
  static constexpr int64_t kChannels = 256;

  ModalWalk(const T* constants, const int64_t* lengths, int64_t b, int64_t l, int64_t d, int64_t n, int64_t threads)
      : modes(modes_at(constants, Complex, n, d)),
        size(parts(Complex) * n * d),
        blocks_((l + kBlock - 1) / kBlock),
        b_(b),
        l_(l),
        d_(d),
        threads_(threads),
        lengths_(lengths),
        whole_(new T[static_cast<size_t>(size)]) {
    if (l < kBlock) return;
    parallel(threads, chunks(), [&](int64_t chunk) {
      block_correction<T, Complex>(modes, kBlock, whole_.get(), chunk * kChannels, end(chunk));
    });
  }

  // work(row, from, to) for every row and its channels.
  template <typename Work>
  void tasks(Work&& work) const {
    parallel(threads_, b_ * chunks(), [&](int64_t task) {
      const int64_t chunk = task % chunks();
      work(task / chunks(), chunk * kChannels, end(chunk));
    });
  }

  // last = state or 0; then for every block: the state is kept, block(start, steps, c) moves it on. `idle(start, count)`
  // is for steps behind the end of the row.
  template <typename Block, typename Idle>
  void forwards(int64_t row, int64_t from, int64_t to, const T* state, T* last, T* kept, Block&& block,
                Idle&& idle) const {
    copy(last + row * size, state ? state + row * size : nullptr, from, to);
    walk(row, from, to, [&](int64_t i, int64_t start, int64_t steps, const T* c) {
      if (kept) copy(kept + (row * blocks_ + i) * size, last + row * size, from, to);
      if (steps) block(start, steps, c);
      idle(start + steps, std::min(kBlock, l_ - start) - steps);
    });
  }

  // dstate = dlast or 0; then for every block from the last to the first: block(start, steps, c, state before it).
  template <typename Block, typename Idle>
  void backwards(int64_t row, int64_t from, int64_t to, const T* kept, const T* dlast, T* dstate, Block&& block,
                 Idle&& idle) const {
    copy(dstate + row * size, dlast ? dlast + row * size : nullptr, from, to);
    walk<true>(row, from, to, [&](int64_t i, int64_t start, int64_t steps, const T* c) {
      idle(start + steps, std::min(kBlock, l_ - start) - steps);
      if (steps) block(start, steps, c, kept + (row * blocks_ + i) * size);
    });
  }

  const Modes<T> modes;
  const int64_t size;  // of a state [parts n][d]

 private:
  int64_t chunks() const { return (d_ + kChannels - 1) / kChannels; }
  int64_t end(int64_t chunk) const { return std::min(d_, (chunk + 1) * kChannels); }

  void copy(T* to_rows, const T* from_rows, int64_t from, int64_t to) const {
    for (int64_t r = 0; r < size; r += d_)
      for (int64_t ch = from; ch < to; ++ch) to_rows[r + ch] = from_rows ? from_rows[r + ch] : T(0);
  }

  template <bool Backwards = false, typename Body>
  void walk(int64_t row, int64_t from, int64_t to, Body&& body) const {
    const int64_t length = lengths_ ? std::max<int64_t>(0, std::min(l_, lengths_[row])) : l_;
    std::unique_ptr<T[]> partial;  // c of the only block that is not whole
    for (int64_t k = 0; k < blocks_; ++k) {
      const int64_t i = Backwards ? blocks_ - 1 - k : k, start = i * kBlock;
      const int64_t steps = std::max<int64_t>(0, std::min(kBlock, length - start));
      if (steps && steps != kBlock) {
        partial.reset(new T[static_cast<size_t>(size)]);
        block_correction<T, Complex>(modes, steps, partial.get(), from, to);
      }
      body(i, start, steps, steps == kBlock ? whole_.get() : partial.get());
    }
  }

  const int64_t blocks_, b_, l_, d_, threads_;
  const int64_t* lengths_;
  const std::unique_ptr<T[]> whole_;
};

// `count` rows of zeros in channels [from, to) of y [.. d].
template <typename T>
void clear_rows(T* y, int64_t d, int64_t from, int64_t to, int64_t count) {
  for (int64_t t = 0; t < count; ++t) std::fill(y + t * d + from, y + t * d + to, T(0));
}

// How many vectors of channels are scanned together: two where one has too few modes to keep the adders busy.
template <typename T, bool Complex>
bool scan_two(int64_t n) {
  return kForwardModes<Complex> >= 4 && n * parts(Complex) <= 4;
}

}  // namespace
