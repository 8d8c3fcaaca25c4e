// One token of what stands between the matrices: norms, short and long FIR filters, modal filters, attention.
//
// Buffers are [rows][channels]; lanes are channels. A row of a FIR's state has the last inputs, oldest first, and taps
// are stored in that order, one row of channels a tap, with the current input's last.
#pragma once

#include <algorithm>
#include <cmath>

#include "activation.h"
#include "decode_team.h"

namespace {

constexpr int64_t kPiece = 256;  // channels of one task

// work(row, from, to) for pieces of the channels of every row.
template <typename Work>
void over_channels(Team& team, int64_t rows, int64_t channels, const Work& work) {
  const int64_t pieces = (channels + kPiece - 1) / kPiece;
  team.run(rows * pieces, [&](int64_t task) {
    const int64_t from = task % pieces * kPiece;
    work(task / pieces, from, std::min(channels, from + kPiece));
  });
}

template <typename T>
double lane_sum(Vec<T> v) {
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += v[lane];
  return sum;
}

// --- norms --------------------------------------------------------------------------------------------------------

// The numbers are those of crocuta.ops.kernels.decode.
enum Norm : int64_t { kRmsInside, kRmsOutside, kLayerNorm };

// The sum over x of (x - mean)^2, or of x; the d of a row are few enough for sums in T, a lane each.
template <typename T, bool Square>
double row_sum(const T* x, int64_t d, T mean) {
  Vec<T> sum[2] = {};
  int64_t i = 0;
  double rest = 0;
  for (; i + 2 * kLanes<T> <= d; i += 2 * kLanes<T>)
    for (int64_t half = 0; half < 2; ++half) {
      const Vec<T> v = load(x + i + half * kLanes<T>) - mean;
      sum[half] = sum[half] + (Square ? v * v : v);
    }
  for (; i < d; ++i) {
    const double v = x[i] - mean;
    rest += Square ? v * v : v;
  }
  return rest + lane_sum<T>(sum[0] + sum[1]);
}

template <typename T>
void norm(Team& team, int64_t kind, const T* scale, const T* bias, double eps, const T* x, T* y, int64_t rows,
          int64_t d) {
  team.run(rows, [&](int64_t row) {
    const T* in = x + row * d;
    T* out = y + row * d;
    const double n = static_cast<double>(d), mean = kind == kLayerNorm ? row_sum<T, false>(in, d, T(0)) / n : 0;
    const double square = row_sum<T, true>(in, d, static_cast<T>(mean)) / n;
    const T factor = static_cast<T>(1 / (kind == kRmsOutside ? std::sqrt(square) + eps : std::sqrt(square + eps)));
    for (int64_t i = 0; i < d; i += kLanes<T>) {
      const int64_t lanes = d - i;
      Vec<T> v = (load(in + i, lanes) - static_cast<T>(mean)) * factor * load(scale + i, lanes);
      if (bias) v = v + load(bias + i, lanes);
      store(out + i, v, lanes);
    }
  });
}

// --- FIR ----------------------------------------------------------------------------------------------------------

// y[ch - from] = sum_j taps[j] tail[j] + taps[k - 1] x for channels [from, to), and the tail moved on by x. The sum is
// kept in y and rows are read in turn, because a long tail is far larger than y.
template <typename T>
CROCUTA_INLINE void fir_step(const T* x, const T* taps, T* tail, int64_t k, int64_t d, int64_t from, int64_t to, T* y) {
  for (int64_t ch = from; ch < to; ch += kLanes<T>) {
    const int64_t lanes = to - ch;
    store(y + (ch - from), load(taps + (k - 1) * d + ch, lanes) * load(x + ch, lanes), lanes);
  }
  for (int64_t j = 0; j < k - 1; ++j) {
    const T* newer = j == k - 2 ? x : tail + (j + 1) * d;
    for (int64_t ch = from; ch < to; ch += kLanes<T>) {
      const int64_t lanes = to - ch;
      T* place = tail + j * d + ch;
      store(y + (ch - from), load(y + (ch - from), lanes) + load(taps + j * d + ch, lanes) * load(place, lanes), lanes);
      store(place, load(newer + ch, lanes), lanes);
    }
  }
}

// The short filter of (x2, x1, v) and the first gate: z [rows][3 d] becomes x2 and u = x1 v; z is overwritten.
template <typename T>
void short_filter(Team& team, const T* taps, const T* bias, T* tail, int64_t k, T* z, T* x2, T* u, int64_t rows,
                  int64_t d) {
  over_channels(team, rows, d, [&](int64_t row, int64_t from, int64_t to) {
    T* own = tail + row * (k - 1) * 3 * d;
    T third[3][kPiece];
    for (int64_t part = 0; part < 3; ++part) {
      fir_step(z + row * 3 * d, taps, own, k, 3 * d, part * d + from, part * d + to, third[part]);
      for (int64_t i = 0; bias && i < to - from; i += kLanes<T>) {
        const int64_t lanes = to - from - i;
        store(third[part] + i, load(third[part] + i, lanes) + load(bias + part * d + from + i, lanes), lanes);
      }
    }
    for (int64_t i = 0; i < to - from; i += kLanes<T>) {
      const int64_t lanes = to - from - i;
      store(x2 + row * d + from + i, load(third[0] + i, lanes), lanes);
      store(u + row * d + from + i, load(third[1] + i, lanes) * load(third[2] + i, lanes), lanes);
    }
  });
}

// y = x2 (h * u + D u) for explicit taps; skip may be null.
template <typename T>
void long_fir(Team& team, const T* taps, const T* skip, T* tail, int64_t k, const T* x2, const T* u, T* y, int64_t rows,
              int64_t d) {
  over_channels(team, rows, d, [&](int64_t row, int64_t from, int64_t to) {
    const T* in = u + row * d;
    T* out = y + row * d;
    fir_step(in, taps, tail + row * (k - 1) * d, k, d, from, to, out + from);
    for (int64_t ch = from; ch < to; ch += kLanes<T>) {
      const int64_t lanes = to - ch;
      Vec<T> v = load(out + ch, lanes);
      if (skip) v = v + load(skip + ch, lanes) * load(in + ch, lanes);
      store(out + ch, v * load(x2 + row * d + ch, lanes), lanes);
    }
  });
}

// --- modal filters ------------------------------------------------------------------------------------------------

// s = p s + u, y = x2 (Re sum R s + D u). State [rows][parts n][d] and constants [poles | residues][parts][n][d], real
// parts first.
template <typename T, bool Complex>
void modal_step(Team& team, const T* constants, const T* skip, T* state, int64_t n, const T* x2, const T* u, T* y,
                int64_t rows, int64_t d) {
  const int64_t size = n * d, parts = Complex ? 2 : 1;
  const T *pr = constants, *pi = constants + size, *rr = constants + parts * size, *ri = rr + size;
  over_channels(team, rows, d, [&](int64_t row, int64_t from, int64_t to) {
    T* own = state + row * parts * size;
    for (int64_t ch = from; ch < to; ch += kLanes<T>) {
      const int64_t lanes = to - ch;
      const Vec<T> in = load(u + row * d + ch, lanes);
      Vec<T> sum = {};
      if (skip) sum = load(skip + ch, lanes) * in;
      for (int64_t m = 0; m < n; ++m) {
        const int64_t at = m * d + ch;
        const Vec<T> re = load(own + at, lanes), p = load(pr + at, lanes), r = load(rr + at, lanes);
        if (Complex) {
          const Vec<T> im = load(own + size + at, lanes), q = load(pi + at, lanes);
          const Vec<T> next_re = in + p * re - q * im, next_im = p * im + q * re;
          store(own + at, next_re, lanes);
          store(own + size + at, next_im, lanes);
          sum = sum + r * next_re - load(ri + at, lanes) * next_im;
        } else {
          const Vec<T> next = in + p * re;
          store(own + at, next, lanes);
          sum = sum + r * next;
        }
      }
      store(y + row * d + ch, sum * load(x2 + row * d + ch, lanes), lanes);
    }
  });
}

// --- attention ----------------------------------------------------------------------------------------------------

struct Attention {
  int64_t heads, kv_heads, head_size;
  const void* inverse;  // frequencies, T [head_size / 2], or null: no rotation
  double scale;         // positions are divided by it
  int64_t room;
};

constexpr int64_t kKeys = 64;       // scores that exist at once
constexpr int64_t kMaxHead = 1024;  // crocuta.model.step refuses larger heads that are rotated

// Pairs (x[i], x[i + half]) of every head turned by the angles whose cosines and sines are given.
template <typename T>
void rotate(T* x, int64_t heads, int64_t half, const T* cosine, const T* sine) {
  for (int64_t head = 0; head < heads; ++head, x += 2 * half)
    for (int64_t i = 0; i < half; i += kLanes<T>) {
      const int64_t lanes = half - i;
      const Vec<T> first = load(x + i, lanes), second = load(x + half + i, lanes);
      const Vec<T> c = load(cosine + i, lanes), s = load(sine + i, lanes);
      store(x + i, first * c - second * s, lanes);
      store(x + half + i, second * c + first * s, lanes);
    }
}

template <typename T>
T dot_product(const T* a, const T* b, int64_t count) {
  Vec<T> sum = {};
  for (int64_t i = 0; i < count; i += kLanes<T>) sum = sum + load(a + i, count - i) * load(b + i, count - i);
  return static_cast<T>(lane_sum<T>(sum));
}

// One query on `count` keys, a few at a time with a running maximum (online softmax); out [c] in T.
template <typename T>
void attend(const T* q, const T* keys, const T* values, int64_t count, int64_t stride, int64_t c, T* out) {
  const T factor = static_cast<T>(1 / std::sqrt(static_cast<double>(c)));
  T most = -INFINITY;
  double total = 0;
  std::fill(out, out + c, T(0));
  for (int64_t from = 0; from < count; from += kKeys) {
    const int64_t some = std::min(kKeys, count - from);
    alignas(64) T scores[kKeys];
    T largest = most;
    for (int64_t j = 0; j < some; ++j) {
      scores[j] = dot_product(q, keys + (from + j) * stride, c) * factor;
      largest = scores[j] > largest ? scores[j] : largest;
    }
    std::fill(scores + some, scores + kKeys, T(-INFINITY));
    const T shrink = std::exp(most - largest);
    for (int64_t j = 0; j < kKeys; j += kLanes<T>) store(scores + j, vector_exp<T>(load(scores + j) - largest));
    total *= shrink;
    for (int64_t j = 0; j < some; ++j) total += scores[j];
    for (int64_t i = 0; i < c; i += kLanes<T>) {
      const int64_t lanes = c - i;
      Vec<T> sum = load(out + i, lanes) * shrink;
      for (int64_t j = 0; j < some; ++j) sum = sum + scores[j] * load(values + (from + j) * stride + i, lanes);
      store(out + i, sum, lanes);
    }
    most = largest;
  }
  const T inverse = static_cast<T>(1 / total);
  for (int64_t i = 0; i < c; ++i) out[i] *= inverse;
}

// qkv [rows][(heads + 2 kv_heads) c], of which queries and keys are rotated in place; keys and values
// [rows][room][kv_heads][c], of which `lengths` [rows] are there and one more is written.
template <typename T>
void attention(Team& team, const Attention& a, T* qkv, T* keys, T* values, int64_t* lengths, T* y, int64_t rows) {
  const int64_t c = a.head_size, half = c / 2, group = a.heads / a.kv_heads, stride = a.kv_heads * c;
  const int64_t width = (a.heads + 2 * a.kv_heads) * c;
  team.run(rows, [&](int64_t row) {
    T *q = qkv + row * width, *k = q + a.heads * c, *place = keys + (row * a.room + lengths[row]) * stride;
    if (a.inverse) {
      alignas(64) T cosine[kMaxHead / 2], sine[kMaxHead / 2];
      const T position = static_cast<T>(static_cast<double>(lengths[row]) / a.scale);
      for (int64_t i = 0; i < half; ++i) {
        const T angle = position * static_cast<const T*>(a.inverse)[i];
        cosine[i] = std::cos(angle);
        sine[i] = std::sin(angle);
      }
      rotate(q, a.heads + a.kv_heads, half, cosine, sine);
    }
    std::copy(k, k + stride, place);
    std::copy(k + stride, k + 2 * stride, values + (place - keys));
  });
  team.run(rows * a.heads, [&](int64_t task) {
    const int64_t row = task / a.heads, head = task % a.heads, first = row * a.room * stride + head / group * c;
    attend(qkv + row * width + head * c, keys + first, values + first, lengths[row] + 1, stride, c,
           y + (row * a.heads + head) * c);
  });
  for (int64_t row = 0; row < rows; ++row) ++lengths[row];
}

}  // namespace
