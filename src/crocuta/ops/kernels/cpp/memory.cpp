// Memory of large results and of what kernels work in, kept for the next ones.
//
// The C library gives large pieces back to the system at once, and the system hands each page of a new one out with a
// fault that sets it to zero: often more time than a kernel needs to fill it. Here a piece that comes back waits for
// whoever asks next, in parts if need be. What waits and what is in use together never exceed what was in use at one
// time, and the system is told that it may take what waits when it is short of memory.
//
// Torch takes a piece as DLPack describes arrays (dlpack.h, version 0 of the interface), and calls the deleter, from
// any thread, when the last tensor over it is gone.

#include "memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <list>
#include <map>
#include <mutex>
#include <new>

#if (defined(__linux__) || defined(__APPLE__)) && !defined(__SANITIZE_ADDRESS__)
#define CROCUTA_KEEPS_MEMORY  // a sanitizer watches the borders of what the C library gives out, and not those of ours
#include <pthread.h>
#include <sys/mman.h>
#endif

#define CROCUTA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t kPage = size_t{1} << 21;  // that of large pages

#if defined(CROCUTA_KEEPS_MEMORY)

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

class Pool {
 public:
  // From the smallest piece that is large enough; what is left of it waits on.
  Piece take(size_t size) {
    std::list<Piece> left;
    {
      std::lock_guard<std::mutex> lock(mutex);
      auto best = waiting_.end();
      for (auto piece = waiting_.begin(); piece != waiting_.end(); ++piece) {
        const size_t found = piece->second.size;
        if (found >= size && (best == waiting_.end() || found < best->second.size)) best = piece;
      }
      count(size);
      if (best != waiting_.end()) {
        char* const at = best->first;
        const Waiting rest{best->second.size - size, best->second.since};
        waiting_.erase(best);
        if (rest.size) waiting_.emplace(at + size, rest);
        waits_ -= size;
        return {at, size};
      }
      while (!waiting_.empty() && used_ + waits_ > most_) left.push_back(drop(used_ + waits_ - most_));
    }
    unmap(left);
    char* at = map(size);
    if (!at && release()) at = map(size);
    if (!at) {
      std::lock_guard<std::mutex> lock(mutex);
      used_ -= size;
      most_ = used_;  // what could not be had was never in use, and nothing waits
      throw std::bad_alloc();
    }
    return {at, size};
  }

  // Joins its neighbours in memory, so that what was divided is whole again.
  void give(Piece piece) {
#ifdef MADV_FREE
    madvise(piece.at, piece.size, MADV_FREE);
#endif
    std::lock_guard<std::mutex> lock(mutex);
    used_ -= piece.size;
    waits_ += piece.size;
    auto after = waiting_.lower_bound(piece.at);
    if (after != waiting_.end() && piece.at + piece.size == after->first) {
      piece.size += after->second.size;
      after = waiting_.erase(after);
    }
    if (after != waiting_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second.size == piece.at) {
        before->second = {before->second.size + piece.size, ++clock_};
        return;
      }
    }
    waiting_.emplace(piece.at, Waiting{piece.size, ++clock_});
  }

  // Gives what waits back to the system; how many bytes that were.
  size_t release() {
    std::list<Piece> left;
    size_t bytes;
    {
      std::lock_guard<std::mutex> lock(mutex);
      for (const auto& piece : waiting_) left.push_back({piece.first, piece.second.size});
      waiting_.clear();
      bytes = waits_;
      waits_ = 0;
      most_ = used_;
    }
    unmap(left);
    return bytes;
  }

  std::mutex mutex;  // held over a fork, so that the child's is free

 private:
  struct Waiting {
    size_t size;
    uint64_t since;
  };

  void count(size_t bytes) {
    used_ += bytes;
    if (used_ > most_) most_ = used_;
  }

  // The end of the piece that waits longest, or all of it: at most ``bytes``, which are whole pages.
  Piece drop(size_t bytes) {
    auto oldest = waiting_.begin();
    for (auto piece = waiting_.begin(); piece != waiting_.end(); ++piece)
      if (piece->second.since < oldest->second.since) oldest = piece;
    const size_t size = std::min(bytes, oldest->second.size);
    const Piece end{oldest->first + oldest->second.size - size, size};
    oldest->second.size -= size;
    if (!oldest->second.size) waiting_.erase(oldest);
    waits_ -= size;
    return end;
  }

  static void unmap(const std::list<Piece>& pieces) {
    for (const Piece& piece : pieces) munmap(piece.at, piece.size);
  }

  // Whole large pages, or a null pointer: of one page more the ends are given back.
  static char* map(size_t size) {
    void* const at = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    const size_t before = (kPage - reinterpret_cast<uintptr_t>(at) % kPage) % kPage;
    char* const begin = static_cast<char*>(at) + before;
    if (before) munmap(at, before);
    munmap(begin + size, kPage - before);
#ifdef MADV_HUGEPAGE
    madvise(begin, size, MADV_HUGEPAGE);  // a wish: its refusal changes nothing
#endif
    return begin;
  }

  std::map<char*, Waiting> waiting_;
  uint64_t clock_ = 0;
  size_t used_ = 0, waits_ = 0, most_ = 0;
};

