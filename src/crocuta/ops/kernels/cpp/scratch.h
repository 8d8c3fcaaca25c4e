// Memory that a kernel works in, for whole vectors and not set to anything.
//
// What is large comes from what is kept (memory.h), in large pages, as it is gone through with strides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "memory.h"

namespace {

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    const size_t bytes = static_cast<size_t>(size) * sizeof(T);
    if (bytes >= kLarge) piece_ = take_memory(bytes);
    memory_ = piece_.at ? reinterpret_cast<T*>(piece_.at) : static_cast<T*>(::operator new(bytes, kLine));
  }
  ~Scratch() {
    if (piece_.at) give_memory(piece_);
    else ::operator delete(memory_, kLine);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return memory_; }
  T* operator+(int64_t offset) const { return memory_ + offset; }

 private:
  static constexpr size_t kLarge = size_t{1} << 21;
  static constexpr std::align_val_t kLine{64};
  Piece piece_{nullptr, 0};
  T* memory_;
};

}  // namespace
