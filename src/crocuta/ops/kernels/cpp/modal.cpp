// The modal filter alone: outputs, final state and gradients for channels-last input.

#include "modal.h"

namespace {

// u with strides in elements; state, last [b][parts n][d]; kept [b][blocks][parts n][d] or null: the state before each
// block; lengths [b] or null.
template <typename T, bool Complex>
void forward(const T* u, int64_t u_row, int64_t u_step, const T* constants, const T* skip, const T* state,
             const int64_t* lengths, T* y, T* last, T* kept, int64_t b, int64_t l, int64_t d, int64_t n,
             int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const ModalWalk<T, Complex> walk(constants, lengths, b, l, d, n, threads);
  const bool two = scan_two<T, Complex>(n);
  walk.tasks([&](int64_t row, int64_t from, int64_t to) {
    T* s = last + row * walk.size;
    T* outputs = y + row * l * d;
    alignas(64) T padded_u[kBlock * L], padded_y[kBlock * L];
    const auto block = [&](int64_t start, int64_t steps, const T* c) {
      const T* in = u + row * u_row + start * u_step;
      T* out = outputs + start * d;
      int64_t ch = from;
      for (; two && ch + 2 * L <= to; ch += 2 * L)
        scan_block<T, Complex, 2>(walk.modes, ch, L, c, skip, in + ch, u_step, out + ch, d, s, steps);
      for (; ch + L <= to; ch += L)
        scan_block<T, Complex, 1>(walk.modes, ch, L, c, skip, in + ch, u_step, out + ch, d, s, steps);
      if (ch == to) return;
      for (int64_t t = 0; t < steps; ++t) store(padded_u + t * L, load(in + t * u_step + ch, to - ch));
      scan_block<T, Complex, 1>(walk.modes, ch, to - ch, c, skip, padded_u, L, padded_y, L, s, steps);
      for (int64_t t = 0; t < steps; ++t) store(out + t * d + ch, load(padded_y + t * L), to - ch);
    };
    walk.forwards(row, from, to, state, last, kept, block,
                  [&](int64_t start, int64_t count) { clear_rows(outputs + start * d, d, from, to, count); });
  });
}

// dlast [b][parts n][d] or null; dstate [b][parts n][d]; sums [b][2 parts n + 1][d] of p, R and D, in double.
template <typename T, bool Complex>
void backward(const T* dy, int64_t dy_row, int64_t dy_step, const T* u, int64_t u_row, int64_t u_step,
              const T* constants, const T* skip, const T* kept, const T* dlast, const int64_t* lengths, T* du, T* dstate,
              double* sums, int64_t b, int64_t l, int64_t d, int64_t n, int64_t threads) {
  constexpr int64_t L = kLanes<T>;
  const ModalWalk<T, Complex> walk(constants, lengths, b, l, d, n, threads);
  const bool far = writes_far(du, b * l * d, d);
  walk.tasks([&](int64_t row, int64_t from, int64_t to) {
    T *carry = dstate + row * walk.size, *gradients = du + row * l * d;
    double *sum = sums + row * (2 * walk.size + d), *sum_skip = sum + 2 * walk.size;
    clear_rows(sum, d, from, to, 2 * walk.size / d + 1);
    alignas(64) Vec<T> states[kKeptVectors<T, Complex>];
    // Each group of modes reads u and dy and adds to du: near, as rows of tensors drive each other out of the first cache.
    alignas(64) T near_u[kBlock * L], near_dy[kBlock * L], near_du[kBlock * L];
    const auto block = [&](int64_t start, int64_t steps, const T* c, const T* before) {
      for (int64_t ch = from; ch < to; ch += L) {
        const int64_t lanes = std::min(L, to - ch);
        const T *in = u + row * u_row + start * u_step + ch, *error = dy + row * dy_row + start * dy_step + ch;
        T* out = gradients + start * d + ch;
        for (int64_t t = 0; t < steps; ++t) {
          store(near_u + t * L, load(in + t * u_step, lanes));
          store(near_dy + t * L, load(error + t * dy_step, lanes));
        }
        scan_block_adjoint<T, Complex, false>(walk.modes, ch, lanes, c, skip, near_u, L, near_dy, L, near_du, L, before,
                                              carry, sum, sum_skip, nullptr, states, steps);
        for (int64_t t = 0; t < steps; ++t) {
          if (far) store_far(out + t * d, load(near_du + t * L));
          else store(out + t * d, load(near_du + t * L), lanes);
        }
      }
    };
    walk.backwards(row, from, to, kept, dlast, dstate, block,
                   [&](int64_t start, int64_t count) { clear_rows(gradients + start * d, d, from, to, count); });
    if (far) stored_far();
  });
}

}  // namespace

#define CROCUTA_MODAL(dtype, T)                                                                                        \
  CROCUTA_EXPORT void CROCUTA_NAME(modal_forward, dtype)(                                                              \
      const T* u, int64_t u_row, int64_t u_step, const T* constants, const T* skip, const T* state,                    \
      const int64_t* lengths, T* y, T* last, T* kept, int64_t b, int64_t l, int64_t d, int64_t n, int64_t complex,     \
      int64_t threads) {                                                                                               \
    (complex ? forward<T, true> : forward<T, false>)(u, u_row, u_step, constants, skip, state, lengths, y, last, kept, \
                                                     b, l, d, n, threads);                                             \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(modal_backward, dtype)(                                                             \
      const T* dy, int64_t dy_row, int64_t dy_step, const T* u, int64_t u_row, int64_t u_step, const T* constants,     \
      const T* skip, const T* kept, const T* dlast, const int64_t* lengths, T* du, T* dstate, double* sums, int64_t b, \
      int64_t l, int64_t d, int64_t n, int64_t complex, int64_t threads) {                                             \
    (complex ? backward<T, true> : backward<T, false>)(dy, dy_row, dy_step, u, u_row, u_step, constants, skip, kept,   \
                                                       dlast, lengths, du, dstate, sums, b, l, d, n, threads);         \
  }

CROCUTA_MODAL(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_MODAL(f64, double)
#endif
