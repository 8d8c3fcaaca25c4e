// y = W x for a few rows x and a matrix that is read once: what a decoding step spends its time on.
//
// Weights of the model's own dtype are read where the model has them. Narrow ones are packed in blocks of kBlockRows
// outputs (crocuta.ops.kernels.decode.pack): all of a block for input 0, then all for input 1, and so on, so that lanes
// are outputs, sums stay in registers and memory is read in order. Up to four blocks are read side by side, which keeps
// more of memory's queues busy than one stream does.
//
//     in place  [outputs][k]            T
//     bfloat16  [blocks][k][16][2]      bits of outputs i and 16 + i: a shift and a mask widen them to float
//     int8      [blocks][k / 4][32][4]  with a scale an output; inputs are rounded to 16 bits with a scale a row
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "activation.h"
#include "decode_floats.h"
#include "decode_team.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// The numbers are those of crocuta.ops.kernels.decode.
enum Format : int64_t { kInPlace, kBfloat16, kInt8 };
enum Finish : int64_t { kStore, kAdd, kActivate, kGated };

struct Matrix {
  int64_t format;
  const void* weights;
  const void* other;       // in place: what a gate multiplies
  const float* scales;     // int8: [blocks * 32]
  const int32_t* offsets;  // int8: 128 times the sum of an output's weights, [blocks * 32]
  int64_t outputs, inputs;
};

constexpr int64_t kStreams = 4;
constexpr int64_t kMaxSums = CROCUTA_REGISTERS == 32 ? 16 : 8;  // accumulators that leave room for everything else

// How many rows are done at once where a block takes `vectors` accumulators a row, and how many blocks for `rows` rows.
constexpr int64_t rows_at_once(int64_t vectors) { return std::max<int64_t>(1, std::min<int64_t>(8, kMaxSums / vectors)); }
constexpr int64_t streams_for(int64_t vectors, int64_t rows) {
  return std::max<int64_t>(1, std::min(kStreams, rows_at_once(vectors) / rows));
}

// --- 8-bit weights ------------------------------------------------------------------------------------------------

// A row in 16 bits, x / scale: 8 would cost more than the weights' 8 do, and the second product is hidden behind the
// memory. Where the machine multiplies unsigned by signed bytes, 2^15 is added, and of four inputs the high bytes come
// before the low ones; else four inputs are numbers of 16 bits as (0, 2, 1, 3).
constexpr int64_t quantised_bytes(int64_t k) { return (k + 3) / 4 * 8; }

typedef int32_t Int32s __attribute__((vector_size(CROCUTA_VECTOR_BYTES)));
typedef int16_t Int16s __attribute__((vector_size(CROCUTA_VECTOR_BYTES)));

// `count` numbers, a multiple of four, that the lower halves of the lanes hold, to eight bytes for four.
CROCUTA_INLINE void store_halves(Int32s bits, int64_t count, bool bytes, char* to) {
  uint16_t out[kLanes<float>];
#if defined(__AVX512F__)
  if (bytes) {
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32((__m512i)bits, 8));
    const __m128i low = _mm512_cvtepi32_epi8((__m512i)bits);
    const __m128i fours[2] = {_mm_unpacklo_epi32(high, low), _mm_unpackhi_epi32(high, low)};
    std::memcpy(to, fours, static_cast<size_t>(2 * count));
    return;
  }
#else
  (void)bytes;
#endif
  for (int64_t j = 0; j < kLanes<float>; ++j)
    out[(j & ~3) + ((j & 1) << 1 | (j >> 1 & 1))] = static_cast<uint16_t>(bits[j]);
  std::memcpy(to, out, static_cast<size_t>(2 * count));
}

