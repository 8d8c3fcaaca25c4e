// Causal convolution of whole sequences with long taps, for channels-last input: outputs and gradients.
//
//     y = g2 (h * w + D w),   w = g1 u       (g1 and g2 are gates that may be left out)
//
// Time is cut into blocks of N (a power of two). With U_m and H_j the spectra of blocks modulo x^N - i (fft.h), block m
// of h * w + D w is the real part of what has the spectrum
//
//     Z_m = C_m - i C_(m-1),   C_m = D U_m + sum_j H_j U_(m-j)
//
// where the lower half of the product C_m belongs to block m and its upper half to block m + 1. So any length costs
// what its own blocks cost, transforms stay near the processor, and both halves of a product are used. The adjoints are
// convolutions of reversed sequences: with e = reversed g2 dy, dw is reversed (h * e + D e) and dh reversed (w * e). D
// is as good as a part of the first tap: its gradient is that of the tap. Nothing but the inputs is kept for them.
//
// A task is one vector of channels; where there are fewer of them than threads, blocks are shared out. No sum depends
// on who does what.

#include <algorithm>

#include "columns.h"
#include "fft_filter.h"
#include "fft_products.h"
#include "threads.h"

namespace {

// --- spectra of blocks ------------------------------------------------------------------------------------------

struct Sizes {
  int64_t b, l, d, g, k, block, filter_blocks, threads;  // filter_blocks: H_j are there for j below it, 0 from it on

