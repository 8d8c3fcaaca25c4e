// What the loader asks the library before it uses anything else of it, and what it asks of the machine.

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

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

// Asks for pages of 2 MiB below the whole ones of a range that was not written yet: a fault zeroes a page, and 512
// small faults cost several times what one large one does. Systems that know no such pages ignore it.
CROCUTA_EXPORT void crocuta_huge_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t{1} << 21, first = reinterpret_cast<uintptr_t>(start);
  const uintptr_t begin = (first + page - 1) & ~(page - 1), end = (first + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}
