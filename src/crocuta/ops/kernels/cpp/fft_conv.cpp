// Causal convolution of whole sequences with long taps, for channels-last input: outputs and gradients.
//
//     y = g2 (h * w + D w),   w = g1 u       (g1 and g2 are gates that may be left out)
//
// Time is cut into blocks of N (a power of two). With U_m and H_j the spectra of blocks modulo x^N - i (fft.h), block m
// of h * w is the real part of what has the spectrum
//
//     Z_m = C_m - i C_(m-1),   C_m = sum_j H_j U_(m-j)
//         = sum_j G_j U_(m-j), G_j = H_j - i H_(j-1)
//
// where the lower half of the product C_m belongs to block m and its upper half to block m + 1. So any length costs
// what its own blocks cost, transforms stay near the processor, and both halves of a product are used. The adjoints are
// convolutions of reversed sequences: with e = reversed g2 dy, dw is reversed (h * e), and dh is reversed (w * e).
// Nothing but the inputs is kept for them.
//
// A task is one vector of channels; where there are fewer of them than threads, blocks are shared out. No sum depends
// on who does what.

#include <algorithm>

#include "columns.h"
#include "fft.h"
#include "fft_filter.h"
#include "fft_products.h"
#include "threads.h"

namespace {

constexpr int64_t kAhead = 16;  // rows that are fetched ahead: of other channels there is much between two of them

// --- spectra of blocks ------------------------------------------------------------------------------------------

struct Sizes {
  int64_t b, l, d, g, k, block, filter_blocks, threads;  // filter_blocks: G_j are there for j below it, 0 from it on

  int64_t taps() const { return std::min(k, l); }
  int64_t blocks() const { return (l + block - 1) / block; }
};

// The spectrum of block m of values (times a gate).
template <typename T>
void input_spectrum(const Plan<T>& plan, const Column<T>& values, const Column<T>& gate, int64_t length, int64_t m,
                    T* points) {
  const int64_t first = m * plan.size, count = length - first;
  const T* at = values.at + first * values.step;
  const int64_t ahead = kAhead * values.step;
  if (!gate) {
    transform_real(plan, points, [&](int64_t t) {
      __builtin_prefetch(at + t * values.step + ahead, 0, 2);
      return t < count ? load(at + t * values.step) : Vec<T>{};
    });
  } else {
    transform_real(plan, points,
                   [&](int64_t t) { return t < count ? values[first + t] * gate[first + t] : Vec<T>{}; });
  }
}

// Where point t of a block is.
template <typename T>
CROCUTA_INLINE T* point(T* points, int64_t block, int64_t t) {
  return points + (t / (block / 8) + t) * kPoint<T>;
}

// Spectra whose lanes are groups, for the channels of one vector.
template <typename T>
void spread_groups(const T* spectra, const Sizes& s, int64_t blocks, int64_t channel, T* points) {
  constexpr int64_t L = kLanes<T>;
  const int64_t repeat = s.d / s.g, size = s.filter_blocks * stride<T>(s.block);
  const int64_t last = std::min(channel + L, s.d) - 1;
  int64_t from[L];  // where the number for each lane is, from that of lane 0's vector on
  for (int64_t i = 0; i < L; ++i) {
    const int64_t group = std::min(channel + i, last) / repeat;
    from[i] = group / L * size + group % L;
  }
  const int64_t end = blocks * stride<T>(s.block);
  if (from[0] == from[L - 1]) {
    for (int64_t at = 0; at < end; at += L) store(points + at, splat(spectra[from[0] + at]));
    return;
  }
  for (int64_t at = 0; at < end; at += L)
    for (int64_t i = 0; i < L; ++i) points[at + i] = spectra[from[i] + at];
}

constexpr int64_t kFar = 3 << 20;  // bytes that a second-level cache no longer holds

// Calls work(offset) for the frequencies of one eighth of all blocks, and fetches those ahead: caches do not foresee so
// many streams.
template <typename T, typename Work>
CROCUTA_INLINE void each_frequency(const Sizes& s, int64_t eighth, const T* const* spectra, const int64_t* blocks,
                                   int count, Work&& work) {
  constexpr int64_t kRun = 8 * kPoint<T>, kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t step = stride<T>(s.block), at = eighth * spacing(s.block) * kPoint<T>;
  const int64_t end = at + s.block / 8 * kPoint<T>;
  int64_t streams = 0;
  for (int i = 0; i < count; ++i) streams += blocks[i];
  const bool far = streams * step * static_cast<int64_t>(sizeof(T)) > kFar;
  for (int64_t run = at; run < end; run += kRun) {
    if (far && run + kRun < end)
      for (int i = 0; i < count; ++i)
        for (int64_t m = 0; m < blocks[i]; ++m)
          for (int64_t line = 0; line < kRun; line += kLine)
            __builtin_prefetch(spectra[i] + m * step + run + kRun + line, 1, 2);
    for (int64_t f = run; f < run + kRun; f += kPoint<T>) work(f);
  }
}

// --- forward ----------------------------------------------------------------------------------------------------

template <typename T>
struct Filter {
  const T* taps;      // [g][k]
  const T* spectrum;  // of groups, [vectors of groups][blocks], or null: g = d, transform the taps
  const T* skip;      // [d] or null
};

// The spectra of the filter of one vector of channels.
template <typename T>
const T* filter_spectra(const Plan<T>& plan, const Filter<T>& filter, const Sizes& s, int64_t channel, int64_t threads,
                        T* own) {
  const int64_t blocks = std::min(s.blocks(), s.filter_blocks);
  const int64_t size = s.filter_blocks * stride<T>(s.block);
  if (filter.spectrum && s.g == s.d) return filter.spectrum + channel / kLanes<T> * size;
  if (filter.spectrum) spread_groups(filter.spectrum, s, blocks, channel, own);
  else
    parallel(threads, blocks, [&](int64_t j) {
      filter_spectrum(plan, Rows<T>(filter.taps, s.k, s.taps(), channel, s.d, 1), j, own + j * stride<T>(s.block));
    });
  return own;
}

// How threads are used: for vectors of channels, or, where these are few, inside each.
struct Share {
  Share(const Sizes& s, int64_t lanes)
      : vectors((s.d + lanes - 1) / lanes), outer(vectors >= s.threads ? s.threads : 1),
        inner(vectors >= s.threads ? 1 : s.threads) {}
  int64_t vectors, outer, inner;
};

// Memory for as many tasks as run at a time: fresh pages for every task would cost more than the task.
template <typename T>
class Workplaces {
 public:
  Workplaces(int64_t size, int64_t threads)
      : size_((size + 15) / 16 * 16), count_(threads), memory_(size_ * threads),
        taken_(new std::atomic<bool>[static_cast<size_t>(threads)]()) {}
  ~Workplaces() { delete[] taken_; }
  Workplaces(const Workplaces&) = delete;
  Workplaces& operator=(const Workplaces&) = delete;

