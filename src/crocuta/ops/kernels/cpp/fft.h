// Convolution modulo x^N - i by fast Fourier transform; lanes are channels. What fft_conv.cpp and online_conv.cpp use.
//
// The product of two real polynomials of degree < N, taken modulo x^N - i, is (its lower half) + i (its upper half):
// nothing wraps around that could not be told apart, so real sequences need no zeros behind them ("right-angle
// convolution"). The transform evaluates at the roots of x^N = i. It halves the polynomial again and again:
//
//     modulo x^2M - c   ->   modulo x^M - w: lo + w hi,   modulo x^M + w: lo - w hi,   w^2 = c,  beginning with c = i
//
// so that w is one number for a whole block ("node") and no input is weighted. Nodes are counted as in a heap: the root
// is 1, the children of q are 2 q and 2 q + 1, and w(2 q + 1) = i w(2 q). Spectra are left in the order of the leaves;
// the inverse begins there (decimation in time) and ends with the weights exp(-i pi n / 2N) of the right angle.
//
// Every product of complex numbers is part of a butterfly a +- w b, done as b' = (1 + i tan) b, a +- cos b': six fused
// multiply-adds. Angles where cos would be 0 are moved by far less than a rounding error (turning_angle).
//
// A point is a vector of real parts and a vector of imaginary parts: 2 kLanes<T> numbers.
#pragma once

#include <atomic>
#include <cmath>

#include "scratch.h"
#include "simd.h"

namespace {

template <typename T>
constexpr int64_t kPoint = 2 * kLanes<T>;

// Points that half of a first-level cache of 48 KiB and more holds, with room for the tables: blocks of so many are
// finished before the next is begun.
constexpr int64_t kNear = 32768 / (2 * CROCUTA_VECTOR_BYTES);

// --- plans ------------------------------------------------------------------------------------------------------

constexpr int kMaxPasses = 12;
constexpr double kPi = 3.14159265358979323846;

struct Angle {
  double tangent, cosine;
};

// Of an angle in (-pi, pi). At right angles cos = 2^-40 stands for 0: a + cos (b + tan i b) then lacks 2^-40 b, and the
// product with tan stays far from infinity. (float64: 2^-70.)
template <typename T>
Angle turning_angle(double angle) {
  constexpr double least = sizeof(T) == 4 ? 1.0 / (1LL << 40) : 1.0 / (1LL << 40) / (1LL << 30);
  const double cosine = std::cos(angle), sine = std::sin(angle);
  if (std::fabs(cosine) < least) return {sine / least, least};
  return {sine / cosine, cosine};
}

// How a transform of `size` points is done, and its constants. Passes go from the root (whole transform) to the leaves.
template <typename T>
struct Plan {
  explicit Plan(int64_t points)
      : size(points), passes(0), nodes(2 * points), weights(2 * points), inverse_tables(2 * points) {
    int levels = 0;
    while ((int64_t{1} << levels) < points) ++levels;
    radix[passes++] = 3;
    for (int left = levels - 6; left > 0; left -= radix[passes++])
      radix[passes] = left == 3 || left > 4 ? 3 : left == 4 ? kSixteen : left;
    radix[passes++] = 3;
    int64_t block = points;
    T* table = inverse_tables.get();
    for (int p = 0; p < passes; ++p) {
      sizes[p] = block;
      block >>= radix[p];
      inverse[p] = table;
      table = fill_inverse(table, block, radix[p]);
    }
    for (int64_t q = 1; q < points; ++q) {
      const Angle angle = turning_angle<T>(node_angle(q));
      nodes.get()[2 * q] = static_cast<T>(angle.tangent);
      nodes.get()[2 * q + 1] = static_cast<T>(angle.cosine);
    }
    const int64_t eighth = points / 8;  // [n][8]: the last pass of the inverse writes n, n + N/8, ..
    for (int64_t n = 0; n < points; ++n) {
      T* to = weights.get() + (n % eighth * 8 + n / eighth) * 2;
      const double angle = kPi * static_cast<double>(n) / static_cast<double>(2 * points);
      to[0] = static_cast<T>(std::cos(angle) / static_cast<double>(points));
      to[1] = static_cast<T>(std::sin(angle) / static_cast<double>(points));
    }
  }

  static constexpr int kSixteen = CROCUTA_REGISTERS == 32 ? 4 : 2;

  int64_t size;
  int passes;
  int radix[kMaxPasses];       // as powers of two
  int64_t sizes[kMaxPasses];   // of the blocks that a pass cuts
  const T* inverse[kMaxPasses];  // [n][radix / 2] pairs (tan, cos), see combine()
  Scratch<T> nodes, weights;   // [q] pairs (tan, cos); [n][8] pairs (cos, sin) / size

