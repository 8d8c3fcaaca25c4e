// The exact online convolution (online_conv.h) as calls of its own: a token of every row, and spectra to be kept.

#include "online_conv.h"

#include "threads.h"

// u and y [b][d]; row r has read lengths[r] inputs. Bound: the long buffer [b][room] with rows of d channels, near
// [b][kBlock][d], and the filter (Taps).
#define CROCUTA_ONLINE_CONV(dtype, T)                                                                                  \
  CROCUTA_EXPORT void CROCUTA_NAME(online_conv_lanes, dtype)(int64_t * lanes) { *lanes = kLanes<T>; }                  \
  CROCUTA_EXPORT void CROCUTA_NAME(online_conv_spectrum, dtype)(const T* taps, T* spectrum, int64_t size, int64_t d,   \
                                                                int64_t g, int64_t k, int64_t threads) {               \
    const Taps<T> filter{taps, nullptr, nullptr, d, g, k, 0};                                                          \
    parallel(threads, (d + kLanes<T> - 1) / kLanes<T>, [&](int64_t vector) {                                           \
      tile_spectrum(filter, size, vector, spectrum + vector * spaced(size) * kPoint<T>);                               \
    });                                                                                                                \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(online_conv_step, dtype)(const int64_t* bound, const T* u, int64_t* lengths, T* y) {\
    const int64_t threads = bound[kThreads];                                                                           \
    online_rows<T>(bound, u, lengths, y, [&](int64_t tasks, const auto& work) {                                        \
      parallel(threads, tasks, [&](int64_t task) { work(task); });                                                     \
    });                                                                                                                \
  }

CROCUTA_ONLINE_CONV(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_ONLINE_CONV(f64, double)
#endif
