// One token of a whole model, or of a stretch of its layers, in one call: a program of operations on a few buffers,
// written once by crocuta.ops.kernels.decode, where the records are described beside the numbers below.

#include "decode_linear.h"
#include "decode_mixers.h"
#include "decode_sampling.h"
#include "online_conv.h"

namespace {

constexpr int64_t kRecord = 12;  // integers a record: an operation, and addresses, sizes and places of its operands

enum Operation : int64_t {
  kEmbed, kNorm, kLinear, kShortFilter, kModal, kLongFir, kOnline, kResidual, kAttention, kCount
};

// Places of buffers: the residual stream, its norm, projections, the two gates, the mixer's output, the MLP's middle,
// the logits, rows in 16 bits.
enum Buffer : int64_t { kStream, kNormed, kWide, kX2, kInput, kMixed, kMiddle, kLogits, kScratch };

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

double number(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// a *= b, or a += b, of [rows][d].
template <bool Product, typename T>
void combine(Team& team, T* a, const T* b, int64_t rows, int64_t d) {
  over_channels(team, rows, d, [&](int64_t row, int64_t from, int64_t to) {
    for (int64_t ch = row * d + from; ch < row * d + to; ch += kLanes<T>) {
      const int64_t lanes = row * d + to - ch;
      const Vec<T> x = load(a + ch, lanes), y = load(b + ch, lanes);
      store(a + ch, Product ? x * y : x + y, lanes);
    }
  });
}

template <typename T>
struct Step {
  const int64_t *buffers, *states, *ids;
  T* logits;
  int64_t rows;

  T* buffer(int64_t place) const { return place == kLogits ? logits : pointer<T>(buffers[place]); }
  template <typename U = T>
  U* state(int64_t place) const {
    return pointer<U>(states[place]);
  }

  void run(Team& team, const int64_t* r) const {
    T *x2 = buffer(kX2), *u = buffer(kInput), *mixed = buffer(kMixed);
    switch (r[0]) {
      case kEmbed:  // table, row stride, d
        for (int64_t row = 0; row < rows; ++row)
          std::copy_n(pointer<const T>(r[1]) + ids[row] * r[2], r[3], buffer(kStream) + row * r[3]);
        return;
      case kNorm:  // kind, scale, bias, eps, d
        return norm(team, r[1], pointer<const T>(r[2]), pointer<const T>(r[3]), number(r[4]), buffer(kStream),
                    buffer(kNormed), rows, r[5]);
      case kLinear: {  // format, weights, scales, offsets, bias, outputs, inputs, from, to, finish, activation
        const Matrix matrix{r[1], pointer<const void>(r[2]), pointer<const void>(r[3]), pointer<const float>(r[3]),
                            pointer<const int32_t>(r[4]), r[6], r[7]};
        const Ending<T> ending{r[10], r[11], r[6], pointer<const T>(r[5]), buffer(r[9])};
        return linear(team, matrix, buffer(r[8]), rows, ending, pointer<char>(buffers[kScratch]));
      }
      case kShortFilter:  // taps, bias, k, d, tail
        return short_filter(team, pointer<const T>(r[1]), pointer<const T>(r[2]), state(r[5]), r[3], buffer(kWide), x2, u,
                            rows, r[4]);
      case kModal:  // constants, skip, modes, complex, d, modes' state
        return (r[4] ? modal_step<T, true> : modal_step<T, false>)(team, pointer<const T>(r[1]), pointer<const T>(r[2]),
                                                                   state(r[6]), r[3], x2, u, mixed, rows, r[5]);
      case kLongFir:  // taps, skip, k, d, tail
        return long_fir(team, pointer<const T>(r[1]), pointer<const T>(r[2]), state(r[5]), r[3], x2, u, mixed, rows, r[4]);
      case kOnline: {  // d, first of: what is bound (online_conv.h), lengths
        const auto run_all = [&](int64_t tasks, const auto& work) { team.run(tasks, work); };
        online_rows<T>(state<const int64_t>(r[2]), u, state<int64_t>(r[2] + 1), mixed, run_all);
        return combine<true>(team, mixed, x2, rows, r[1]);
      }
      case kResidual:  // d
        return combine<false>(team, buffer(kStream), mixed, rows, r[1]);
      case kAttention: {  // heads, kv heads, head size, frequencies, scale, first of: keys, values, lengths, room
        const Attention a{r[1], r[2], r[3], pointer<const void>(r[4]), number(r[5]), states[r[6] + 3]};
        return attention(team, a, buffer(kWide), state(r[6]), state(r[6] + 1), state<int64_t>(r[6] + 2), mixed, rows);
      }
      case kCount:  // lengths
        for (int64_t row = 0; row < rows; ++row) ++state<int64_t>(r[1])[row];
        return;
    }
  }
};

template <typename T>
void decode(const int64_t* program, int64_t from, int64_t to, const int64_t* buffers, const int64_t* states,
            const int64_t* ids, T* logits, int64_t rows, int64_t threads) {
  const Step<T> step{buffers, states, ids, logits, rows};
  Team team(threads);
  parallel(threads, threads, [&](int64_t) {
    team.join([&](Team& all) {
      for (int64_t record = from; record < to; ++record) step.run(all, program + record * kRecord);
    });
  });
}

}  // namespace

#define CROCUTA_DECODE(dtype, T)                                                                                  \
  CROCUTA_EXPORT void CROCUTA_NAME(decode, dtype)(const int64_t* program, int64_t from, int64_t to,               \
                                                  const int64_t* buffers, const int64_t* states,                  \
                                                  const int64_t* ids, T* logits, int64_t rows, int64_t threads) { \
    decode<T>(program, from, to, buffers, states, ids, logits, rows, threads);                                    \
  }

CROCUTA_DECODE(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_DECODE(f64, double)
#endif

// logits [rows][v], one uniform number a row; options: temperature, top_p, min_p. ids are -1 where logits are no
// distribution.
CROCUTA_EXPORT void CROCUTA_NAME(sample, f32)(const float* logits, const double* uniform, const double* options,
                                              int64_t top_k, int64_t* ids, float* log_probs, int64_t rows, int64_t v,
                                              int64_t threads) {
  const Choice choice{options[0], options[1], options[2], top_k};
  parallel(threads, rows, [&](int64_t row) {
    ids[row] = sample_row(logits + row * v, v, choice, uniform[row], log_probs + row);
  });
}
