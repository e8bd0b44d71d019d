#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the shim switches stacks on x86-64 only"
#endif

// Saves the registers that a function has to preserve, and swaps stacks.
extern "C" void penstock_switch_stack(void** save, void* to);
asm(R"(
.text
.globl penstock_switch_stack
.hidden penstock_switch_stack
.type penstock_switch_stack,@function
penstock_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size penstock_switch_stack, .-penstock_switch_stack
)");

namespace penstock::shim {

namespace {
constexpr size_t kGuardBytes = 4096;
constexpr int kSavedRegisters = 6;
}  // namespace

void Context::switch_to(Context& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  if (bottom_ == nullptr) {  // a thread's own stack
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &bytes_);
    pthread_attr_destroy(&attributes);
    bottom_ = bottom;
  }
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, to.bottom_, to.bytes_);
#endif
  penstock_switch_stack(&stack_pointer_, to.stack_pointer_);
  arrive();
}

void Context::arrive() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

Fiber::Fiber()
    : stack_(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
  if (stack_ == MAP_FAILED) throw std::bad_alloc();
  mprotect(stack_, kGuardBytes, PROT_NONE);  // stacks grow downwards
  context_.bottom_ = static_cast<char*>(stack_) + kGuardBytes;
  context_.bytes_ = kStackBytes - kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_, kStackBytes); }

void Fiber::prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // What a thread that never ended has left on its stack.
  __asan_unpoison_memory_region(const_cast<void*>(context_.bottom_), context_.bytes_);
#endif
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStackBytes);
  *--top = nullptr;  // where `entry` would return to; leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  top -= kSavedRegisters;
  for (int i = 0; i < kSavedRegisters; ++i) top[i] = nullptr;
  context_.stack_pointer_ = top;
  context_.fake_stack_ = nullptr;
}

void fiber_has_begun(Context& self) {
  (void)self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace penstock::shim
