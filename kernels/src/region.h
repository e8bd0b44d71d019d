// Anonymous memory straight from the kernel: aligned to a page at least, zero, and committed only where it is touched.
#pragma once

#include <cstddef>
#include <string>

namespace penstock {

class Region {
 public:
  Region() = default;
  // Reserves `bytes`; `what` names it in the error thrown where the address space does not suffice.
  Region(size_t bytes, const std::string& what);
  ~Region();
  Region(Region&& other) noexcept;
  Region& operator=(Region&& other) noexcept;

  template <class T>
  T* as() const {
    return static_cast<T*>(base_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* base_ = nullptr;
  size_t bytes_ = 0;
};

inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Cuts a Region into arrays, each aligned to a cache line. Run once without memory to learn the size, then with it.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  void take(T*& array, size_t count) {
    if (base_ != nullptr) array = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * sizeof(T), 64);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace penstock