inline float power_of_two(int32_t exponent) {
  const int32_t bits = (127 + exponent) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to whole numbers of up to 2^14, which is what one scale of the row makes of it; returns that scale. It is a
// power of two, so that every machine rounds the same numbers; or NaN where a number of the row is none, or infinite: so
// are then all products.
inline float quantise(const float* x, int64_t k, bool bytes, char* to) {
  constexpr int64_t L = kLanes<float>;
  Int32s largest = {};  // bits of absolute values, whose order is that of the numbers; NaN comes last
  for (int64_t i = 0; i < k; i += L) {
    const Int32s size = (Int32s)load(x + i, k - i) & 0x7fffffff;
    largest = size > largest ? size : largest;
  }
  int32_t lanes[L], most = 0;
  std::memcpy(lanes, &largest, sizeof lanes);
  for (const int32_t lane : lanes) most = std::max(most, lane);
  const int32_t exponent = std::max(-100, (most >> 23) - 126);
  const float inverse = power_of_two(14 - exponent);
  // Added to 1.5 * 2^23, a number is rounded and its lowest bits are those of the whole number.
  const Vec<float> shift = splat(bytes ? 12615680.0f : 12582912.0f);
  const int64_t whole = (k + 3) / 4 * 4;
  for (int64_t i = 0; i < whole; i += L) {
    const Int32s bits = (Int32s)(load(x + i, std::max<int64_t>(0, k - i)) * inverse + shift);
    store_halves(bits, std::min(L, whole - i), bytes, to + 2 * i);
  }
  return most < 0x7f800000 ? power_of_two(exponent - 14) : std::numeric_limits<float>::quiet_NaN();
}

#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 9)
#define CROCUTA_VNNI 1
inline bool has_byte_products() {
  static const bool has = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") != 0;
  }();
  return has;
}
#else
inline bool has_byte_products() { return false; }
#endif

// A sum of products of 16 by 8 bits is 256 high + low, which no overflow and no machine changes.
struct ByteProduct {
  const Matrix& matrix;
  const char* x;  // [rows][quantised_bytes(k)]
  const float* scales;

  CROCUTA_INLINE static Vec<float> whole(Int32s high, Int32s low) {
    const Vec<float> upper = __builtin_convertvector(high + (low >> 8), Vec<float>);
    return upper * 256.0f + __builtin_convertvector(low & 255, Vec<float>);
  }
};

// Models of fewer channels are small enough to stay in the last cache, where fetching ahead costs more than it gains.
constexpr int64_t kFarInputs = 1024;

#if defined(CROCUTA_VNNI)
struct VnniProduct : ByteProduct {
  static constexpr int64_t vectors = 4;

  template <int B, int S>
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))) void dot(int64_t block, int64_t row,
                                                                                    float* to) const {
    const int64_t fours = (matrix.inputs + 3) / 4, stride = fours * 4 * kBlockRows, step = quantised_bytes(matrix.inputs);
    const char *w = static_cast<const char*>(matrix.weights) + block * stride, *in = x + row * step;
    __m512i sum[2][B][S][2];
    for (int r = 0; r < B; ++r)
      for (int s = 0; s < S; ++s)
        for (int n = 0; n < 2; ++n) {
          const int32_t* offsets = matrix.offsets + (block + s) * kBlockRows + 16 * n;
          sum[0][r][s][n] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(offsets));
          sum[1][r][s][n] = _mm512_setzero_si512();
        }
    for (int64_t i = 0; i < fours; ++i) {
      const int64_t ahead = ahead_of(i * 4 * kBlockRows, stride, S);
      for (int s = 0; s < S; ++s) {
        const char* next = w + s * stride + i * 4 * kBlockRows;
        const __m512i weights[2] = {_mm512_loadu_si512(next), _mm512_loadu_si512(next + 64)};
        if (matrix.inputs >= kFarInputs) {
          __builtin_prefetch(next + ahead, 0, 2);
          __builtin_prefetch(next + ahead + 64, 0, 2);
        }
        for (int r = 0; r < B; ++r)
          for (int half = 0; half < 2; ++half) {
            int32_t four;
            std::memcpy(&four, in + r * step + 8 * i + 4 * half, 4);
            const __m512i inputs = _mm512_set1_epi32(four);
            for (int n = 0; n < 2; ++n)
              sum[half][r][s][n] = _mm512_dpbusd_epi32(sum[half][r][s][n], inputs, weights[n]);
          }
      }
    }
    for (int r = 0; r < B; ++r)
      for (int s = 0; s < S; ++s)
        for (int n = 0; n < 2; ++n) {
          const Vec<float> scale = load(matrix.scales + (block + s) * kBlockRows + 16 * n) * scales[row + r];
          const Vec<float> exact = whole((Int32s)sum[0][r][s][n], (Int32s)sum[1][r][s][n]);
          store(to + (r * S + s) * kBlockRows + 16 * n, exact * scale);
        }
  }
};
#endif

// In each 32-bit lane, the sum of the products of both 16-bit halves.
CROCUTA_INLINE Int32s pair_products(Int16s a, Int16s b) {
#if defined(__AVX512BW__)
  return (Int32s)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Int32s)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Int32s)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const Int32s x = (Int32s)a, y = (Int32s)b;
  return (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
#endif
}

