// The window of implicit filters, e^(-rate t) + shift, times the taps: nothing but taps is ever in memory.

#include "activation.h"
#include "threads.h"

namespace {

// Tap i of a row lies at t = i delta.
template <typename T>
struct Window {
  const T* rates;
  double delta;
  T shift;
  int64_t groups, taps;

  // body(at, count, t, e^(-rate t)) for every vector of a row of taps.
  template <typename Body>
  CROCUTA_INLINE void over_row(int64_t group, Body&& body) const {
    const Vec<T> rate = splat(rates[group]);
    Vec<T> lane;
    for (int64_t i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<T>(static_cast<double>(i) * delta);
    for (int64_t at = 0; at < taps; at += kLanes<T>) {
      const Vec<T> t = lane + static_cast<T>(static_cast<double>(at) * delta);
      body(at, taps - at, t, vector_exp<T>(-rate * t));
    }
  }
};

template <typename T>
void forward(const Window<T>& w, const T* x, T* y, int64_t threads) {
  parallel(threads, w.groups, [&](int64_t group) {
    const int64_t row = group * w.taps;
    w.over_row(group, [&](int64_t at, int64_t count, Vec<T>, Vec<T> decay) {
      store(y + row + at, load(x + row + at, count) * (decay + w.shift), count);
    });
  });
}

// dx, and drates where it is asked for: -sum of dy x t e^(-rate t).
template <typename T>
void backward(const Window<T>& w, const T* dy, const T* x, T* dx, T* drates, int64_t threads) {
  parallel(threads, w.groups, [&](int64_t group) {
    const int64_t row = group * w.taps;
    double sum = 0;
    Vec<T> some = {};
    w.over_row(group, [&](int64_t at, int64_t count, Vec<T> t, Vec<T> decay) {
      const Vec<T> d = load(dy + row + at, count);
      store(dx + row + at, d * (decay + w.shift), count);
      if (!drates) return;
      some = some + d * load(x + row + at, count) * t * decay;  // zero behind the end, as d is
      if (at % (64 * kLanes<T>) == 0 || count <= kLanes<T>) {
        for (int64_t i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(some[i]);
        some = Vec<T>{};
      }
    });
    if (drates) drates[group] = static_cast<T>(-sum);
  });
}

}  // namespace

#define CROCUTA_WINDOW(dtype, T)                                                                                       \
  CROCUTA_EXPORT void CROCUTA_NAME(window_forward, dtype)(const T* x, const T* rates, double shift, double delta,      \
                                                          T* y, int64_t groups, int64_t taps, int64_t threads) {       \
    forward<T>({rates, delta, static_cast<T>(shift), groups, taps}, x, y, threads);                                    \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(window_backward, dtype)(                                                            \
      const T* dy, const T* x, const T* rates, double shift, double delta, T* dx, T* drates, int64_t groups,           \
      int64_t taps, int64_t threads) {                                                                                 \
    backward<T>({rates, delta, static_cast<T>(shift), groups, taps}, dy, x, dx, drates, threads);                      \
  }

CROCUTA_WINDOW(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_WINDOW(f64, double)
#endif
