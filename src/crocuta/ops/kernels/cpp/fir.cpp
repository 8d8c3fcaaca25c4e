// Causal depthwise FIR, short and medium, and the short one fused with the gate of a Hyena operator; forward and
// backward. Channels-last. The work is cut along time, and all channels of a few rows are done before the next rows, so
// that memory is read and written nearly in its order.

#include "fir.h"
#include "threads.h"

namespace {

constexpr int64_t kRows = 16;             // steps of one vector of channels before its neighbour's turn
constexpr int64_t kMediumSteps = 120;     // the same for medium filters, which copy them beside the k - 1 before
constexpr int64_t kUnit = 64;             // steps of a task: a few times kRows
constexpr int64_t kSegments = 32;         // at most so many sums of gradients at once

// Memory that begins at a whole vector.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(new T[static_cast<size_t>(size) + 64 / sizeof(T)]) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    aligned_ = memory_.get() + (64 - address % 64) % 64 / sizeof(T);
  }
  operator T*() const { return aligned_; }

 private:
  std::unique_ptr<T[]> memory_;
  T* aligned_;
};

// The packed filter of a call; a skip is one more tap at lag 0.
template <typename T>
struct Packed {
  Packed(const T* taps, const T* bias, const T* skip, int64_t groups, int64_t k, int64_t channels)
      : memory(k * channels), filter{memory, bias, k, channels} {
    fir_pack_taps<T>(taps, groups, k, channels, memory);
    for (int64_t ch = 0; skip && ch < channels; ++ch) memory[ch] += skip[ch];
  }
  Scratch<T> memory;
  FirFilter<T> filter;
};

// [b][l][channels] with strides in elements, and the tails [b][k - 1][channels] or null.
template <typename T>
struct Batch {
  const T* rows;
  int64_t row, step;
  const T* tail;
  FirInputs<T> at(int64_t index, int64_t k, int64_t channels) const {
    return {rows + index * row, step, tail ? tail + index * (k - 1) * channels : nullptr, channels};
  }
};

// --- short, with the gate -----------------------------------------------------------------------------------------

// x2 and u [b][l][d].
template <typename T>
void gate_forward(const Batch<T>& z, const FirFilter<T>& f, T* x2, T* u, int64_t b, int64_t l, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t d = f.channels / 3, units = (l + kUnit - 1) / kUnit;
  parallel(threads, b * units, [&](int64_t task) {
    const int64_t row = task / units, from = task % units * kUnit, to = std::min(l, from + kUnit);
    const FirInputs<T> in = z.at(row, f.k, f.channels);
    alignas(64) T last_x2[kRows * L], last_u[kRows * L];
    for (int64_t t = from; t < to; t += kRows) {
      const int64_t n = std::min(kRows, to - t);
      T *out = x2 + (row * l + t) * d, *gated = u + (row * l + t) * d;
      int64_t ch = 0;
      for (; ch + L <= d; ch += L) fir_gate_block<T>(f, in, ch, L, t, n, {out + ch, gated + ch, nullptr, nullptr, d});
      if (ch == d) continue;
      fir_gate_block<T>(f, in, ch, d - ch, t, n, {last_x2, last_u, nullptr, nullptr, L});
      for (int64_t i = 0; i < n; ++i) {
        store(out + i * d + ch, load(last_x2 + i * L), d - ch);
        store(gated + i * d + ch, load(last_u + i * L), d - ch);
      }
    }
  });
}

// The segments that the units of a batch are cut into, the same at any number of threads: each has its own sums.
struct Segments {
  Segments(int64_t b, int64_t l) : units((l + kUnit - 1) / kUnit), all(b * units), count(std::min(all, kSegments)) {}

  // Calls work(row, from, to) for the times of each unit.
  template <typename Work>
  void each(int64_t segment, int64_t l, Work&& work) const {
    for (int64_t unit = segment * all / count; unit < (segment + 1) * all / count; ++unit) {
      const int64_t from = unit % units * kUnit;
      work(unit / units, from, std::min(l, from + kUnit));
    }
  }

  int64_t units, all, count;
};

