// The Hyena operator with a long filter given by its taps, forward and backward:
//
//     (x2, x1, v) = FIR(z) + bias,   w = x1 v,   y = x2 (h * w + D w)
//
// A task is a few neighbouring vectors of channels. It goes through the rows of z in their order and lays out what the
// convolution reads (fft_rows.h) as columns of its own: the times of one vector of channels one behind the other, where
// its transforms find them near. The results take their places, and a second walk over the rows turns them into y or
// dz. So memory that is not the task's own is read and written in its order, twice at most, and nothing between z and
// y is a tensor. Where there are fewer tasks than threads, rows and blocks are shared out. No sum depends on who does
// what.

#include "fft_rows.h"
#include "fir.h"

namespace {

constexpr int64_t kRows = kFirSteps;    // steps of one vector of channels before its neighbour's turn
constexpr int64_t kWidth = 8;           // vectors of channels of a task, at most
constexpr int64_t kColumns = 32 << 20;  // bytes of columns of a task, unless one vector has more
constexpr int64_t kSegments = 16;       // pieces of time that have their own sums of gradients, at most

// The segments of time, the same at any number of threads.
int64_t segments(int64_t length) { return std::min(kSegments, (length + kRows - 1) / kRows); }

// What forward and backward share.
template <typename T>
class Operator {
 public:
  static constexpr int64_t L = kLanes<T>;

  Operator(const Tensor<const T>& z, const FirFilter<T>& fir, const Sizes& s, int64_t columns)
      : z(z), fir(fir), s(s), column((s.l + 9) * L), width(width_of(s, columns)), share(s, vectors<T>(s.d), width) {}

  // work(first channel, the one behind the last, memory of `size` numbers) for every task.
  template <typename Work>
  void tasks(int64_t size, Work&& work) const {
    Workplaces<T> workplaces(size, share.outer);
    parallel(share.outer, share.tasks, [&](int64_t task) {
      const int64_t from = task * width * L;
      workplaces.use([&](T* memory) { work(from, std::min(s.d, from + width * L), memory); });
    });
  }

  // work(segment, t, n, channel, lanes) for all times and channels of a task, in the order of the rows.
  template <typename Work>
  void tiles(int64_t from, int64_t to, Work&& work) const {
    const int64_t units = (s.l + kRows - 1) / kRows, count = segments(s.l);
    parallel(share.inner, count, [&](int64_t segment) {
      const int64_t end = std::min(s.l, (segment + 1) * units / count * kRows);
      for (int64_t t = segment * units / count * kRows; t < end; t += kRows)
        for (int64_t ch = from; ch < to; ch += L) work(segment, t, std::min(kRows, end - t), ch, std::min(L, to - ch));
      stored_far();
    });
  }

  FirInputs<T> inputs(int64_t row) const { return {z.at + row * z.row, z.step, nullptr, 0}; }

  const Tensor<const T>& z;
  const FirFilter<T>& fir;
  const Sizes& s;
  const int64_t column, width;  // numbers from one column to the next, no power of two; vectors of a task
  const Share share;