// Bytes widened to 16 bits: the same whole numbers as VnniProduct has. 512 products fit 32 bits.
struct WidenedProduct : ByteProduct {
  static constexpr int64_t vectors = kBlockRows / kLanes<float>, longest = 128;

  template <int B, int S>
  void dot(int64_t block, int64_t row, float* to) const {
    const int64_t fours = (matrix.inputs + 3) / 4, stride = fours * 4 * kBlockRows, step = quantised_bytes(matrix.inputs);
    const char *w = static_cast<const char*>(matrix.weights) + block * stride, *in = x + row * step;
    Int32s high[B][S][vectors] = {}, low[B][S][vectors] = {};
    for (int64_t from = 0; from < fours; from += longest) {
      Int32s sum[B][S][vectors] = {};
      for (int64_t i = from; i < std::min(fours, from + longest); ++i) {
        const int64_t ahead = ahead_of(i * 4 * kBlockRows, stride, S);
        for (int s = 0; s < S; ++s) {
          const char* next = w + s * stride + i * 4 * kBlockRows;
          for (int64_t line = 0; line < 4 * kBlockRows; line += 64) __builtin_prefetch(next + ahead + line, 0, 2);
          for (int64_t n = 0; n < vectors; ++n) {
            Int16s both;
            std::memcpy(&both, next + n * CROCUTA_VECTOR_BYTES, sizeof both);
            const Int16s even = (both << 8) >> 8, odd = both >> 8;  // weights 0, 2 and 1, 3
            for (int r = 0; r < B; ++r) {
              int32_t pairs[2];
              std::memcpy(pairs, in + r * step + 8 * i, 8);
              sum[r][s][n] += pair_products(even, (Int16s)(pairs[0] - Int32s{})) +
                              pair_products(odd, (Int16s)(pairs[1] - Int32s{}));
            }
          }
        }
      }
      for (int r = 0; r < B; ++r)
        for (int s = 0; s < S; ++s)
          for (int64_t n = 0; n < vectors; ++n) {
            high[r][s][n] += sum[r][s][n] >> 8;
            low[r][s][n] += sum[r][s][n] & 255;
          }
    }
    for (int r = 0; r < B; ++r)
      for (int s = 0; s < S; ++s)
        for (int64_t n = 0; n < vectors; ++n) {
          const int64_t o = n * kLanes<float>;
          const Vec<float> scale = load(matrix.scales + (block + s) * kBlockRows + o) * scales[row + r];
          store(to + (r * S + s) * kBlockRows + o, whole(high[r][s][n], low[r][s][n]) * scale);
        }
  }
};

// --- rows and blocks ----------------------------------------------------------------------------------------------

// What becomes of a sum: to [rows][outputs], or half as many outputs where blocks of a gate and of what it gates
// alternate.
template <typename T>
struct Ending {
  int64_t finish, activation, outputs;
  const T* bias;  // [blocks * 32] or null
  T* to;

  void apply(int64_t block, int64_t blocks, int64_t row, T* sums) const {
    if (bias)
      for (int64_t o = 0; o < blocks * kBlockRows; ++o) sums[o] += bias[block * kBlockRows + o];
    if (finish != kGated) return write(block * kBlockRows, outputs, row, sums, blocks * kBlockRows);
    for (int64_t pair = 0; pair + 1 < blocks; pair += 2) {
      T *gate = sums + pair * kBlockRows, *up = gate + kBlockRows;
      for (int64_t o = 0; o < kBlockRows; o += kLanes<T>) store(gate + o, activate<T>(load(gate + o), activation) * load(up + o));
      write((block + pair) / 2 * kBlockRows, outputs / 2, row, gate, kBlockRows);
    }
  }

 private:
  void write(int64_t first, int64_t width, int64_t row, const T* sums, int64_t count) const {
    T* out = to + row * width + first;
    count = std::min(count, width - first);
    for (int64_t o = 0; o < count; o += kLanes<T>) {
      const int64_t lanes = count - o;
      Vec<T> v = load(sums + o);
      if (finish == kAdd) v = v + load(out + o, lanes);
      if (finish == kActivate) v = activate<T>(v, activation);
      store(out + o, v, lanes);
    }
  }
};