Pool& pool() {
  static Pool* const one = [] {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return new Pool;  // for ever: tensors may outlive what ends with the process
  }();
  return *one;
}

#endif

// --- as DLPack has them ---

struct Device {
  int32_t kind, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Array {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // none: contiguous
  uint64_t byte_offset;
};
struct ManagedArray {
  Array array;
  void* context;
  void (*deleter)(ManagedArray*);
};
constexpr Device kCpu{1, 0};

struct Loan {
  ManagedArray managed;
  Piece piece;
};

void give_back(ManagedArray* managed) {
  Loan* const loan = static_cast<Loan*>(managed->context);
  give_memory(loan->piece);
  std::free(loan);
}

}  // namespace

Piece take_memory(size_t bytes) {
#if defined(CROCUTA_KEEPS_MEMORY)
  return pool().take(whole_pages(bytes));
#else
  return {static_cast<char*>(::operator new(bytes, std::align_val_t(kPage))), bytes};
#endif
}

void give_memory(Piece piece) {
#if defined(CROCUTA_KEEPS_MEMORY)
  pool().give(piece);
#else
  ::operator delete(piece.at, std::align_val_t(kPage));
#endif
}

// A contiguous array of the CPU that holds any values, for torch to take over; null where there is no memory.
CROCUTA_EXPORT void* crocuta_memory_array(int64_t code, int64_t bits, int64_t ndim, const int64_t* shape) {
  size_t bytes = static_cast<size_t>(bits / 8);
  for (int64_t i = 0; i < ndim; ++i) bytes *= static_cast<size_t>(shape[i]);
  void* const room = std::malloc(sizeof(Loan) + static_cast<size_t>(ndim) * sizeof(int64_t));
  if (!room) return nullptr;
  Piece piece;
  try {
    piece = take_memory(bytes);
  } catch (const std::bad_alloc&) {
    std::free(room);
    return nullptr;
  }
  int64_t* const sizes = reinterpret_cast<int64_t*>(static_cast<char*>(room) + sizeof(Loan));
  for (int64_t i = 0; i < ndim; ++i) sizes[i] = shape[i];
  const DataType dtype{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  const Array array{piece.at, kCpu, static_cast<int32_t>(ndim), dtype, sizes, nullptr, 0};
  return &(new (room) Loan{{array, room, give_back}, piece})->managed;
}

// Gives what nothing uses back to the system; how many bytes that were.
CROCUTA_EXPORT int64_t crocuta_memory_release() {
#if defined(CROCUTA_KEEPS_MEMORY)
  return static_cast<int64_t>(pool().release());
#else
  return 0;
#endif
}
