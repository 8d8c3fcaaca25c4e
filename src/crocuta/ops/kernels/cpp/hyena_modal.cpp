// What a Hyena mixer with a modal filter does between its two projections, in one pass over memory:
//
//     (x2, x1, v) = FIR(z) + bias,   u = x1 v,   y = x2 (h * u + D u)
//
// Each block of time is filtered, gated, scanned and gated again for one or two vectors of channels while it lies in
// the first cache; nothing between z and y reaches memory. Backward makes all of it again from z and the kept states.

#include "fir.h"
#include "modal.h"

namespace {

// z [b][l][3 d] with strides in elements, tail [b][k - 1][3 d] or null, taps [3 d][k], bias [3 d] or null; the rest as
// in modal.cpp.
template <typename T, bool Complex>
void forward(const T* z, int64_t z_row, int64_t z_step, const T* tail, const T* taps, const T* bias, int64_t k,
             const T* constants, const T* skip, const T* state, const int64_t* lengths, T* y, T* last, T* kept, int64_t b,
             int64_t l, int64_t d, int64_t n, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const ModalWalk<T, Complex> walk(constants, lengths, b, l, d, n, threads);
  const std::unique_ptr<T[]> packed(new T[static_cast<size_t>(3 * d * k)]);
  fir_pack_taps(taps, 3 * d, k, 3 * d, packed.get());
  const FirFilter<T> fir{packed.get(), bias, k, 3 * d};
  const bool two = scan_two<T, Complex>(n);
  walk.tasks([&](int64_t row, int64_t from, int64_t to) {
    const FirInputs<T> in{z + row * z_row, z_step, tail ? tail + row * (k - 1) * 3 * d : nullptr, 3 * d};
    T *s = last + row * walk.size, *outputs = y + row * l * d;
    alignas(64) T x2[kBlock * 2 * L], u[kBlock * 2 * L], h[kBlock * 2 * L];
    const auto block = [&](int64_t start, int64_t steps, const T* c) {
      T* out = outputs + start * d;
      int64_t ch = from;
      for (; two && ch + 2 * L <= to; ch += 2 * L) {
        fir_gate_block(fir, in, ch, L, start, steps, FirGateOutputs<T>{x2, u, nullptr, nullptr, 2 * L});
        fir_gate_block(fir, in, ch + L, L, start, steps, FirGateOutputs<T>{x2 + L, u + L, nullptr, nullptr, 2 * L});
        scan_block<T, Complex, 2>(walk.modes, ch, L, c, skip, u, 2 * L, h, 2 * L, s, steps);
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t w = 0; w < 2 * L; w += L)
            store(out + t * d + ch + w, load(x2 + t * 2 * L + w) * load(h + t * 2 * L + w));
      }
      for (; ch < to; ch += L) {
        const int64_t lanes = std::min(L, to - ch);
        fir_gate_block(fir, in, ch, lanes, start, steps, FirGateOutputs<T>{x2, u, nullptr, nullptr, L});
        scan_block<T, Complex, 1>(walk.modes, ch, lanes, c, skip, u, L, h, L, s, steps);
        for (int64_t t = 0; t < steps; ++t) store(out + t * d + ch, load(x2 + t * L) * load(h + t * L), lanes);
      }
    };
    walk.forwards(row, from, to, state, last, kept, block,
                  [&](int64_t start, int64_t count) { clear_rows(outputs + start * d, d, from, to, count); });
  });
}

