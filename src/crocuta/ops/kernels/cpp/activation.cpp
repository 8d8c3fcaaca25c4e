// What stands between the products of an MLP: act(a), or act(a) b with a gate, and its adjoint, each in one pass.

#include "activation.h"

#include <algorithm>
#include <type_traits>

#include "threads.h"

namespace {

constexpr int64_t kElements = 1 << 14;  // of a task

// Products [rows][columns] without their biases, which are added here: a pass less over memory. b is null without a
// gate, a bias where there is none.
template <typename T>
struct Products {
  const T *a, *a_bias, *b, *b_bias;
  int64_t rows, columns;

  Vec<T> first(int64_t row, int64_t i, int64_t count) const { return sum(a, a_bias, row, i, count); }
  Vec<T> factor(int64_t row, int64_t i, int64_t count) const { return sum(b, b_bias, row, i, count); }

  // body(row, column, count, place) for every vector.
  template <typename Body>
  void over_vectors(int64_t threads, Body&& body) const {
    const int64_t turn = std::max<int64_t>(1, kElements / std::max<int64_t>(1, columns));
    parallel(threads, (rows + turn - 1) / turn, [&](int64_t task) {
      for (int64_t row = task * turn; row < std::min(rows, (task + 1) * turn); ++row) {
        int64_t i = 0;
        for (; i + kLanes<T> <= columns; i += kLanes<T>) body(row, i, kLanes<T>, row * columns + i);
        if (i < columns) body(row, i, columns - i, row * columns + i);
      }
    });
  }

 private:
  Vec<T> sum(const T* values, const T* bias, int64_t row, int64_t i, int64_t count) const {
    const Vec<T> value = load(values + row * columns + i, count);
    return bias ? value + load(bias + i, count) : value;
  }
};

// h = act(a), times b where it is there.
template <typename T, int64_t activation>
void forward(const Products<T>& p, T* h, int64_t threads) {
  p.over_vectors(threads, [&](int64_t row, int64_t i, int64_t count, int64_t at) {
    Vec<T> unused;
    const Vec<T> value = activate<T, activation, false>(p.first(row, i, count), unused);
    store(h + at, p.b ? value * p.factor(row, i, count) : value, count);
  });
}

// h again, and from its adjoint dh those of a and b. da may be where dh is.
template <typename T, int64_t activation>
void backward(const Products<T>& p, const T* dh, T* h, T* da, T* db, int64_t threads) {
  p.over_vectors(threads, [&](int64_t row, int64_t i, int64_t count, int64_t at) {
    Vec<T> slope;
    const Vec<T> value = activate<T, activation, true>(p.first(row, i, count), slope), d = load(dh + at, count);
    if (p.b) {
      const Vec<T> factor = p.factor(row, i, count);
      store(h + at, value * factor, count);
      store(da + at, d * factor * slope, count);
      store(db + at, d * value, count);
    } else {
      store(h + at, value, count);
      store(da + at, d * slope, count);
    }
  });
}

// Calls work with the activation as a constant.
template <typename Work>
void with(int64_t activation, Work&& work) {
  switch (activation) {
    case kSilu:
      return work(std::integral_constant<int64_t, kSilu>{});
    case kGelu:
      return work(std::integral_constant<int64_t, kGelu>{});
    case kGeluTanh:
      return work(std::integral_constant<int64_t, kGeluTanh>{});
    default:
      return work(std::integral_constant<int64_t, kIdentity>{});
  }
}

}  // namespace

#define CROCUTA_ACTIVATION(dtype, T)                                                                                   \
  CROCUTA_EXPORT void CROCUTA_NAME(activation_forward, dtype)(const T* a, const T* a_bias, const T* b,                 \
                                                              const T* b_bias, T* h, int64_t rows, int64_t columns,    \
                                                              int64_t activation, int64_t threads) {                   \
    const Products<T> products{a, a_bias, b, b_bias, rows, columns};                                                   \
    with(activation, [&](auto kind) { forward<T, decltype(kind)::value>(products, h, threads); });                     \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(activation_backward, dtype)(                                                        \
      const T* a, const T* a_bias, const T* b, const T* b_bias, const T* dh, T* h, T* da, T* db, int64_t rows,         \
      int64_t columns, int64_t activation, int64_t threads) {                                                          \
    const Products<T> products{a, a_bias, b, b_bias, rows, columns};                                                   \
    with(activation, [&](auto kind) { backward<T, decltype(kind)::value>(products, dh, h, da, db, threads); });        \
  }

CROCUTA_ACTIVATION(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_ACTIVATION(f64, double)
#endif