// dtaps [groups][k], dbias [channels] and dskip [channels], or null, from the sums [count][k + 1][channels].
template <typename T>
void finish_sums(const double* sums, int64_t count, int64_t groups, int64_t k, int64_t channels, T* dtaps, T* dbias,
                 T* dskip) {
  const int64_t each = groups ? channels / groups : 0;
  const auto total = [&](int64_t j, int64_t ch) {
    double sum = 0;
    for (int64_t s = 0; s < count; ++s) sum += sums[(s * (k + 1) + j) * channels + ch];
    return sum;
  };
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch) sum += total(j, ch);
      dtaps[g * k + j] = static_cast<T>(sum);
    }
  for (int64_t ch = 0; ch < channels; ++ch) {
    if (dbias) dbias[ch] = static_cast<T>(total(k, ch));
    if (dskip) dskip[ch] = static_cast<T>(total(0, ch));
  }
}

// dz [b][l][3 d], dtaps [3 d][k], dbias [3 d], dtail [b][k - 1][3 d] or null. The filtered x1 and v of a few rows are
// made again, and those of the k - 1 rows behind them, so that blocks need nothing of each other.
template <typename T>
void gate_backward(const T* dx2, const T* du, const Batch<T>& z, const FirFilter<T>& f, T* dz, T* dtaps, T* dbias,
                   T* dtail, int64_t b, int64_t l, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t c = f.channels, d = c / 3, k = f.k, room = (kRows + k - 1) * L, size = (k + 1) * c;
  const Segments segments(b, l);
  Scratch<double> sums(segments.count * size);
  if (!segments.count && dtail) std::fill(dtail, dtail + b * (k - 1) * c, T(0));
  parallel(threads, segments.count, [&](int64_t segment) {
    double* sum = sums + segment * size;
    std::fill(sum, sum + size, 0.0);
    Scratch<T> scratch(5 * room);
    T *dy = scratch, *x1 = scratch + 3 * room, *v = scratch + 4 * room;
    segments.each(segment, l, [&](int64_t row, int64_t from, int64_t to) {
      const FirInputs<T> in = z.at(row, k, c);
      const FirGradients<T> out = {dz + row * l * c, c, dtail ? dtail + row * (k - 1) * c : nullptr, c, sum};
      for (int64_t t = from; t < to; t += kRows)
        for (int64_t ch = 0; ch < d; ch += L) {
          const int64_t n = std::min(kRows, to - t), lanes = std::min(L, d - ch);
          const int64_t have = std::min(n + k - 1, l - t);
          fir_gate_block<T>(f, in, ch, lanes, t, have, {nullptr, nullptr, x1, v, L});
          for (int64_t i = 0; i < n + k - 1; ++i) {
            const int64_t at = (row * l + t + i) * d + ch;
            const Vec<T> gradient = i < have ? load(du + at, lanes) : Vec<T>{};
            store(dy + i * L, i < have ? load(dx2 + at, lanes) : Vec<T>{});
            store(dy + room + i * L, i < have ? gradient * load(v + i * L) : Vec<T>{});
            store(dy + 2 * room + i * L, i < have ? gradient * load(x1 + i * L) : Vec<T>{});
          }
          fir_gate_adjoint_block<T>(f, in, ch, lanes, t, n, dy, room, L, out);
        }
    });
  });
  finish_sums<T>(sums, segments.count, c, k, c, dtaps, dbias, nullptr);
}

// --- short and medium, without a gate -----------------------------------------------------------------------------

// One vector of channels of a filter, [k][lanes], the last tap first where it is to be reversed.
template <typename T>
void take_taps(const FirFilter<T>& f, int64_t ch, int64_t lanes, bool reversed, T* to) {
  for (int64_t j = 0; j < f.k; ++j)
    store(to + j * kLanes<T>, load(f.taps + (reversed ? f.k - 1 - j : j) * f.channels + ch, lanes));
}

template <typename T>
void short_forward(const Batch<T>& x, const FirFilter<T>& f, T* y, int64_t b, int64_t l, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t d = f.channels, units = (l + kUnit - 1) / kUnit;
  parallel(threads, b * units, [&](int64_t task) {
    const int64_t row = task / units, from = task % units * kUnit, to = std::min(l, from + kUnit);
    const FirInputs<T> in = x.at(row, f.k, d);
    for (int64_t t = from; t < to; t += kRows)
      for (int64_t ch = 0; ch < d; ch += L)
        fir_block<T>(f, in, ch, std::min(L, d - ch), t, std::min(kRows, to - t), y + (row * l + t) * d + ch, d);
  });
}