  int64_t taps() const { return std::min(k, l); }
  int64_t blocks() const { return (l + block - 1) / block; }
};

// The first passes of the spectrum of block m of values (times a gate). Rows are fetched ahead, those of the next block
// if they are few: between two rows there is much of other channels.
template <typename T>
void input_first(const Plan<T>& plan, const Column<T>& values, const Column<T>& gate, int64_t length, int64_t m,
                 T* points, bool far) {
  const int64_t part = plan.size / parts_of(plan.size), first = m * plan.size, count = length - first;
  const int64_t ahead = plan.size <= 1024 ? plan.size : 16;
  const auto each = [&](auto&& value) {
    split_first<T, true>(plan, points, 0, part, far, [&](int64_t j, int64_t n, Vec<T>& re, Vec<T>&) {
      const int64_t t = j * part + n;
      re = t < count ? value(first + t) : Vec<T>{};
    });
  };
  const auto fetched = [&](const Column<T>& column, int64_t t) {
    __builtin_prefetch(column.at + (t + ahead) * column.step, 0, 2);
    return column[t];
  };
  if (gate) each([&](int64_t t) { return fetched(values, t) * fetched(gate, t); });
  else each([&](int64_t t) { return fetched(values, t); });
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

// Calls work(offset) for the frequencies of one part of a block.
template <typename T, typename Work>
CROCUTA_INLINE void each_frequency(int64_t block, int64_t part, Work&& work) {
  const int64_t begin = place_of(block, part) * kPoint<T>, end = begin + block / parts_of(block) * kPoint<T>;
  for (int64_t f = begin; f < end; f += kPoint<T>) work(f);
}

// --- forward ----------------------------------------------------------------------------------------------------

template <typename T>
struct Filter {
  const T* taps;      // [g][k]
  const T* spectrum;  // of groups, [vectors of groups][blocks], or null: g = d, transform the taps
  const T* skip;      // [d] or null
};

// What one vector of channels has of the filter: kept spectra, those of its groups, or room for those of its taps.
template <typename T>
struct FilterBlocks {
  FilterBlocks(const Plan<T>& plan, const Filter<T>& filter, const Sizes& s, int64_t channel, T* own)
      : plan(plan), rows(filter.taps, s.k, s.taps(), channel, s.d, s.d / s.g), at(own),
        own(filter.spectrum ? nullptr : own), count(std::min(s.blocks(), s.filter_blocks)) {
    if (filter.skip) skip = load(filter.skip + channel, std::min(kLanes<T>, s.d - channel));
    if (!filter.spectrum) return;
    if (s.g == s.d) at = filter.spectrum + channel / kLanes<T> * s.filter_blocks * stride<T>(s.block);
    else spread_groups(filter.spectrum, s, count, channel, own);
  }
  // How many blocks of taps are transformed with those of a row: all, with the first row.
  int64_t to_transform(int64_t row) const { return own && row == 0 ? count : 0; }
  void first(int64_t j, bool far) const { filter_first<T, true>(plan, rows, j, own + j * stride<T>(plan.size), far); }

  const Plan<T>& plan;
  Rows<T> rows;
  const T* at;
  T* own;
  int64_t count;
  Vec<T> skip = {};
};

template <typename T>
void split_parts(const Plan<T>& plan, T* spectra, int64_t blocks, int64_t part) {
  for (int64_t m = 0; m < blocks; ++m) split_part(plan, spectra + m * stride<T>(plan.size), part);
}

template <typename T>
void combine_parts(const Plan<T>& plan, T* spectra, int64_t blocks, int64_t part) {
  for (int64_t m = 0; m < blocks; ++m) combine_part(plan, spectra + m * stride<T>(plan.size), part);
}

// Whether a task needs so much memory that what it writes is gone from the caches before it is read. Measured.
template <typename T>
bool is_far(int64_t size) {
  return size * static_cast<int64_t>(sizeof(T)) > (20 << 20);
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
  const int64_t size = (blocks + (filter.spectrum && s.g == s.d ? 0 : own)) * step;
  const bool far = is_far<T>(size);
  Workplaces<T> workplaces(size, share.outer);
  const auto task = [&](int64_t vector, T* spectra) {
    const int64_t channel = vector * kLanes<T>, lanes = std::min(kLanes<T>, s.d - channel);
    const FilterBlocks<T> h(transforms, filter, s, channel, spectra + blocks * step);
    for (int64_t row = 0; row < s.b; ++row) {
      Columns<T> columns(row, channel, lanes, s.l, 4);
      const Column<T> in = columns.input(u), gate1 = columns.input(g1), gate2 = columns.input(g2);
      const Column<T> out = columns.output(y);
      const int64_t taps = h.to_transform(row);
      parallel(share.inner, blocks + taps, [&](int64_t m) {
        if (m < blocks) input_first(transforms, in, gate1, s.l, m, spectra + m * step, far);
        else h.first(m - blocks, far);
        if (far) stored_far();
      });
      parallel(share.inner, parts_of(s.block), [&](int64_t part) {
        split_parts(transforms, h.own, taps, part);
        split_parts(transforms, spectra, blocks, part);
        each_frequency<T>(s.block, part, [&](int64_t f) {
          convolve_blocks(spectra + f, blocks, h.at + f, h.count, h.skip, 0, false, spectra + f, step);
        });
        combine_parts(transforms, spectra, blocks, part);
      });
      parallel(share.inner, blocks, [&](int64_t m) {
        const int64_t first = m * s.block, count = s.l - first;
        const auto each = [&](auto&& value) {
          combine_last(transforms, spectra + m * step, [&](int64_t t, Vec<T> v) {
            if (t < count) out.set(first + t, value(first + t, v));
          });
        };
        if (gate2) each([&](int64_t t, Vec<T> v) { return v * gate2[t]; });
        else each([](int64_t, Vec<T> v) { return v; });
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
  T* dtaps;  // [d][k]: of each channel
};

// What one vector of channels needs while its rows are gone through.
template <typename T>
struct Adjoint {
  const Plan<T>& plan;
  const Sizes& s;
  const Gradients<T>& to;
  const FilterBlocks<T>& h;
  int64_t channel, lanes, threads, step, blocks;
  int64_t first;  // block of the reversed sequence where the gradients of taps begin
  bool far;
  T *e, *w, *sums;  // spectra of g2 dy reversed, of g1 u, and of the gradients of taps
};

template <typename T>
void backward_row(const Adjoint<T>& a, int64_t row, const Tensor<const T>& dy, const Tensor<const T>& u,
                  const Tensor<const T>& g1, const Tensor<const T>& g2) {
  const Sizes& s = a.s;
  Columns<T> columns(row, a.channel, a.lanes, s.l, 7);
  const Column<T> in = columns.input(u), gate1 = columns.input(g1), gate2 = columns.input(g2);
  const Column<T> grad = columns.input(dy), du = columns.output(a.to.du), dgate1 = columns.output(a.to.dg1);
  const Column<T> dgate2 = columns.output(a.to.dg2);
  const int64_t taps = a.h.to_transform(row);
  parallel(a.threads, 2 * a.blocks + taps, [&](int64_t task) {
    const int64_t m = task % a.blocks;
    if (task < a.blocks) input_first(a.plan, grad.reversed(s.l), gate2.reversed(s.l), s.l, m, a.e + m * a.step, a.far);
    else if (task < 2 * a.blocks) input_first(a.plan, in, gate1, s.l, m, a.w + m * a.step, a.far);
    else a.h.first(task - 2 * a.blocks, a.far);
    if (a.far) stored_far();
  });
  parallel(a.threads, parts_of(s.block), [&](int64_t part) {
    split_parts(a.plan, a.h.own, taps, part);
    split_parts(a.plan, a.e, a.blocks, part);
    split_parts(a.plan, a.w, a.blocks, part);
    each_frequency<T>(s.block, part, [&](int64_t f) {
      const auto filter = [&](T* to) {
        convolve_blocks(to, a.blocks, a.h.at + f, a.h.count, a.h.skip, 0, false, to, a.step);
      };
      convolve_blocks(a.e + f, a.blocks, a.w + f, a.blocks, Vec<T>{}, a.first, row > 0, a.sums + f, a.step);
      filter(a.e + f);
      if (gate2) filter(a.w + f);
    });
    combine_parts(a.plan, a.e, a.blocks, part);
    if (gate2) combine_parts(a.plan, a.w, a.blocks, part);
    if (row == s.b - 1) combine_parts(a.plan, a.sums, a.blocks - a.first, part);
  });
  parallel(a.threads, a.blocks, [&](int64_t m) {
    const int64_t first = s.l - 1 - m * s.block;  // the row that point 0 belongs to
    combine_last(a.plan, a.e + m * a.step, [&](int64_t n, Vec<T> dw) {
      const int64_t t = first - n;
      if (t < 0) return;
      if (gate1) {
        dgate1.set(t, dw * in[t]);
        dw = dw * gate1[t];
      }
      du.set(t, dw);
    });
  });
  if (gate2)
    parallel(a.threads, a.blocks, [&](int64_t m) {
      const int64_t first = m * s.block;
      combine_last(a.plan, a.w + m * a.step, [&](int64_t n, Vec<T> z) {
        if (first + n < s.l) dgate2.set(first + n, grad[first + n] * z);
      });
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
    combine_last(a.plan, points, [&](int64_t n, Vec<T> v) { store(point(points, s.block, n), v); });
    const int64_t parts = parts_of(s.block), part = s.block / parts;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t high = s.l - 1 - (a.first + m) * s.block - i * part;  // the tap of its first point
      const int64_t low = std::max<int64_t>(0, high - part + 1), end = std::min(high + 1, s.taps());
      if (low >= end) continue;
      from_lanes(points + (place_of(s.block, i) + high - low) * kPoint<T>, -kPoint<T>, a.lanes, end - low,
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
  const bool alone = s.b == 1 && first == 0 && !g2.at;  // the gradients of taps take the place of w
  const int64_t size = ((alone ? 2 : 3) * blocks - first + own) * step;
  Workplaces<T> workplaces(size, share.outer);
  const auto task = [&](int64_t vector, T* memory) {
    const int64_t channel = vector * kLanes<T>, lanes = std::min(kLanes<T>, s.d - channel);
    const FilterBlocks<T> h(transforms, filter, s, channel, memory);
    T* e = memory + own * step;
    T *w = e + blocks * step, *sums = w + (alone ? 0 : blocks * step);
    const Adjoint<T> adjoint{transforms, s, to, h, channel, lanes, share.inner, step, blocks, first,
                             is_far<T>(size), e, w, sums};
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

// The spectra of all groups: [vectors of groups][filter blocks][block + 1] points.
template <typename T>
void spectrum(const T* taps, T* spectra, const Sizes& s) {
  const Plan<T>& transforms = plan<T>(s.block);
  const int64_t own = s.filter_blocks, vectors = (s.g + kLanes<T> - 1) / kLanes<T>;
  parallel(s.threads, vectors * own, [&](int64_t task) {
    const int64_t group = task / own * kLanes<T>;
    T* points = spectra + task * stride<T>(s.block);
    std::fill(points, points + stride<T>(s.block), T(0));
    filter_spectrum<T, true>(transforms, Rows<T>(taps, s.k, s.taps(), group, s.g, 1), task % own, points);
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
    T* channels = g == d ? dtaps : each.get();                                                                         \
    backward<T>({dy, dy_row, dy_step}, {u, u_row, u_step}, {g1, g1_row, g1_step}, {g2, g2_row, g2_step},               \
                {taps, spectrum, skip},                                                                                \
                {{du, l * d, d}, {dg1, l * d, d}, {dg2, l * d, d}, channels}, s);                                      \
    if (g != d) sum_groups<T>(channels, dtaps, s);                                                                     \
    for (int64_t c = 0; dskip && c < d; ++c) dskip[c] = channels[c * k];                                               \
  }

CROCUTA_FFT_CONV(f32, float)
CROCUTA_FFT_CONV(f64, double)