// dy with strides in elements; dlast, dstate [b][parts n][d]; dz [b][l][3 d], dtail [b][k - 1][3 d]; sums in double:
// short_sums [b][k + 1][3 d] of taps and bias, sums [b][2 parts n + 1][d] of p, R and D.
template <typename T, bool Complex>
void backward(const T* dy, int64_t dy_row, int64_t dy_step, const T* z, int64_t z_row, int64_t z_step, const T* tail,
              const T* taps, const T* bias, int64_t k, const T* constants, const T* skip, const T* kept, const T* dlast,
              const int64_t* lengths, T* dz, T* dtail, T* dstate, double* short_sums, double* sums, int64_t b, int64_t l,
              int64_t d, int64_t n, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const ModalWalk<T, Complex> walk(constants, lengths, b, l, d, n, threads);
  const std::unique_ptr<T[]> packed(new T[static_cast<size_t>(3 * d * k)]);
  fir_pack_taps(taps, 3 * d, k, 3 * d, packed.get());
  const FirFilter<T> fir{packed.get(), bias, k, 3 * d};
  const int64_t past = k - 1, third = (kBlock + past) * L;
  const bool far = writes_far(dz, 3 * b * l * d, d);
  walk.tasks([&](int64_t row, int64_t from, int64_t to) {
    const FirInputs<T> in{z + row * z_row, z_step, tail ? tail + row * past * 3 * d : nullptr, 3 * d};
    T *carry = dstate + row * walk.size, *gradients = dz + row * l * 3 * d, *before = dtail + row * past * 3 * d;
    double *sum = sums + row * (2 * walk.size + d), *sum_skip = sum + 2 * walk.size;
    double* short_sum = short_sums + row * (k + 1) * 3 * d;
    clear_rows(sum, d, from, to, 2 * walk.size / d + 1);
    for (int64_t part = 0; part < 3; ++part) {
      clear_rows(short_sum + part * d, 3 * d, from, to, k + 1);
      clear_rows(before + part * d, 3 * d, from, to, past);
    }
    const FirGradients<T> out{gradients, 3 * d, tail ? before : nullptr, 3 * d, short_sum, far};
    alignas(64) Vec<T> states[kKeptVectors<T, Complex>];
    alignas(64) T x2[kBlock * L], x1[kBlock * L], v[kBlock * L], u[kBlock * L], h[kBlock * L], e[kBlock * L], du[kBlock * L];
    // Gradients of the thirds of a block, and behind them the first of the block after: kept for each vector of channels.
    const std::unique_ptr<T[]> thirds(new T[static_cast<size_t>(3 * third)]);
    const int64_t vectors = (to - from + L - 1) / L;
    const std::unique_ptr<T[]> later(new T[static_cast<size_t>(vectors * 3 * past * L)]());
    const auto block = [&](int64_t start, int64_t steps, const T* c, const T* state) {
      for (int64_t ch = from; ch < to; ch += L) {
        const int64_t lanes = std::min(L, to - ch);
        fir_gate_block(fir, in, ch, lanes, start, steps, FirGateOutputs<T>{x2, u, x1, v, L});
        const T* error = dy + row * dy_row + start * dy_step + ch;
        T *dx2 = thirds.get(), *dx1 = dx2 + third, *dv = dx1 + third;
        for (int64_t t = 0; t < steps; ++t) {
          const Vec<T> here = load(error + t * dy_step, lanes);
          store(dx2 + t * L, here);
          store(e + t * L, here * load(x2 + t * L));
        }
        scan_block_adjoint<T, Complex, true>(walk.modes, ch, lanes, c, skip, u, L, e, L, du, L, state, carry, sum,
                                             sum_skip, h, states, steps);
        for (int64_t t = 0; t < steps; ++t) {
          const Vec<T> here = load(du + t * L);
          store(dx2 + t * L, load(dx2 + t * L) * load(h + t * L));
          store(dx1 + t * L, here * load(v + t * L));
          store(dv + t * L, here * load(x1 + t * L));
        }
        T* halo = later.get() + (ch - from) / L * 3 * past * L;
        for (int64_t part = 0; part < 3; ++part)
          std::copy(halo + part * past * L, halo + (part + 1) * past * L, dx2 + part * third + steps * L);
        fir_gate_adjoint_block<T>(fir, in, ch, lanes, start, steps, dx2, third, L, out);
        for (int64_t part = 0; part < 3; ++part)
          std::copy(dx2 + part * third, dx2 + part * third + past * L, halo + part * past * L);
      }
    };
    walk.backwards(row, from, to, kept, dlast, dstate, block, [&](int64_t start, int64_t count) {
      for (int64_t part = 0; part < 3; ++part) clear_rows(gradients + start * 3 * d + part * d, 3 * d, from, to, count);
    });
    if (far) stored_far();
  });
}

}  // namespace

#define CROCUTA_HYENA_MODAL(dtype, T)                                                                                  \
  CROCUTA_EXPORT void CROCUTA_NAME(hyena_modal_forward, dtype)(                                                        \
      const T* z, int64_t z_row, int64_t z_step, const T* tail, const T* taps, const T* bias, int64_t k,               \
      const T* constants, const T* skip, const T* state, const int64_t* lengths, T* y, T* last, T* kept, int64_t b,    \
      int64_t l, int64_t d, int64_t n, int64_t complex, int64_t threads) {                                             \
    (complex ? forward<T, true> : forward<T, false>)(z, z_row, z_step, tail, taps, bias, k, constants, skip, state,    \
                                                     lengths, y, last, kept, b, l, d, n, threads);                     \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(hyena_modal_backward, dtype)(                                                       \
      const T* dy, int64_t dy_row, int64_t dy_step, const T* z, int64_t z_row, int64_t z_step, const T* tail,          \
      const T* taps, const T* bias, int64_t k, const T* constants, const T* skip, const T* kept, const T* dlast,       \
      const int64_t* lengths, T* dz, T* dtail, T* dstate, double* short_sums, double* sums, int64_t b, int64_t l,      \
      int64_t d, int64_t n, int64_t complex, int64_t threads) {                                                        \
    (complex ? backward<T, true> : backward<T, false>)(dy, dy_row, dy_step, z, z_row, z_step, tail, taps, bias, k,     \
                                                       constants, skip, kept, dlast, lengths, dz, dtail, dstate,       \
                                                       short_sums, sums, b, l, d, n, threads);                         \
  }

CROCUTA_HYENA_MODAL(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_HYENA_MODAL(f64, double)
#endif
