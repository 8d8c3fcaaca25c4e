// Norms of rows, with the residual that comes before them: s = x + y, n = norm(s), in one pass over memory each way.

#include <algorithm>
#include <cmath>
#include <memory>

#include "simd.h"
#include "threads.h"

namespace {

// The numbers are those of crocuta.ops.kernels.norm: 1 / sqrt(mean x^2 + eps), 1 / (sqrt(mean x^2) + eps), and
// the first of x - mean x.
enum Kind : int64_t { kRmsInside, kRmsOutside, kLayer };

constexpr int64_t kRows = 64;  // of a task, whatever the threads: sums over rows then have one order

template <typename T>
CROCUTA_INLINE T total(Vec<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// Calls body(at, count) for the vectors of a row; count is known to be a whole vector for all but the last.
template <typename T, typename Body>
CROCUTA_INLINE void over_row(int64_t d, Body&& body) {
  int64_t at = 0;
  for (; at + kLanes<T> <= d; at += kLanes<T>) body(at, kLanes<T>);
  if (at < d) body(at, d - at);
}

// The sum over a row of what body(at, count) gives: lanes behind the end must be zero.
template <typename T, typename Body>
CROCUTA_INLINE T row_sum(int64_t d, Body&& body) {
  Vec<T> even = {}, odd = {};
  over_row<T>(d, [&](int64_t at, int64_t count) {
    const Vec<T> sum = odd + body(at, count);  // two accumulators, taken in turns
    odd = even;
    even = sum;
  });
  return total<T>(even + odd);
}

template <typename T>
struct Rows {
  const T *scale, *bias;
  T eps;
  int64_t kind, count, d;

  template <typename Work>
  void tasks(int64_t threads, Work&& work) const {
    parallel(threads, (count + kRows - 1) / kRows,
             [&](int64_t task) { work(task, task * kRows, std::min(count, (task + 1) * kRows)); });
  }
};

// `middle` and `inverse` [rows] are what the backward pass needs of each row: mean x (layer) or sqrt(mean x^2).
template <typename T>
void forward(const Rows<T>& r, const T* x, const T* y, T* s, T* n, T* middle, T* inverse, int64_t threads) {
  r.tasks(threads, [&](int64_t, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      const T* in = x + row * r.d;
      if (y) {
        T* sum = s + row * r.d;
        over_row<T>(r.d, [&](int64_t at, int64_t count) {
          store(sum + at, load(in + at, count) + load(y + row * r.d + at, count), count);
        });
        in = sum;
      }
      T mean = 0;
      if (r.kind == kLayer)
        mean = row_sum<T>(r.d, [&](int64_t at, int64_t count) { return load(in + at, count); }) / T(r.d);
      Vec<T> offset = splat(mean);
      const T square = row_sum<T>(r.d, [&](int64_t at, int64_t count) {
        Vec<T> v = load(in + at, count) - offset;
        for (int64_t i = count; i < kLanes<T>; ++i) v[i] = 0;
        return v * v;
      }) / T(r.d);
      const T rms = std::sqrt(square);
      const T factor = r.kind == kRmsOutside ? T(1) / (rms + r.eps) : T(1) / std::sqrt(square + r.eps);
      middle[row] = r.kind == kLayer ? mean : rms;
      inverse[row] = factor;
      over_row<T>(r.d, [&](int64_t at, int64_t count) {
        Vec<T> v = (load(in + at, count) - offset) * factor * load(r.scale + at, count);
        if (r.bias) v = v + load(r.bias + at, count);
        store(n + row * r.d + at, v, count);
      });
    }
  });
}

// dx from dn, and ds where s is used further. dscale and dbias: float sums over the rows of a task, added as doubles.
template <typename T>
void backward(const Rows<T>& r, const T* ds, const T* dn, const T* s, const T* middle, const T* inverse, T* dx,
              T* dscale, T* dbias, int64_t threads) {
  const int64_t tasks = (r.count + kRows - 1) / kRows;
  const std::unique_ptr<T[]> sums(new T[static_cast<size_t>(2 * tasks * r.d)]());
  r.tasks(threads, [&](int64_t task, int64_t from, int64_t to) {
    T *of_scale = sums.get() + 2 * task * r.d, *of_bias = of_scale + r.d;
    for (int64_t row = from; row < to; ++row) {
      const T *in = s + row * r.d, *g = dn + row * r.d, *more = ds ? ds + row * r.d : nullptr;
      const T mean = r.kind == kLayer ? middle[row] : T(0), rms = middle[row], factor = inverse[row];
      const Vec<T> offset = splat(mean);
      Vec<T> along = {}, sum = {};  // of dn scale (s - mean), and of dn scale
      over_row<T>(r.d, [&](int64_t at, int64_t count) {
        const Vec<T> gradient = load(g + at, count), scaled = gradient * load(r.scale + at, count);
        const Vec<T> centred = load(in + at, count) - offset;  // gradients are zero behind the end
        along = along + scaled * centred;
        sum = sum + scaled;
        store(of_scale + at, load(of_scale + at, count) + gradient * centred * factor, count);
        store(of_bias + at, load(of_bias + at, count) + gradient, count);
      });
      // d(factor)/dx = -slope x: factor^3 / d inside the root, factor^2 / (d rms) outside. A row of zeros has no
      // direction, and the floor keeps 1 / (eps^2 rms) finite in float32 while it is far below any eps.
      const T slope = r.kind == kRmsOutside ? factor * factor / (T(r.d) * std::max(rms, T(1e-20)))
                                            : factor * factor * factor / T(r.d);
      const T back = total<T>(along) * slope, lift = r.kind == kLayer ? total<T>(sum) * factor / T(r.d) : T(0);
      over_row<T>(r.d, [&](int64_t at, int64_t count) {
        const Vec<T> scaled = load(g + at, count) * load(r.scale + at, count);
        Vec<T> v = scaled * factor - (load(in + at, count) - offset) * back - lift;
        if (more) v = v + load(more + at, count);
        store(dx + row * r.d + at, v, count);
      });
    }
  });
  const std::unique_ptr<double[]> wide(new double[static_cast<size_t>(2 * r.d)]());
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < 2 * r.d; ++i) wide[i] += static_cast<double>(sums[2 * task * r.d + i]);
  for (int64_t i = 0; i < r.d; ++i) {
    dscale[i] = static_cast<T>(wide[i]);
    if (dbias) dbias[i] = static_cast<T>(wide[r.d + i]);
  }
}

}  // namespace

#define CROCUTA_NORM(dtype, T)                                                                                         \
  CROCUTA_EXPORT void CROCUTA_NAME(norm_forward, dtype)(                                                               \
      const T* x, const T* y, const T* scale, const T* bias, double eps, T* s, T* n, T* middle, T* inverse,            \
      int64_t rows, int64_t d, int64_t kind, int64_t threads) {                                                        \
    forward<T>({scale, bias, static_cast<T>(eps), kind, rows, d}, x, y, s, n, middle, inverse, threads);               \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(norm_backward, dtype)(                                                              \
      const T* ds, const T* dn, const T* s, const T* scale, double eps, const T* middle, const T* inverse, T* dx,      \
      T* dscale, T* dbias, int64_t rows, int64_t d, int64_t kind, int64_t threads) {                                   \
    backward<T>({scale, nullptr, static_cast<T>(eps), kind, rows, d}, ds, dn, s, middle, inverse, dx, dscale, dbias,   \
                threads);                                                                                              \
  }

CROCUTA_NORM(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_NORM(f64, double)
#endif
