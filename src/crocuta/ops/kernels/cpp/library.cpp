// What the loader asks the library before it uses anything else of it.

#define CROCUTA_EXPORT extern "C" __attribute__((visibility("default")))

// The hash of the sources that it was built from: a library that does not fit the package is not used.
CROCUTA_EXPORT const char* crocuta_sources() { return CROCUTA_SOURCES; }

// The best instruction set of this machine that the library has kernels for.
CROCUTA_EXPORT const char* crocuta_best_isa() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
  return "base";
}

// Whether the processor is Intel's: MKL uses AVX-512 on no other.
CROCUTA_EXPORT int crocuta_intel() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return 0;
#endif
}