template <typename T>
void medium_forward(const Batch<T>& x, const FirFilter<T>& f, T* y, int64_t b, int64_t l, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t d = f.channels, k = f.k, units = (l + kMediumSteps - 1) / kMediumSteps;
  parallel(threads, b * units, [&](int64_t task) {
    const int64_t row = task / units, from = task % units * kMediumSteps, n = std::min(kMediumSteps, l - from);
    const FirInputs<T> in = x.at(row, k, d);
    Scratch<T> taps(k * L), inputs((n + k - 1) * L), outputs(n * L);
    for (int64_t ch = 0; ch < d; ch += L) {
      const int64_t lanes = std::min(L, d - ch);
      take_taps<T>(f, ch, lanes, true, taps);
      fir_pack<T>(in, k, ch, lanes, from - (k - 1), from + n, inputs);
      fir_correlate<T>(taps, k, inputs, n, outputs, f.bias ? load(f.bias + ch, lanes) : Vec<T>{});
      for (int64_t t = 0; t < n; ++t) store(y + (row * l + from + t) * d + ch, load(outputs + t * L), lanes);
    }
  });
}

template <typename T>
void short_backward(const T* dy, const Batch<T>& x, const FirFilter<T>& f, T* dx, T* dtail, double* sums,
                    const Segments& segments, int64_t l, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t d = f.channels, k = f.k, size = (k + 1) * d;
  parallel(threads, segments.count, [&](int64_t segment) {
    double* sum = sums + segment * size;
    std::fill(sum, sum + size, 0.0);
    alignas(64) T last[(kRows + kFirShort - 1) * L];
    segments.each(segment, l, [&](int64_t row, int64_t from, int64_t to) {
      const FirInputs<T> in = x.at(row, k, d), gradients = {dy + row * l * d, d, nullptr, 0};
      const FirGradients<T> out = {dx + row * l * d, d, dtail ? dtail + row * (k - 1) * d : nullptr, d, sum};
      for (int64_t t = from; t < to; t += kRows)
        for (int64_t ch = 0; ch < d; ch += L) {
          const int64_t n = std::min(kRows, to - t), lanes = std::min(L, d - ch), end = t + n + k - 1;
          if (end <= l) {
            fir_adjoint_block<T>(f, in, ch, lanes, t, n, gradients.rows + t * d + ch, d, out);
            continue;
          }
          fir_pack<T>(gradients, k, ch, lanes, t, l, last);
          std::fill(last + (l - t) * L, last + (end - t) * L, T(0));
          fir_adjoint_block<T>(f, in, ch, lanes, t, n, last, L, out);
        }
    });
  });
}

// Inputs of the tail are inputs like others, with gradients 0 at their times. A task is a vector of channels and a
// segment of all blocks.
template <typename T>
void medium_backward(const T* dy, const Batch<T>& x, const FirFilter<T>& f, T* dx, T* dtail, double* sums,
                     int64_t segments, int64_t b, int64_t l, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const int64_t d = f.channels, k = f.k, size = (k + 1) * d, vectors = (d + L - 1) / L, start = x.tail ? 1 - k : 0;
  const int64_t blocks = (l - start + kMediumSteps - 1) / kMediumSteps;
  parallel(threads, segments * vectors, [&](int64_t task) {
    const int64_t ch = task % vectors * L, lanes = std::min(L, d - ch), segment = task / vectors;
    double* sum = sums + segment * size + ch;
    for (int64_t j = 0; j <= k; ++j) std::fill(sum + j * d, sum + j * d + lanes, 0.0);
    Scratch<T> taps(k * L), inputs(kMediumSteps * L), errors((kMediumSteps + k - 1) * L), results(kMediumSteps * L),
        dtaps(k * L);
    take_taps<T>(f, ch, lanes, false, taps);
    for (int64_t i = segment * b * blocks / segments; i < (segment + 1) * b * blocks / segments; ++i) {
      const int64_t row = i / blocks, from = start + i % blocks * kMediumSteps, n = std::min(kMediumSteps, l - from);
      const int64_t end = std::min(l, from + n + k - 1);
      fir_pack<T>(x.at(row, k, d), k, ch, lanes, from, from + n, inputs);
      fir_pack<T>({dy + row * l * d, d, nullptr, 0}, k, ch, lanes, from, end, errors);
      std::fill(errors + (end - from) * L, errors + (n + k - 1) * L, T(0));
      fir_correlate<T>(taps, k, errors, n, results, Vec<T>{});
      fir_correlate<T>(inputs, n, errors, k, dtaps, Vec<T>{});
      Vec<T> dbias = {};
      for (int64_t t = 0; t < n; ++t) {
        dbias = dbias + load(errors + t * L);
        T* to = from + t >= 0 ? dx + (row * l + from + t) * d : dtail + (row * (k - 1) + k - 1 + from + t) * d;
        store(to + ch, load(results + t * L), lanes);
      }
      for (int64_t j = 0; j < k; ++j) fir_add<T>(sum + j * d, load(dtaps + j * L), lanes);
      fir_add<T>(sum + k * d, dbias, lanes);
    }
  });
}

