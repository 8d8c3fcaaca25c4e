// Causal convolution with long taps of one row of one vector of channels: outputs and gradients. What fft_conv.cpp and
// hyena_fft.cpp are made of.
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
#pragma once

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

// --- filters ----------------------------------------------------------------------------------------------------

template <typename T>
struct Filter {
  const T* taps;      // [g][k]
  const T* spectrum;  // of groups, [vectors of groups][blocks], or null: g = d, transform the taps
  const T* skip;      // [d] or null

  // Blocks of spectra that a vector of channels needs room for.
  int64_t own_blocks(const Sizes& s) const {
    return spectrum && s.g == s.d ? 0 : std::min(s.blocks(), s.filter_blocks);
  }
};

template <typename T>
int64_t vectors(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T>;
}

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

// How threads are used: for tasks of `width` vectors of channels, or, where these are few, inside each.
struct Share {
  Share(const Sizes& s, int64_t vectors, int64_t width)
      : tasks((vectors + width - 1) / width), outer(tasks >= s.threads ? s.threads : 1),
        inner(tasks >= s.threads ? 1 : s.threads) {}
  int64_t tasks, outer, inner;
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

// --- forward ----------------------------------------------------------------------------------------------------

// What forward and backward share for the rows of one vector of channels.
template <typename T>
struct Convolution {
  const Plan<T>& plan;
  const Sizes& s;
  const FilterBlocks<T>& h;
  int64_t threads, step, blocks;
  bool far;
};

// out = g2 (h * w + D w) with w = g1 in; out may be in. `spectra` has room for the blocks, and no thread but this one's
// helpers uses it.
template <typename T>
void forward_row(const Convolution<T>& a, int64_t row, const Column<T>& in, const Column<T>& gate1,
                 const Column<T>& gate2, const Column<T>& out, T* spectra) {
  const Sizes& s = a.s;
  const int64_t taps = a.h.to_transform(row);
  parallel(a.threads, a.blocks + taps, [&](int64_t m) {
    if (m < a.blocks) input_first(a.plan, in, gate1, s.l, m, spectra + m * a.step, a.far);
    else a.h.first(m - a.blocks, a.far);
    if (a.far) stored_far();
  });
  parallel(a.threads, parts_of(s.block), [&](int64_t part) {
    split_parts(a.plan, a.h.own, taps, part);
    split_parts(a.plan, spectra, a.blocks, part);
    each_frequency<T>(s.block, part, [&](int64_t f) {
      convolve_blocks(spectra + f, a.blocks, a.h.at + f, a.h.count, a.h.skip, 0, false, spectra + f, a.step);
    });
    combine_parts(a.plan, spectra, a.blocks, part);
  });
  parallel(a.threads, a.blocks, [&](int64_t m) {
    const int64_t first = m * s.block, count = s.l - first;
    const auto each = [&](auto&& value) {
      combine_last(a.plan, spectra + m * a.step, [&](int64_t t, Vec<T> v) {
        if (t < count) out.set(first + t, value(first + t, v));
      });
    };
    if (gate2) each([&](int64_t t, Vec<T> v) { return v * gate2[t]; });
    else each([](int64_t, Vec<T> v) { return v; });
    stored_far();
  });
}

// --- backward ---------------------------------------------------------------------------------------------------

// What a row has, and where its gradients go; what is not there is null.
template <typename T>
struct RowGradients {
  Column<T> grad, in, gate1, gate2;  // dy, and the arguments of forward_row
  Column<T> din, dgate1, dgate2;     // din may be grad
  Column<T> filtered;                // h * w + D w once more, without gates; may be in
  bool again() const { return dgate2 || filtered; }
};

// What one vector of channels needs while its rows are gone through.
template <typename T>
struct Adjoint : Convolution<T> {
  Adjoint(const Convolution<T>& forward, int64_t first, T* e, T* w, T* sums)
      : Convolution<T>(forward), first(first), e(e), w(w), sums(sums) {}
  int64_t first;    // block of the reversed sequence where the gradients of taps begin
  T *e, *w, *sums;  // spectra of g2 dy reversed, of g1 in, and of the gradients of taps
};

template <typename T>
void backward_row(const Adjoint<T>& a, int64_t row, const RowGradients<T>& c) {
  const Sizes& s = a.s;
  const int64_t taps = a.h.to_transform(row);
  parallel(a.threads, 2 * a.blocks + taps, [&](int64_t task) {
    const int64_t m = task % a.blocks;
    if (task < a.blocks)
      input_first(a.plan, c.grad.reversed(s.l), c.gate2.reversed(s.l), s.l, m, a.e + m * a.step, a.far);
    else if (task < 2 * a.blocks) input_first(a.plan, c.in, c.gate1, s.l, m, a.w + m * a.step, a.far);
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
      if (c.again()) filter(a.w + f);
    });
    combine_parts(a.plan, a.e, a.blocks, part);
    if (c.again()) combine_parts(a.plan, a.w, a.blocks, part);
    if (row == s.b - 1) combine_parts(a.plan, a.sums, a.blocks - a.first, part);
  });
  if (c.again())
    parallel(a.threads, a.blocks, [&](int64_t m) {
      const int64_t first = m * s.block;
      const auto each = [&](auto&& set) {
        combine_last(a.plan, a.w + m * a.step, [&](int64_t n, Vec<T> z) {
          if (first + n < s.l) set(first + n, z);
        });
      };
      if (c.dgate2) each([&](int64_t t, Vec<T> z) { c.dgate2.set(t, c.grad[t] * z); });
      else each([&](int64_t t, Vec<T> z) { c.filtered.set(t, z); });
      stored_far();
    });
  parallel(a.threads, a.blocks, [&](int64_t m) {
    const int64_t first = s.l - 1 - m * s.block;  // the row that point 0 belongs to
    combine_last(a.plan, a.e + m * a.step, [&](int64_t n, Vec<T> dw) {
      const int64_t t = first - n;
      if (t < 0) return;
      if (c.gate1) {
        c.dgate1.set(t, dw * c.in[t]);
        dw = dw * c.gate1[t];
      }
      c.din.set(t, dw);
    });
    stored_far();
  });
}

