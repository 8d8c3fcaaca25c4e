// Memory that a kernel works in, for whole vectors and not set to anything.
//
// Much of it is asked for in large pages, as it is gone through with strides. The system sets new pages to zero, which
// costs as much as a pass over them, so one large piece is kept for the next call. The system is told that it may take
// the kept one when it is short of memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr size_t kLargePage = size_t{1} << 21;
constexpr size_t kMostKept = size_t{1} << 27;  // bytes

class Pages {
 public:
  explicit Pages(size_t bytes) : size((bytes + kLargePage - 1) / kLargePage * kLargePage) {
    at = ::operator new(size, std::align_val_t(kLargePage));
#ifdef MADV_HUGEPAGE
    madvise(at, size, MADV_HUGEPAGE);  // a wish: its refusal changes nothing
#endif
  }
  ~Pages() { ::operator delete(at, std::align_val_t(kLargePage)); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  // The kept piece if it is large enough, or a new one; keep() gives back what take() gave.
  static Pages* take(size_t bytes) {
    Pages* piece = kept().exchange(nullptr, std::memory_order_acquire);
    if (piece && piece->size >= bytes) return piece;
    delete piece;
    return new Pages(bytes);
  }
  static void keep(Pages* piece) {
    if (piece->size <= kMostKept) {
#ifdef MADV_FREE
      madvise(piece->at, piece->size, MADV_FREE);
#endif
      piece = kept().exchange(piece, std::memory_order_release);
    }
    delete piece;
  }

  void* at;
  size_t size;

 private:
  static std::atomic<Pages*>& kept() {
    static std::atomic<Pages*> one{nullptr};
    return one;
  }
};

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (bytes >= kLargePage) pages_ = Pages::take(bytes);
    memory_ = static_cast<T*>(pages_ ? pages_->at : ::operator new(bytes, kLine));
  }
  ~Scratch() {
    if (pages_) Pages::keep(pages_);
    else ::operator delete(memory_, kLine);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return memory_; }
  T* operator+(int64_t offset) const { return memory_ + offset; }

 private:
  static constexpr std::align_val_t kLine{64};
  Pages* pages_ = nullptr;
  T* memory_;
};

}  // namespace
