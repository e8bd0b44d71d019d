// Cuts one piece of device memory into arrays, each aligned to 256 bytes and followed by a gap that nobody may touch.
// Run once without memory to learn the size, then with it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace penstock::cuda {

class Arena {
 public:
  explicit Arena(Device* device = nullptr, void* base = nullptr) : device_(device), base_(static_cast<uint8_t*>(base)) {}

  template <class T>
  void take(T*& array, size_t count) {
    const size_t bytes = count * sizeof(T);
    const size_t next = (used_ + bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
    if (base_ != nullptr) {
      array = reinterpret_cast<T*>(base_ + used_);
      device_->forbid(base_ + used_ + bytes, next - used_ - bytes);
    }
    used_ = next;
  }
  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;
  Device* device_;
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace penstock::cuda