// The gradients of the taps [d][k] of the channels of one vector, from the sum of the spectra over the rows.
template <typename T>
void backward_taps(const Adjoint<T>& a, int64_t channel, int64_t lanes, T* dtaps) {
  const Sizes& s = a.s;
  parallel(a.threads, a.blocks - a.first, [&](int64_t m) {
    T* points = a.sums + m * a.step;
    combine_last(a.plan, points, [&](int64_t n, Vec<T> v) { store(point(points, s.block, n), v); });
    const int64_t parts = parts_of(s.block), part = s.block / parts;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t high = s.l - 1 - (a.first + m) * s.block - i * part;  // the tap of its first point
      const int64_t low = std::max<int64_t>(0, high - part + 1), end = std::min(high + 1, s.taps());
      if (low >= end) continue;
      from_lanes(points + (place_of(s.block, i) + high - low) * kPoint<T>, -kPoint<T>, lanes, end - low,
                 dtaps + channel * s.k + low, s.k);
    }
  });
  for (int64_t i = 0; i < lanes; ++i)
    std::fill(dtaps + (channel + i) * s.k + s.taps(), dtaps + (channel + i + 1) * s.k, T(0));
}

// The gradients of the taps of each channel [d][k], and what becomes of them: those of groups [g][k], and of D.
template <typename T>
class ChannelGradients {
 public:
  ChannelGradients(const Sizes& s, T* dtaps) : s_(s), dtaps_(dtaps), own_(s.g == s.d ? 1 : s.d * s.k) {}

  T* each() const { return s_.g == s_.d ? dtaps_ : own_.get(); }

  // Sums over the channels of each group, in double, in the order of their indices.
  void finish(T* dskip) const {
    const T* channels = each();
    for (int64_t c = 0; dskip && c < s_.d; ++c) dskip[c] = channels[c * s_.k];
    if (s_.g == s_.d) return;
    const int64_t repeat = s_.d / s_.g;
    parallel(s_.threads, s_.g, [&](int64_t group) {
      for (int64_t j = 0; j < s_.k; ++j) {
        double sum = 0;
        for (int64_t i = 0; i < repeat; ++i) sum += static_cast<double>(channels[(group * repeat + i) * s_.k + j]);
        dtaps_[group * s_.k + j] = static_cast<T>(sum);
      }
    });
  }

 private:
  const Sizes& s_;
  T* dtaps_;
  Scratch<T> own_;
};

}  // namespace