template <typename T>
void backward(const T* dy, const Batch<T>& x, const FirFilter<T>& f, int64_t groups, T* dx, T* dtaps, T* dbias,
              T* dskip, T* dtail, int64_t b, int64_t l, int64_t threads) {
  const int64_t d = f.channels, k = f.k, vectors = (d + kLanes<T> - 1) / kLanes<T>;
  if (!l && dtail) std::fill(dtail, dtail + b * (k - 1) * d, T(0));
  const Segments segments(b, l);
  // Tasks enough for 16 threads; each segment costs k + 1 rows of doubles.
  const int64_t enough = (15 + vectors) / std::max<int64_t>(1, vectors);
  const int64_t count = k <= kFirShort ? segments.count : std::min(segments.count, enough);
  Scratch<double> sums(count * (k + 1) * d);
  if (k <= kFirShort)
    short_backward<T>(dy, x, f, dx, dtail, sums, segments, l, threads);
  else if (count)
    medium_backward<T>(dy, x, f, dx, dtail, sums, count, b, l, threads);
  finish_sums<T>(sums, count, groups, k, d, dtaps, dbias, dskip);
}

}  // namespace

#define CROCUTA_FIR(dtype, T)                                                                                          \
  CROCUTA_EXPORT void CROCUTA_NAME(fir_gate_forward, dtype)(                                                           \
      const T* z, int64_t z_row, int64_t z_step, const T* taps, const T* bias, const T* tail, T* x2, T* u, int64_t b,  \
      int64_t l, int64_t d, int64_t k, int64_t threads) {                                                              \
    const Packed<T> packed(taps, bias, nullptr, 3 * d, k, 3 * d);                                                      \
    gate_forward<T>({z, z_row, z_step, tail}, packed.filter, x2, u, b, l, threads);                                    \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(fir_gate_backward, dtype)(                                                          \
      const T* dx2, const T* du, const T* z, int64_t z_row, int64_t z_step, const T* taps, const T* bias,              \
      const T* tail, T* dz, T* dtaps, T* dbias, T* dtail, int64_t b, int64_t l, int64_t d, int64_t k,                  \
      int64_t threads) {                                                                                               \
    const Packed<T> packed(taps, bias, nullptr, 3 * d, k, 3 * d);                                                      \
    gate_backward<T>(dx2, du, {z, z_row, z_step, tail}, packed.filter, dz, dtaps, dbias, dtail, b, l, threads);        \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(fir_forward, dtype)(                                                                \
      const T* u, int64_t u_row, int64_t u_step, const T* taps, const T* bias, const T* skip, const T* tail, T* y,     \
      int64_t b, int64_t l, int64_t d, int64_t g, int64_t k, int64_t threads) {                                        \
    const Packed<T> packed(taps, bias, skip, g, k, d);                                                                 \
    (k <= kFirShort ? short_forward<T> : medium_forward<T>)({u, u_row, u_step, tail}, packed.filter, y, b, l, threads);\
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(fir_backward, dtype)(                                                               \
      const T* dy, const T* u, int64_t u_row, int64_t u_step, const T* taps, const T* skip, const T* tail, T* du,      \
      T* dtaps, T* dbias, T* dskip, T* dtail, int64_t b, int64_t l, int64_t d, int64_t g, int64_t k,                   \
      int64_t threads) {                                                                                               \
    const Packed<T> packed(taps, nullptr, skip, g, k, d);                                                              \
    backward<T>(dy, {u, u_row, u_step, tail}, packed.filter, g, du, dtaps, dbias, dskip, dtail, b, l, threads);        \
  }

CROCUTA_FIR(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_FIR(f64, double)
#endif