  template <typename Work>
  void use(Work&& work) {
    int64_t place = 0;
    while (taken_[place].exchange(true, std::memory_order_acquire)) place = (place + 1) % count_;
    work(memory_ + place * size_);
    taken_[place].store(false, std::memory_order_release);
  }

 private:
  int64_t size_, count_;
  Scratch<T> memory_;
  std::atomic<bool>* taken_;
};

template <typename T>
void forward(const Tensor<const T>& u, const Tensor<const T>& g1, const Tensor<const T>& g2, const Filter<T>& filter,
             const Tensor<T>& y, const Sizes& s) {
  const Plan<T>& transforms = plan<T>(s.block);
  const Share share(s, kLanes<T>);
  const int64_t step = stride<T>(s.block), blocks = s.blocks(), own = std::min(blocks, s.filter_blocks);
  Workplaces<T> workplaces((blocks + (filter.spectrum && s.g == s.d ? 0 : own)) * step, share.outer);
  const auto task = [&](int64_t vector, T* spectra) {
    const int64_t channel = vector * kLanes<T>, lanes = std::min(kLanes<T>, s.d - channel);
    const T* g = filter_spectra(transforms, filter, s, channel, share.inner, spectra + blocks * step);
    const Vec<T> skip = filter.skip ? load(filter.skip + channel, lanes) : Vec<T>{};
    for (int64_t row = 0; row < s.b; ++row) {
      Columns<T> columns(row, channel, lanes, s.l, 4);
      const Column<T> in = columns.input(u), gate1 = columns.input(g1), gate2 = columns.input(g2);
      const Column<T> out = columns.output(y);
      parallel(share.inner, blocks, [&](int64_t m) {
        input_spectrum(transforms, in, gate1, s.l, m, spectra + m * step);
      });
      parallel(share.inner, 8, [&](int64_t eighth) {
        const T* const both[] = {spectra, g};
        const int64_t counts[] = {blocks, own};
        each_frequency(s, eighth, both, counts, 2, [&](int64_t f) {
          multiply_blocks(spectra + f, blocks, g + f, own, step);
        });
      });
      parallel(share.inner, blocks, [&](int64_t m) {
        const int64_t first = m * s.block, count = s.l - first;
        const auto each = [&](auto&& value) {
          inverse_real(transforms, spectra + m * step, [&](int64_t t, Vec<T> v) {
            __builtin_prefetch(out.at + (first + t + kAhead) * out.step, 1, 3);
            if (t < count) out.set(first + t, value(first + t, v));
          }, [] {});
        };
        if (gate1 || gate2)
          each([&](int64_t t, Vec<T> v) {
            const Vec<T> w = gate1 ? in[t] * gate1[t] : in[t], z = v + skip * w;
            return gate2 ? z * gate2[t] : z;
          });
        else if (filter.skip)
          each([&](int64_t t, Vec<T> v) {
            __builtin_prefetch(in.at + (t + kAhead) * in.step, 0, 2);
            return v + skip * in[t];
          });
        else
          each([&](int64_t, Vec<T> v) { return v; });
      });
      columns.put_back(out, y);
    }
  };
  parallel(share.outer, share.vectors, [&](int64_t vector) {
    workplaces.use([&](T* memory) { task(vector, memory); });
  });
}

// --- backward ---------------------------------------------------------------------------------------------------

template <typename T>
struct Gradients {
  Tensor<T> du, dg1, dg2;
  T* dtaps;                // [d][k]: of each channel
  double* dskip;           // [b blocks][d] or null
};

// What one vector of channels needs while its rows are gone through.
template <typename T>
struct Adjoint {
  const Plan<T>& plan;
  const Sizes& s;
  const Gradients<T>& to;
  int64_t channel, lanes, threads, step, blocks;
  int64_t first;  // block of the reversed sequence where the gradients of taps begin
  const T* g;
  Vec<T> skip;
  T *e, *w, *sums;  // spectra of g2 dy reversed, of g1 u, and of the gradients of taps
};

template <typename T>
CROCUTA_INLINE void add_to(double* to, Vec<T> value, int64_t lanes) {
  T each[kLanes<T>];
  store(each, value);
  for (int64_t i = 0; i < lanes; ++i) to[i] += static_cast<double>(each[i]);
}

template <typename T>
void backward_row(const Adjoint<T>& a, int64_t row, const Tensor<const T>& dy, const Tensor<const T>& u,
                  const Tensor<const T>& g1, const Tensor<const T>& g2) {
  const Sizes& s = a.s;
  Columns<T> columns(row, a.channel, a.lanes, s.l, 7);
  const Column<T> in = columns.input(u), gate1 = columns.input(g1), gate2 = columns.input(g2);
  const Column<T> grad = columns.input(dy), du = columns.output(a.to.du), dgate1 = columns.output(a.to.dg1);
  const Column<T> dgate2 = columns.output(a.to.dg2);
  const int64_t filter = std::min(a.blocks, s.filter_blocks);
  parallel(a.threads, 2 * a.blocks, [&](int64_t task) {
    const int64_t m = task % a.blocks;
    if (task < a.blocks) input_spectrum(a.plan, grad.reversed(s.l), gate2.reversed(s.l), s.l, m, a.e + m * a.step);
    else input_spectrum(a.plan, in, gate1, s.l, m, a.w + m * a.step);
  });
  parallel(a.threads, 8, [&](int64_t eighth) {
    const T* const all[] = {a.e, a.w, a.g, a.sums};
    const int64_t counts[] = {a.blocks, a.blocks, filter, row > 0 ? a.blocks - a.first : 0};
    each_frequency(s, eighth, all, counts, 4, [&](int64_t f) {
      correlate_blocks(a.e + f, a.w + f, a.blocks, a.first, row > 0, a.sums + f, a.step);
      multiply_blocks(a.e + f, a.blocks, a.g + f, filter, a.step);
      if (gate2) multiply_blocks(a.w + f, a.blocks, a.g + f, filter, a.step);
    });
  });
  parallel(a.threads, a.blocks, [&](int64_t m) {
    const int64_t first = s.l - 1 - m * s.block;  // the row that point 0 belongs to
    Vec<T> sum = {};
    double* sums = a.to.dskip ? a.to.dskip + (row * a.blocks + m) * s.d + a.channel : nullptr;
    if (sums) std::fill(sums, sums + a.lanes, 0.0);
    const bool gated = gate1 || gate2;
    inverse_real(a.plan, a.e + m * a.step, [&](int64_t n, Vec<T> v) {
      const int64_t t = first - n;
      if (t < 0) return;
      const Vec<T> x = in[t];
      Vec<T> dz = grad[t], weight = x;
      if (gated) {
        if (gate2) dz = dz * gate2[t];
        if (gate1) weight = x * gate1[t];
      }
      const Vec<T> dw = v + a.skip * dz;
      sum = sum + dz * weight;
      if (gate1) dgate1.set(t, dw * x);
      du.set(t, gate1 ? dw * gate1[t] : dw);
    }, [&] {
      if (sums) add_to<T>(sums, sum, a.lanes);
      sum = Vec<T>{};
    });
  });
  if (gate2)
    parallel(a.threads, a.blocks, [&](int64_t m) {
      const int64_t first = m * s.block;
      inverse_real(a.plan, a.w + m * a.step, [&](int64_t n, Vec<T> v) {
        const int64_t t = first + n;
        if (t >= s.l) return;
        const Vec<T> weight = gate1 ? in[t] * gate1[t] : in[t];
        dgate2.set(t, grad[t] * (v + a.skip * weight));
      }, [] {});
    });
  columns.put_back(du, a.to.du);
  columns.put_back(dgate1, a.to.dg1);
  columns.put_back(dgate2, a.to.dg2);
}

// The gradients of the taps of the channels of one vector, from the sum of the spectra over the rows.
template <typename T>
void backward_taps(const Adjoint<T>& a) {
  const Sizes& s = a.s;
  parallel(a.threads, a.blocks - a.first, [&](int64_t m) {
    T* points = a.sums + m * a.step;
    inverse_real(a.plan, points, [&](int64_t n, Vec<T> v) { store(point(points, s.block, n), v); }, [] {});
    const int64_t part = s.block / 8;
    for (int64_t eighth = 0; eighth < 8; ++eighth) {
      const int64_t high = s.l - 1 - (a.first + m) * s.block - eighth * part;  // the tap of its first point
      const int64_t low = std::max<int64_t>(0, high - part + 1), end = std::min(high + 1, s.taps());
      if (low >= end) continue;
      from_lanes(points + (eighth * spacing(s.block) + high - low) * kPoint<T>, -kPoint<T>, a.lanes, end - low,
                 a.to.dtaps + a.channel * s.k + low, s.k);
    }
  });
  for (int64_t i = 0; i < a.lanes; ++i)
    std::fill(a.to.dtaps + (a.channel + i) * s.k + s.taps(), a.to.dtaps + (a.channel + i + 1) * s.k, T(0));
}

template <typename T>
void backward(const Tensor<const T>& dy, const Tensor<const T>& u, const Tensor<const T>& g1, const Tensor<const T>& g2,
              const Filter<T>& filter, const Gradients<T>& to, const Sizes& s) {
  const Plan<T>& transforms = plan<T>(s.block);
  const Share share(s, kLanes<T>);
  const int64_t step = stride<T>(s.block), blocks = s.blocks(), own = std::min(blocks, s.filter_blocks);
  const int64_t first = (s.l - s.taps()) / s.block;
  Workplaces<T> workplaces((3 * blocks - first + own) * step, share.outer);
  const auto task = [&](int64_t vector, T* memory) {
    const int64_t channel = vector * kLanes<T>, lanes = std::min(kLanes<T>, s.d - channel);
    const T* g = filter_spectra(transforms, filter, s, channel, share.inner, memory);
    const Vec<T> skip = filter.skip ? load(filter.skip + channel, lanes) : Vec<T>{};
    T* e = memory + own * step;
    const Adjoint<T> adjoint{transforms, s, to, channel, lanes, share.inner, step, blocks, first, g, skip,
                             e, e + blocks * step, e + 2 * blocks * step};
    for (int64_t row = 0; row < s.b; ++row) backward_row(adjoint, row, dy, u, g1, g2);
    backward_taps(adjoint);
  };
  parallel(share.outer, share.vectors, [&](int64_t vector) {
    workplaces.use([&](T* memory) { task(vector, memory); });
  });
}

// Sums over the channels of each group and over rows and blocks, in double, in the order of their indices.
template <typename T>
void sum_groups(const T* each, T* sums, const Sizes& s) {
  const int64_t repeat = s.d / s.g;
  parallel(s.threads, s.g, [&](int64_t group) {
    for (int64_t j = 0; j < s.k; ++j) {
      double sum = 0;
      for (int64_t c = group * repeat; c < (group + 1) * repeat; ++c) sum += static_cast<double>(each[c * s.k + j]);
      sums[group * s.k + j] = static_cast<T>(sum);
    }
  });
}

template <typename T>
void sum_rows(const double* each, int64_t rows, int64_t d, T* sums) {
  for (int64_t c = 0; c < d; ++c) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += each[r * d + c];
    sums[c] = static_cast<T>(sum);
  }
}

