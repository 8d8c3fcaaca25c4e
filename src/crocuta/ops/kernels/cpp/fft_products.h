// Products of the spectra of blocks: causal convolutions over blocks, at each frequency. What fft_conv.cpp is made of.
#pragma once

#include <algorithm>

#include "fft_parts.h"

namespace {

// Numbers from one block's spectrum to the next.
template <typename T>
constexpr int64_t stride(int64_t block) {
  return spaced(block) * kPoint<T>;
}

template <typename T>
CROCUTA_INLINE void multiply_add(Vec<T> ar, Vec<T> ai, const T* b, Vec<T>& re, Vec<T>& im) {
  const Vec<T> br = load(b), bi = load(b + kLanes<T>);
  re = re + ar * br - ai * bi;
  im = im + ar * bi + ai * br;
}

// C_m, .., C_(m-Count+1) at one frequency: sum_i a_i b_(m-i), where b has `b_blocks` blocks (All: more than m) and a
// more than m.
template <typename T, int Count, bool All>
CROCUTA_INLINE void block_products(const T* a, const T* b, int64_t b_blocks, int64_t step, int64_t m, Vec<T>* re,
                                   Vec<T>* im) {
#pragma GCC unroll 4
  for (int q = 0; q < Count; ++q) re[q] = im[q] = Vec<T>{};
  const int64_t end = m - Count + 1;  // up to here i belongs to all outputs, from `whole` on
  const int64_t whole = All ? 0 : std::max<int64_t>(0, m + 1 - b_blocks);
  if (!All)
    for (int64_t i = std::max<int64_t>(0, whole - Count + 1); i < whole; ++i)
      for (int64_t q = whole - i; q < std::min<int64_t>(Count, m - i + 1); ++q)
        multiply_add(load(a + i * step), load(a + i * step + kLanes<T>), b + (m - i - q) * step, re[q], im[q]);
  const T *from = a + whole * step, *by = b + (m - whole) * step;
  for (int64_t i = whole; i <= end; ++i, from += step, by -= step) {
    const Vec<T> ar = load(from), ai = load(from + kLanes<T>);
#pragma GCC unroll 4
    for (int q = 0; q < Count; ++q) multiply_add(ar, ai, by - q * step, re[q], im[q]);
  }
#pragma GCC unroll 4
  for (int late = 1; late < Count; ++late) {
    const int64_t i = end + late;
    if (!All && i < whole) continue;
    const Vec<T> ar = load(a + i * step), ai = load(a + i * step + kLanes<T>);
#pragma GCC unroll 4
    for (int q = 0; q < Count - late; ++q) multiply_add(ar, ai, b + (Count - 1 - late - q) * step, re[q], im[q]);
  }
}

// Calls put(m, re, im) for every m in [first, last], from the last on.
template <typename T, bool All, typename Put>
CROCUTA_INLINE void each_product(const T* a, const T* b, int64_t b_blocks, int64_t step, int64_t first, int64_t last,
                                 Put&& put) {
  Vec<T> re[4], im[4];
  int64_t m = last;
  for (; m - 3 >= first; m -= 4) {
    block_products<T, 4, All>(a, b, b_blocks, step, m, re, im);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) put(m - q, re[q], im[q]);
  }
  for (; m >= first; --m) {
    block_products<T, 1, All>(a, b, b_blocks, step, m, re, im);
    put(m, re[0], im[0]);
  }
}

// to_(m - first) (+)= C_m - i C_(m-1) for m in [first, blocks), C of a and b and D of a, at one frequency; `to` may be
// a or b if first is 0.
template <typename T>
CROCUTA_INLINE void convolve_blocks(const T* a, int64_t blocks, const T* b, int64_t b_blocks, Vec<T> skip,
                                    int64_t first, bool add, T* to, int64_t step) {
  Vec<T> later_re = {}, later_im = {};
  const auto put = [&](int64_t m, Vec<T> re, Vec<T> im) {
    if (m >= 0) {
      re = re + skip * load(a + m * step);
      im = im + skip * load(a + m * step + kLanes<T>);
    }
    if (m + 1 < blocks) {
      T* at = to + (m + 1 - first) * step;
      Vec<T> sum_re = later_re + im, sum_im = later_im - re;
      if (add) {
        sum_re = sum_re + load(at);
        sum_im = sum_im + load(at + kLanes<T>);
      }
      store(at, sum_re);
      store(at + kLanes<T>, sum_im);
    }
    later_re = re;
    later_im = im;
  };
  const int64_t least = std::max<int64_t>(0, first - 1);
  if (b_blocks >= blocks) each_product<T, true>(a, b, b_blocks, step, least, blocks - 1, put);
  else each_product<T, false>(a, b, b_blocks, step, least, blocks - 1, put);
  if (first == 0) put(-1, Vec<T>{}, Vec<T>{});
}

}  // namespace