 private:
  // The angle of w(q): half of the angle of c, where c(1) = i.
  static double node_angle(int64_t q) {
    if (q == 1) return kPi / 4;
    return node_angle(q / 2) / 2 + (q % 2 ? kPi / 2 : 0);
  }

  static T* fill_inverse(T* to, int64_t part, int levels) {
    for (int64_t n = 0; n < part; ++n)
      for (int level = 0; level < levels; ++level) {
        const int64_t half = int64_t{1} << level, different = half > 1 ? half / 2 : 1;
        for (int64_t j = 0; j < different; ++j) {
          const Angle angle =
              turning_angle<T>(-kPi * static_cast<double>(n + j * part) / static_cast<double>(half * part));
          *to++ = static_cast<T>(angle.tangent);
          *to++ = static_cast<T>(angle.cosine);
        }
      }
    return to;
  }

  Scratch<T> inverse_tables;
};

// The plan for a power of two from 64 on, made when it is first asked for and kept.
template <typename T>
const Plan<T>& plan(int64_t size) {
  static std::atomic<const Plan<T>*> plans[64];
  int levels = 0;
  while ((int64_t{1} << levels) < size) ++levels;
  const Plan<T>* known = plans[levels].load(std::memory_order_acquire);
  if (known) return *known;
  const Plan<T>* made = new Plan<T>(size);
  if (plans[levels].compare_exchange_strong(known, made)) return *made;
  delete made;
  return *known;
}

// --- butterflies ------------------------------------------------------------------------------------------------

// a, b = a + w b, a - w b, where w is (tan, cos) times 1 (turn 0), i (turn 1) or -i (turn -1).
template <typename T>
CROCUTA_INLINE void butterfly(Vec<T>& ar, Vec<T>& ai, Vec<T>& br, Vec<T>& bi, T tangent, T cosine, int turn) {
  using V = Vec<T>;
  const V tr = br - tangent * bi, ti = bi + tangent * br;
  const V re = turn == 0 ? tr : turn > 0 ? -ti : ti, im = turn == 0 ? ti : turn > 0 ? tr : -tr;
  const V scaled_re = cosine * re, scaled_im = cosine * im;
  br = ar - scaled_re;
  bi = ai - scaled_im;
  ar = ar + scaled_re;
  ai = ai + scaled_im;
}

// The same with w = 1 or a turn of it.
template <typename T>
CROCUTA_INLINE void butterfly(Vec<T>& ar, Vec<T>& ai, Vec<T>& br, Vec<T>& bi, int turn) {
  using V = Vec<T>;
  const V r = br, i = bi;
  if (turn == 0) {
    br = ar - r;
    bi = ai - i;
    ar = ar + r;
    ai = ai + i;
  } else {  // -i (r + i i) = i - i r
    br = ar - i;
    bi = ai + r;
    ar = ar + i;
    ai = ai - r;
  }
}

// `Levels` halvings of a node: slots are consecutive parts of its block. First: real slots, at the root.
template <typename T, int Levels, bool Real>
CROCUTA_INLINE void split(Vec<T>* re, Vec<T>* im, int64_t node, const T* nodes) {
  constexpr int R = 1 << Levels;
#pragma GCC unroll 8
  for (int level = 0; level < Levels; ++level) {
    const int half = R >> (level + 1);
#pragma GCC unroll 16
    for (int child = 0; child < (1 << level); ++child) {
      const T* w = nodes + 2 * ((node << level) + (child & ~1));
      const T tangent = w[0], cosine = w[1];
#pragma GCC unroll 16
      for (int j = child * 2 * half; j < child * 2 * half + half; ++j) {
        if (Real && level == 0) {  // w has equal parts
          const Vec<T> both = cosine * re[j + half];
          re[j + half] = re[j] - both;
          im[j + half] = -both;
          re[j] = re[j] + both;
          im[j] = both;
        } else {
          butterfly<T>(re[j], im[j], re[j + half], im[j + half], tangent, cosine, child & 1);
        }
      }
    }
  }
}

// The reverse of split() but for the order of numbers inside a block and a factor: slot j is point n of the j-th of R
// blocks of `part` points, and becomes point n + j part of their union; w = exp(-i pi (n + j part) / (half part)).
template <typename T, int Levels, bool AtZero>
CROCUTA_INLINE void combine(Vec<T>* re, Vec<T>* im, const T* table) {
  constexpr int R = 1 << Levels;
  int offset = 0;
#pragma GCC unroll 8
  for (int level = 0; level < Levels; ++level) {
    const int half = 1 << level, different = half > 1 ? half / 2 : 1;
#pragma GCC unroll 16
    for (int j = 0; j < half; ++j) {
      const int own = offset + j % different, turn = j >= different ? -1 : 0;
#pragma GCC unroll 16
      for (int base = j; base < R; base += 2 * half) {
        const int other = base + half;
        if (AtZero && j % different == 0)
          butterfly<T>(re[base], im[base], re[other], im[other], turn);
        else
          butterfly<T>(re[base], im[base], re[other], im[other], table[2 * own], table[2 * own + 1], turn);
      }
    }
    offset += different;
  }
}

// --- passes -----------------------------------------------------------------------------------------------------

// `count` nodes from `node` on, whose blocks of `size` points follow one another.
template <typename T, int Levels>
void split_pass(T* points, int64_t count, int64_t node, int64_t size, const T* nodes) {
  constexpr int R = 1 << Levels;
  const int64_t part = size >> Levels;
  for (int64_t q = node; q < node + count; ++q, points += size * kPoint<T>)
    for (int64_t n = 0; n < part; ++n) {
      Vec<T> re[R], im[R];
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        re[j] = load(points + (n + j * part) * kPoint<T>);
        im[j] = load(points + (n + j * part) * kPoint<T> + kLanes<T>);
      }
      split<T, Levels, false>(re, im, q, nodes);
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        store(points + (n + j * part) * kPoint<T>, re[j]);
        store(points + (n + j * part) * kPoint<T> + kLanes<T>, im[j]);
      }
    }
}