template <typename T, int B, int S, typename Product>
CROCUTA_INLINE void few_blocks(const Product& product, int64_t block, int64_t row, const Ending<T>& ending) {
  alignas(64) T sums[B * S * kBlockRows];
  product.template dot<B, S>(block, row, sums);
  for (int r = 0; r < B; ++r) ending.apply(block, S, row + r, sums + r * S * kBlockRows);
}

// Rows [row, row + B) and blocks [from, to); gates and what they gate stay together.
template <typename T, int B, typename Product>
void blocks_of(const Product& product, int64_t from, int64_t to, int64_t row, const Ending<T>& ending) {
  constexpr int S = static_cast<int>(streams_for(Product::vectors, B));
  int64_t block = from;
  if (ending.finish == kGated && S == 1) {
    for (; block < to; block += 2) {
      alignas(64) T one[B * kBlockRows], two[B * kBlockRows], both[2 * kBlockRows];
      product.template dot<B, 1>(block, row, one);
      product.template dot<B, 1>(block + 1, row, two);
      for (int r = 0; r < B; ++r) {
        std::memcpy(both, one + r * kBlockRows, sizeof both / 2);
        std::memcpy(both + kBlockRows, two + r * kBlockRows, sizeof both / 2);
        ending.apply(block, 2, row + r, both);
      }
    }
    return;
  }
  if constexpr (S == 4)
    for (; block + 4 <= to; block += 4) few_blocks<T, B, 4>(product, block, row, ending);
  if constexpr (S >= 2)
    for (; block + 2 <= to; block += 2) few_blocks<T, B, 2>(product, block, row, ending);
  for (; block < to; ++block) few_blocks<T, B, 1>(product, block, row, ending);
}

template <typename T, typename Product>
void multiply(Team& team, const Product& product, int64_t rows, const Ending<T>& ending) {
  constexpr int64_t most = rows_at_once(Product::vectors);
  const int64_t blocks = (ending.outputs + kBlockRows - 1) / kBlockRows;
  const int64_t whole = ending.finish == kGated ? (blocks + 1) / 2 * 2 : blocks, helpers = team.threads();
  // Each output is one sum over all inputs, whatever the cut: results do not depend on the number of threads.
  const int64_t cut = helpers == 1 ? kStreams : std::max<int64_t>(2, std::min(kStreams, whole / (2 * helpers) / 2 * 2));
  team.run((whole + cut - 1) / cut, [&](int64_t task) {
    const int64_t from = task * cut, to = std::min(whole, from + cut);
    int64_t row = 0;
    if constexpr (most >= 8)
      for (; row + 8 <= rows; row += 8) blocks_of<T, 8>(product, from, to, row, ending);
    if constexpr (most >= 4)
      for (; row + 4 <= rows; row += 4) blocks_of<T, 4>(product, from, to, row, ending);
    if constexpr (most >= 2)
      for (; row + 2 <= rows; row += 2) blocks_of<T, 2>(product, from, to, row, ending);
    for (; row < rows; ++row) blocks_of<T, 1>(product, from, to, row, ending);
  });
}

// y = W x for x [rows][inputs]; `scratch` holds rows in 16 bits, [rows] quantised_bytes, and scales, where needed.
template <typename T>
void linear(Team& team, const Matrix& matrix, const T* x, int64_t rows, const Ending<T>& ending, char* scratch) {
  if constexpr (std::is_same<T, float>::value) {
    if (matrix.format == kBfloat16) {
      const Bfloat16Product product{static_cast<const uint16_t*>(matrix.weights), x, matrix.inputs};
      return multiply<T>(team, product, rows, ending);
    }
    if (matrix.format == kInt8) {
      const bool bytes = has_byte_products();
      const int64_t step = quantised_bytes(matrix.inputs);
      float* scales = reinterpret_cast<float*>(scratch + rows * step);
      for (int64_t r = 0; r < rows; ++r)
        scales[r] = quantise(x + r * matrix.inputs, matrix.inputs, bytes, scratch + r * step);
#if defined(CROCUTA_VNNI)
      if (bytes) return multiply<T>(team, VnniProduct{{matrix, scratch, scales}}, rows, ending);
#endif
      return multiply<T>(team, WidenedProduct{{matrix, scratch, scales}}, rows, ending);
    }
  }
  const int64_t outputs = matrix.other ? matrix.outputs / 2 : matrix.outputs;
  const auto *weights = static_cast<const T*>(matrix.weights), *other = static_cast<const T*>(matrix.other);
  multiply<T>(team, InPlaceProduct<T>{weights, other, outputs, matrix.inputs, x}, rows, ending);
}

}  // namespace