// The spectra of all groups: [vectors of groups][filter blocks][block + 1] points.
template <typename T>
void spectrum(const T* taps, T* spectra, const Sizes& s) {
  const Plan<T>& transforms = plan<T>(s.block);
  const int64_t own = s.filter_blocks, vectors = (s.g + kLanes<T> - 1) / kLanes<T>;
  parallel(s.threads, vectors * own, [&](int64_t task) {
    const int64_t group = task / own * kLanes<T>;
    T* points = spectra + task * stride<T>(s.block);
    std::fill(points, points + stride<T>(s.block), T(0));
    filter_spectrum(transforms, Rows<T>(taps, s.k, s.taps(), group, s.g, 1), task % own, points);
  });
}

}  // namespace

#define CROCUTA_FFT_CONV(dtype, T)                                                                                     \
  CROCUTA_EXPORT void CROCUTA_NAME(fft_conv_lanes, dtype)(int64_t * lanes) { *lanes = kLanes<T>; }                     \
  CROCUTA_EXPORT void CROCUTA_NAME(fft_conv_spectrum, dtype)(                                                          \
      const T* taps, T* spectra, int64_t l, int64_t g, int64_t k, int64_t block, int64_t filter_blocks,                \
      int64_t threads) {                                                                                               \
    spectrum<T>(taps, spectra, Sizes{0, l, 0, g, k, block, filter_blocks, threads});                                   \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(fft_conv_forward, dtype)(                                                           \
      const T* u, int64_t u_row, int64_t u_step, const T* g1, int64_t g1_row, int64_t g1_step, const T* g2,            \
      int64_t g2_row, int64_t g2_step, const T* taps, const T* spectrum, const T* skip, T* y, int64_t b, int64_t l,    \
      int64_t d, int64_t g, int64_t k, int64_t block, int64_t filter_blocks, int64_t threads) {                        \
    forward<T>({u, u_row, u_step}, {g1, g1_row, g1_step}, {g2, g2_row, g2_step}, {taps, spectrum, skip},               \
               {y, l * d, d}, Sizes{b, l, d, g, k, block, filter_blocks, threads});                                    \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(fft_conv_backward, dtype)(                                                          \
      const T* dy, int64_t dy_row, int64_t dy_step, const T* u, int64_t u_row, int64_t u_step, const T* g1,            \
      int64_t g1_row, int64_t g1_step, const T* g2, int64_t g2_row, int64_t g2_step, const T* taps, const T* spectrum, \
      const T* skip, T* du, T* dg1, T* dg2, T* dtaps, T* dskip, int64_t b, int64_t l, int64_t d, int64_t g, int64_t k, \
      int64_t block, int64_t filter_blocks, int64_t threads) {                                                         \
    const Sizes s{b, l, d, g, k, block, filter_blocks, threads};                                                       \
    const Scratch<T> each(g == d ? 1 : d * k);                                                                         \
    const Scratch<double> sums(dskip ? b * s.blocks() * d : 1);                                                        \
    T* channels = g == d ? dtaps : each.get();                                                                         \
    backward<T>({dy, dy_row, dy_step}, {u, u_row, u_step}, {g1, g1_row, g1_step}, {g2, g2_row, g2_step},               \
                {taps, spectrum, skip},                                                                                \
                {{du, l * d, d}, {dg1, l * d, d}, {dg2, l * d, d}, channels, dskip ? sums.get() : nullptr}, s);        \
    if (g != d) sum_groups<T>(channels, dtaps, s);                                                                     \
    if (dskip) sum_rows<T>(sums.get(), b * s.blocks(), d, dskip);                                                      \
  }

CROCUTA_FFT_CONV(f32, float)
CROCUTA_FFT_CONV(f64, double)
