// One vector of channels of channels-last tensors, as kernels that work on one at a time see them.
#pragma once

#include "fft.h"

namespace {

// One vector of channels of one row: l vectors, `step` apart. Null where an optional tensor is not there. `far`: it is
// written past the caches, and stored_far() called.
template <typename T>
struct Column {
  T* at = nullptr;
  int64_t step = 0;
  bool far = false;

  CROCUTA_INLINE Vec<T> operator[](int64_t t) const { return load(const_cast<const T*>(at) + t * step); }
  CROCUTA_INLINE void set(int64_t t, Vec<T> v) const {
    if (far) store_far(at + t * step, v);
    else store(at + t * step, v);
  }
  explicit operator bool() const { return at != nullptr; }
  Column reversed(int64_t length) const { return at ? Column{at + (length - 1) * step, -step} : *this; }
};

// A tensor [b l d] with channel stride 1.
template <typename T>
struct Tensor {
  T* at;
  int64_t row, step;
};

// Columns of tensors; where there are fewer channels than lanes, copies of them, with zeros behind, that are put back.
template <typename T>
class Columns {
 public:
  Columns(int64_t row, int64_t channel, int64_t lanes, int64_t length, int64_t tensors)
      : row_(row), channel_(channel), lanes_(lanes), length_(length),
        copies_(lanes < kLanes<T> ? tensors * length * kLanes<T> : 1), free_(copies_.get()) {}

  Column<T> input(const Tensor<const T>& from) {
    if (!from.at) return {};
    const T* at = from.at + row_ * from.row + channel_;
    if (lanes_ == kLanes<T>) return {const_cast<T*>(at), from.step};
    T* copy = take();
    for (int64_t t = 0; t < length_; ++t) store(copy + t * kLanes<T>, load(at + t * from.step, lanes_));
    return {copy, kLanes<T>};
  }

  Column<T> output(const Tensor<T>& to) {
    if (!to.at) return {};
    if (lanes_ == kLanes<T>)
      return {to.at + row_ * to.row + channel_, to.step, writes_far(to.at, length_ * to.step, to.step)};
    return {take(), kLanes<T>};
  }

  void put_back(const Column<T>& column, const Tensor<T>& to) const {
    if (!to.at || lanes_ == kLanes<T>) return;
    T* at = to.at + row_ * to.row + channel_;
    for (int64_t t = 0; t < length_; ++t) store(at + t * to.step, column[t], lanes_);
  }

 private:
  T* take() {
    T* taken = free_;
    free_ += length_ * kLanes<T>;
    return taken;
  }

  int64_t row_, channel_, lanes_, length_;
  Scratch<T> copies_;
  T* free_;
};

}  // namespace
