// Causal convolution of whole sequences with long taps, for channels-last input (fft_rows.h): outputs and gradients.
//
//     y = g2 (h * w + D w),   w = g1 u       (g1 and g2 are gates that may be left out)
//
// A task is one vector of channels; where there are fewer of them than threads, blocks are shared out. No sum depends
// on who does what.

#include "fft_rows.h"

namespace {

template <typename T>
void forward(const Tensor<const T>& u, const Tensor<const T>& g1, const Tensor<const T>& g2, const Filter<T>& filter,
             const Tensor<T>& y, const Sizes& s) {
  const Plan<T>& transforms = plan<T>(s.block);
  const Share share(s, vectors<T>(s.d), 1);
  const int64_t step = stride<T>(s.block), blocks = s.blocks();
  const int64_t size = (blocks + filter.own_blocks(s)) * step;
  Workplaces<T> workplaces(size, share.outer);
  const auto task = [&](int64_t vector, T* spectra) {
    const int64_t channel = vector * kLanes<T>, lanes = std::min(kLanes<T>, s.d - channel);
    const FilterBlocks<T> h(transforms, filter, s, channel, spectra + blocks * step);
    const Convolution<T> convolution{transforms, s, h, share.inner, step, blocks, is_far<T>(size)};
    for (int64_t row = 0; row < s.b; ++row) {
      Columns<T> columns(row, channel, lanes, s.l, 4);
      const Column<T> in = columns.input(u), gate1 = columns.input(g1), gate2 = columns.input(g2);
      const Column<T> out = columns.output(y);
      forward_row(convolution, row, in, gate1, gate2, out, spectra);
      columns.put_back(out, y);
    }
  };
  parallel(share.outer, share.tasks, [&](int64_t vector) {
    workplaces.use([&](T* memory) { task(vector, memory); });
  });
}

template <typename T>
struct Gradients {
  Tensor<T> du, dg1, dg2;
  T* dtaps;  // [d][k]: of each channel
};

template <typename T>
void backward(const Tensor<const T>& dy, const Tensor<const T>& u, const Tensor<const T>& g1, const Tensor<const T>& g2,
              const Filter<T>& filter, const Gradients<T>& to, const Sizes& s) {
  const Plan<T>& transforms = plan<T>(s.block);
  const Share share(s, vectors<T>(s.d), 1);
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
    const Adjoint<T> adjoint({transforms, s, h, share.inner, step, blocks, is_far<T>(size)}, first, e, w, sums);
    for (int64_t row = 0; row < s.b; ++row) {
      Columns<T> columns(row, channel, lanes, s.l, 7);
      const RowGradients<T> c{columns.input(dy),      columns.input(u),       columns.input(g1),     columns.input(g2),
                              columns.output(to.du), columns.output(to.dg1), columns.output(to.dg2), {}};
      backward_row(adjoint, row, c);
      columns.put_back(c.din, to.du);
      columns.put_back(c.dgate1, to.dg1);
      columns.put_back(c.dgate2, to.dg2);
    }
    backward_taps(adjoint, channel, lanes, to.dtaps);
  };
  parallel(share.outer, share.tasks, [&](int64_t vector) {
    workplaces.use([&](T* memory) { task(vector, memory); });
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
    const ChannelGradients<T> gradients(s, dtaps);                                                                     \
    backward<T>({dy, dy_row, dy_step}, {u, u_row, u_step}, {g1, g1_row, g1_step}, {g2, g2_row, g2_step},               \
                {taps, spectrum, skip},                                                                                \
                {{du, l * d, d}, {dg1, l * d, d}, {dg2, l * d, d}, gradients.each()}, s);                            \
    gradients.finish(dskip);                                                                                           \
  }

CROCUTA_FFT_CONV(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_FFT_CONV(f64, double)
#endif
