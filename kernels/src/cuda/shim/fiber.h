// A stack of its own for each CUDA thread of a block, and the switch between them. x86-64, System V.
#pragma once

#include <cstddef>

namespace penstock::shim {

// A suspended flow of control: where its stack stands.
class Context {
 public:
  // Continues `to` and comes back when somebody continues this one. `last` where this one is never continued.
  void switch_to(Context& to, bool last = false);

 private:
  friend class Fiber;
  void arrive();

  void* stack_pointer_ = nullptr;
  // What AddressSanitizer wants to know of a stack that is not the thread's own.
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
};

class Fiber {
 public:
  static constexpr size_t kStackBytes = 128 << 10;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to `context()` begin `entry`, which must not return.
  void prepare(void (*entry)());
  Context& context() { return context_; }

 private:
  void* stack_;
  Context context_;
};

// To be called first in a fiber's entry.
void fiber_has_begun(Context& self);

}  // namespace penstock::shim
