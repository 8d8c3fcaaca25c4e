// Vectors of the instruction set that a file is compiled for. Every kernel file is compiled once for each of them
// (hatch_build.py), with CROCUTA_ISA the name that ends its functions' names; which one runs is chosen at load time.
//
// GCC's and Clang's vector extensions: arithmetic is +, -, * and /, contracted to fused multiply-adds where the
// instruction set has them. One lane is one channel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef CROCUTA_ISA
#error "compile with -DCROCUTA_ISA=base, avx2 or avx512"
#endif

#define CROCUTA_JOIN_(a, b, c) a##_##b##_##c
#define CROCUTA_JOIN(a, b, c) CROCUTA_JOIN_(a, b, c)
// The exported name of a kernel: crocuta_<name>_<dtype>_<isa>.
#define CROCUTA_NAME(name, dtype) CROCUTA_JOIN(crocuta_##name, dtype, CROCUTA_ISA)
#define CROCUTA_EXPORT extern "C" __attribute__((visibility("default")))
#define CROCUTA_INLINE inline __attribute__((always_inline))

// float64 is for comparing: with AVX-512 it runs AVX2's kernels, which saves a quarter of everybody's building.
#if defined(__AVX512F__)
#define CROCUTA_VECTOR_BYTES 64
#define CROCUTA_REGISTERS 32
#define CROCUTA_FLOAT64 0
#elif defined(__AVX__)
#define CROCUTA_VECTOR_BYTES 32
#define CROCUTA_REGISTERS 16
#define CROCUTA_FLOAT64 1
#else
#define CROCUTA_VECTOR_BYTES 16
#define CROCUTA_REGISTERS 16
#define CROCUTA_FLOAT64 1
#endif

namespace {  // one copy an instruction set: the linker must never mix them

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(CROCUTA_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(CROCUTA_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename Simd<T>::Vec;

template <typename T>
constexpr int64_t kLanes = CROCUTA_VECTOR_BYTES / static_cast<int64_t>(sizeof(T));

template <typename T>
CROCUTA_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
CROCUTA_INLINE void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// To aligned memory, past the caches where the machine can: what is there is not read first. Before another thread reads
// it, stored_far() must be called. Built-in functions, because <immintrin.h> takes longer to read than most kernels do to
// compile.
template <typename T>
CROCUTA_INLINE void store_far(T* to, Vec<T> v) {
#if !defined(__SSE2__)
  store(to, v);
#elif defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec<T>*>(to));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(reinterpret_cast<float*>(to), (Vec<float>)v);
#elif defined(__AVX__)
  __builtin_ia32_movntps256(reinterpret_cast<float*>(to), (Vec<float>)v);
#else
  __builtin_ia32_movntps(reinterpret_cast<float*>(to), (Vec<float>)v);
#endif
}

CROCUTA_INLINE void stored_far() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

// Whether a tensor of so many numbers, in rows `step` apart, is better written past the caches, where it has no room:
// what is there need not be read first, and rows do not drive each other out. Measured.
template <typename T>
bool writes_far(const T* to, int64_t numbers, int64_t step) {
  constexpr int64_t kLarge = 4 << 20;
  return numbers * static_cast<int64_t>(sizeof(T)) > kLarge && reinterpret_cast<uintptr_t>(to) % sizeof(Vec<T>) == 0 &&
         step % kLanes<T> == 0;
}

// The first `count` lanes, zeros in the others; nothing behind them is read.
template <typename T>
CROCUTA_INLINE Vec<T> load(const T* from, int64_t count) {
  if (count >= kLanes<T>) return load(from);
  Vec<T> v = {};
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

// The first `count` lanes; nothing behind them is written.
template <typename T>
CROCUTA_INLINE void store(T* to, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) return store(to, v);
  std::memcpy(to, &v, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
CROCUTA_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

}  // namespace