template <typename T, int Levels, bool AtZero>
CROCUTA_INLINE void combine_pass(T* points, int64_t count, int64_t size, const T* table) {
  constexpr int R = 1 << Levels;
  const int64_t part = size >> Levels;
  for (int64_t q = 0; q < count; ++q, points += size * kPoint<T>)
    for (int64_t n = 0; n < part; ++n) {
      Vec<T> re[R], im[R];
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        re[j] = load(points + (n + j * part) * kPoint<T>);
        im[j] = load(points + (n + j * part) * kPoint<T> + kLanes<T>);
      }
      combine<T, Levels, AtZero>(re, im, table + n * R);
#pragma GCC unroll 16
      for (int j = 0; j < R; ++j) {
        store(points + (n + j * part) * kPoint<T>, re[j]);
        store(points + (n + j * part) * kPoint<T> + kLanes<T>, im[j]);
      }
    }
}

template <typename T>
void split_pass(const Plan<T>& plan, int pass, T* points, int64_t count, int64_t node) {
  switch (plan.radix[pass]) {
    case 1: return split_pass<T, 1>(points, count, node, plan.sizes[pass], plan.nodes.get());
    case 2: return split_pass<T, 2>(points, count, node, plan.sizes[pass], plan.nodes.get());
    case 3: return split_pass<T, 3>(points, count, node, plan.sizes[pass], plan.nodes.get());
    default: return split_pass<T, 4>(points, count, node, plan.sizes[pass], plan.nodes.get());
  }
}

template <typename T>
void combine_pass(const Plan<T>& plan, int pass, T* points, int64_t count) {
  const int64_t size = plan.sizes[pass];
  const T* table = plan.inverse[pass];
  if (pass == plan.passes - 1) return combine_pass<T, 3, true>(points, count, size, table);
  switch (plan.radix[pass]) {
    case 1: return combine_pass<T, 1, false>(points, count, size, table);
    case 2: return combine_pass<T, 2, false>(points, count, size, table);
    case 3: return combine_pass<T, 3, false>(points, count, size, table);
    default: return combine_pass<T, 4, false>(points, count, size, table);
  }
}

// All passes from `pass` on over the block of one node: large blocks are cut, each part is finished while it is near.
template <typename T>
void split_block(const Plan<T>& plan, int pass, T* points, int64_t node) {
  const int64_t size = plan.sizes[pass];
  if (size <= kNear) {
    for (int p = pass; p < plan.passes; ++p) {
      const int64_t count = size / plan.sizes[p];
      split_pass(plan, p, points, count, node * count);
    }
    return;
  }
  split_pass(plan, pass, points, 1, node);
  const int64_t parts = int64_t{1} << plan.radix[pass];
  for (int64_t j = 0; j < parts; ++j)
    split_block(plan, pass + 1, points + j * plan.sizes[pass + 1] * kPoint<T>, node * parts + j);
}

template <typename T>
void combine_block(const Plan<T>& plan, int pass, T* points) {
  const int64_t size = plan.sizes[pass];
  if (size <= kNear) {
    for (int p = plan.passes - 1; p >= pass; --p) combine_pass(plan, p, points, size / plan.sizes[p]);
    return;
  }
  for (int64_t j = 0; j < int64_t{1} << plan.radix[pass]; ++j)
    combine_block(plan, pass + 1, points + j * plan.sizes[pass + 1] * kPoint<T>);
  combine_pass(plan, pass, points, 1);
}

}  // namespace