 private:
  static int64_t width_of(const Sizes& s, int64_t columns) {
    const int64_t bytes = columns * s.b * s.l * L * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::min(kColumns / std::max<int64_t>(1, bytes), vectors<T>(s.d) / s.threads);
    return std::clamp<int64_t>(most, 1, kWidth);
  }
};

template <typename T>
void forward(const Tensor<const T>& z, const FirFilter<T>& fir, const Filter<T>& filter, const Tensor<T>& y,
             const Sizes& s) {
  constexpr int64_t L = kLanes<T>;
  const Operator<T> op(z, fir, s, 1);
  const Plan<T>& transforms = plan<T>(s.block);
  const int64_t step = stride<T>(s.block), blocks = s.blocks(), size = (blocks + filter.own_blocks(s)) * step;
  const bool far = writes_far(y.at, s.b * s.l * s.d, s.d);
  op.tasks(size + op.width * s.b * op.column, [&](int64_t from, int64_t to, T* spectra) {
    T* columns = spectra + size;  // [vectors][rows][l][L]
    const auto place = [&](int64_t ch, int64_t row, int64_t t) {
      return columns + ((ch - from) / L * s.b + row) * op.column + t * L;
    };
    for (int64_t row = 0; row < s.b; ++row)
      op.tiles(from, to, [&](int64_t, int64_t t, int64_t n, int64_t ch, int64_t lanes) {
        T* w = place(ch, row, t);
        fir_thirds<T, kRest>(fir, op.inputs(row), ch, lanes, t, n,
                             [=](int64_t i, Vec<T>, Vec<T> x1, Vec<T> v) { store(w + i * L, x1 * v); });
      });
    for (int64_t ch = from; ch < to; ch += L) {
      const FilterBlocks<T> h(transforms, filter, s, ch, spectra + blocks * step);
      const Convolution<T> convolution{transforms, s, h, op.share.inner, step, blocks, is_far<T>(size)};
      for (int64_t row = 0; row < s.b; ++row) {
        const Column<T> w{place(ch, row, 0), L};
        forward_row(convolution, row, w, {}, {}, w, spectra);
      }
    }
    for (int64_t row = 0; row < s.b; ++row)
      op.tiles(from, to, [&](int64_t, int64_t t, int64_t n, int64_t ch, int64_t lanes) {
        const T* filtered = place(ch, row, t);
        T* out = y.at + row * y.row + t * y.step + ch;
        const int64_t apart = y.step;
        fir_thirds<T, kFirst>(fir, op.inputs(row), ch, lanes, t, n, [=](int64_t i, Vec<T> x2, Vec<T>, Vec<T>) {
          const Vec<T> v = x2 * load(filtered + i * L);
          if (far) store_far(out + i * apart, v);
          else store(out + i * apart, v, lanes);
        });
      });
  });
}

template <typename T>
struct Gradients {
  T *dz, *dtaps;       // [b][l][3 d]; [d][k], of each channel
  double* short_sums;  // [segments][short taps + 1][3 d]: of the short taps and, last, of their bias
};

// One vector of channels at n times: w, the gradient that reached it, h * w + D w, and dy, in rows error_step apart.
template <typename T>
struct Tile {
  int64_t segment, row, t, n, ch, lanes;
  const T *dw, *filtered, *error;
  int64_t error_step;
};

// dz at the times of a tile: the gates and the short filter backwards. Of the k - 1 times behind it, all is made again.
template <typename T>
void adjoint_tile(const Operator<T>& op, const Tile<T>& tile, const Gradients<T>& results, bool far) {
  constexpr int64_t L = kLanes<T>;
  const FirFilter<T>& fir = op.fir;
  const int64_t past = fir.k - 1, have = std::min(tile.n + past, op.s.l - tile.t), c = fir.channels;
  FirScratch<T> thirds(fir.k, 3);
  T *dx2 = thirds.at(0), *dx1 = thirds.at(1), *dv = thirds.at(2);
  fir_thirds<T, kRest>(fir, op.inputs(tile.row), tile.ch, tile.lanes, tile.t, have,
                       [=](int64_t i, Vec<T>, Vec<T> x1, Vec<T> v) {
                         const Vec<T> dw = load(tile.dw + i * L);
                         const Vec<T> dy = load(tile.error + i * tile.error_step, tile.lanes);
                         store(dx2 + i * L, dy * load(tile.filtered + i * L));
                         store(dx1 + i * L, dw * v);
                         store(dv + i * L, dw * x1);
                       });
  for (int64_t i = have; i < tile.n + past; ++i)
    for (T* third : {dx2, dx1, dv}) store(third + i * L, Vec<T>{});
  const FirGradients<T> to{results.dz + tile.row * op.s.l * c, c, nullptr, 0,
                           results.short_sums + tile.segment * (fir.k + 1) * c, far};
  fir_gate_adjoint_block<T>(fir, op.inputs(tile.row), tile.ch, tile.lanes, tile.t, tile.n, dx2, thirds.room, L, to);
}

template <typename T>
void backward(const Tensor<const T>& dy, const Tensor<const T>& z, const FirFilter<T>& fir, const Filter<T>& filter,
              const Gradients<T>& results, const Sizes& s) {
  constexpr int64_t L = kLanes<T>;
  const Operator<T> op(z, fir, s, 2);
  const Plan<T>& transforms = plan<T>(s.block);
  const int64_t step = stride<T>(s.block), blocks = s.blocks(), own = std::min(blocks, s.filter_blocks);
  const int64_t first = (s.l - s.taps()) / s.block, size = (3 * blocks - first + own) * step;
  const bool far = writes_far(results.dz, 3 * s.b * s.l * s.d, s.d);
  op.tasks(size + 2 * op.width * s.b * op.column, [&](int64_t from, int64_t to, T* spectra) {
    // [vectors][rows][w, e][l][L]; h * w + D w takes the place of w, and dw that of e.
    T* columns = spectra + size;
    const auto place = [&](int64_t ch, int64_t row, int64_t t) {
      return columns + ((ch - from) / L * s.b + row) * 2 * op.column + t * L;
    };
    const auto error = [&](int64_t ch, int64_t row, int64_t t) { return dy.at + row * dy.row + t * dy.step + ch; };
    for (int64_t row = 0; row < s.b; ++row)
      op.tiles(from, to, [&](int64_t, int64_t t, int64_t n, int64_t ch, int64_t lanes) {
        T *w = place(ch, row, t), *e = w + op.column;
        const T* at = error(ch, row, t);
        const int64_t apart = dy.step;
        fir_thirds<T, kAll>(fir, op.inputs(row), ch, lanes, t, n, [=](int64_t i, Vec<T> x2, Vec<T> x1, Vec<T> v) {
          store(w + i * L, x1 * v);
          store(e + i * L, x2 * load(at + i * apart, lanes));
        });
      });
    for (int64_t ch = from; ch < to; ch += L) {
      const FilterBlocks<T> h(transforms, filter, s, ch, spectra);
      T *e = spectra + own * step, *w = e + blocks * step, *sums = w + blocks * step;
      const Adjoint<T> adjoint({transforms, s, h, op.share.inner, step, blocks, is_far<T>(size)}, first, e, w, sums);
      for (int64_t row = 0; row < s.b; ++row) {
        const Column<T> in{place(ch, row, 0), L}, grad{in.at + op.column, L};
        backward_row(adjoint, row, {grad, in, {}, {}, grad, {}, {}, in});
      }
      backward_taps(adjoint, ch, std::min(L, to - ch), results.dtaps);
    }
    for (int64_t row = 0; row < s.b; ++row)
      op.tiles(from, to, [&](int64_t segment, int64_t t, int64_t n, int64_t ch, int64_t lanes) {
        const T* filtered = place(ch, row, t);
        const Tile<T> tile{segment, row, t, n, ch, lanes, filtered + op.column, filtered, error(ch, row, t), dy.step};
        adjoint_tile(op, tile, results, far);
      });
  });
}

// The short filter's taps [3 d][k] as [k][3 d], and its gradients from the sums over segments.
template <typename T>
struct ShortFilter {
  ShortFilter(const T* taps, const T* bias, int64_t k, int64_t channels)
      : packed(new T[static_cast<size_t>(k * channels)]), fir{packed.get(), bias, k, channels} {
    fir_pack_taps<T>(taps, channels, k, channels, packed.get());
  }

  void finish(const double* sums, int64_t segments, T* dtaps, T* dbias) const {
    for (int64_t j = 0; j <= fir.k; ++j)
      for (int64_t ch = 0; ch < fir.channels; ++ch) {
        double sum = 0;
        for (int64_t i = 0; i < segments; ++i) sum += sums[(i * (fir.k + 1) + j) * fir.channels + ch];
        (j < fir.k ? dtaps[ch * fir.k + j] : dbias[ch]) = static_cast<T>(sum);
      }
  }

  const std::unique_ptr<T[]> packed;
  const FirFilter<T> fir;
};

}  // namespace

// z and dy with strides in elements; short_taps [3 d][short_k], short_bias [3 d] or null; taps, spectrum and skip as in
// fft_conv.cpp; y [b][l][d], dz [b][l][3 d], and the gradients like what they are of.
#define CROCUTA_HYENA_FFT(dtype, T)                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(hyena_fft_forward, dtype)(                                                          \
      const T* z, int64_t z_row, int64_t z_step, const T* short_taps, const T* short_bias, int64_t short_k,            \
      const T* taps, const T* spectrum, const T* skip, T* y, int64_t b, int64_t l, int64_t d, int64_t g, int64_t k,    \
      int64_t block, int64_t filter_blocks, int64_t threads) {                                                         \
    const ShortFilter<T> short_filter(short_taps, short_bias, short_k, 3 * d);                                         \
    forward<T>({z, z_row, z_step}, short_filter.fir, {taps, spectrum, skip}, {y, l * d, d},                            \
               {b, l, d, g, k, block, filter_blocks, threads});                                                        \
  }                                                                                                                    \
  CROCUTA_EXPORT void CROCUTA_NAME(hyena_fft_backward, dtype)(                                                         \
      const T* dy, int64_t dy_row, int64_t dy_step, const T* z, int64_t z_row, int64_t z_step, const T* short_taps,    \
      const T* short_bias, int64_t short_k, const T* taps, const T* spectrum, const T* skip, T* dz, T* dshort_taps,    \
      T* dshort_bias, T* dtaps, T* dskip, int64_t b, int64_t l, int64_t d, int64_t g, int64_t k, int64_t block,        \
      int64_t filter_blocks, int64_t threads) {                                                                        \
    const Sizes s{b, l, d, g, k, block, filter_blocks, threads};                                                       \
    const ShortFilter<T> short_filter(short_taps, short_bias, short_k, 3 * d);                                         \
    const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(segments(l) * (short_k + 1) * 3 * d)]());      \
    const ChannelGradients<T> long_taps(s, dtaps);                                                                     \
    backward<T>({dy, dy_row, dy_step}, {z, z_row, z_step}, short_filter.fir, {taps, spectrum, skip},                   \
                {dz, long_taps.each(), sums.get()}, s);                                                              \
    long_taps.finish(dskip);                                                                                           \
    short_filter.finish(sums.get(), segments(l), dshort_taps, dshort_bias);                                            \
  }

CROCUTA_HYENA_FFT(f32, float)
#if CROCUTA_FLOAT64
CROCUTA_HYENA_FFT(f64, double)
#endif
