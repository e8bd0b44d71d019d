// Runs the blocks of a grid on the CPU: every CUDA thread is a fiber, one operating system thread runs a block.
//
// Made to find mistakes rather than to be fast. Shared memory is as large as was asked for and full of NaN when a block begins.
// Warps run one after another, each as far as it can, in an order drawn anew for every sweep, and so do the lanes of a warp: what
// a missing barrier lets a warp read has, in some order, not been written yet. Lanes that wait for each other in vain are
// reported, with where they wait, and so are lanes of a warp that meet in different operations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace penstock::shim {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr uint64_t count() const { return uint64_t{x} * y * z; }
};

constexpr unsigned kWarpLanes = 32;
constexpr unsigned kMostThreads = 1024;

// What lanes bring to a warp-wide operation lies on their stacks; the last to come computes for all of them.
using Combine = void (*)(void* const* lanes /* [32], null where not in the mask */, uint32_t mask);

struct Warp {
  uint32_t live = 0;
  uint32_t mask = 0;     // of the operation that lanes wait in
  uint32_t arrived = 0;  // 0 where none does
  Combine combine = nullptr;
  const char* operation = nullptr;
  void* brought[kWarpLanes] = {};
  uint64_t generation = 0;  // counts operations
};

// A copy to shared memory that a thread has begun and not waited for.
struct PendingCopy {
  void* to;
  const void* from;  // null: zeros
  unsigned bytes;
  unsigned group;

  void carry_out() const {
    if (from == nullptr) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  }
};

struct Thread {
  Fiber fiber;
  Dim3 index;
  unsigned lane = 0;
  Warp* warp = nullptr;
  const uint64_t* waits_for = nullptr;  // a generation
  uint64_t waits_since = 0;
  const char* waits_in = nullptr;
  bool ended = false;
  std::vector<PendingCopy> copies;
  unsigned copy_group = 0;
  bool awaited = false;  // what was on the stream before
};

class Block {
 public:
  // Called for each thread.
  struct Kernel {
    void (*run)(void* context);
    void* context;
  };

  Block() = default;
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Throws what a thread has thrown, or std::runtime_error where threads wait in vain.
  void run(const Kernel& kernel, Dim3 grid, Dim3 threads, Dim3 index, size_t shared_bytes, uint32_t seed);

  // Of the thread that runs.
  static Block& current();
  Thread& thread() { return *thread_; }
  Dim3 grid() const { return grid_; }
  Dim3 threads() const { return size_; }
  Dim3 index() const { return index_; }
  unsigned char* shared() { return shared_.get(); }
  // Whether asynchronous copies are carried out when they begin, or when they are waited for: a block does all of them the same way.
  bool copies_early() const { return copies_early_; }

  void barrier();
  void meet(uint32_t mask, void* brought, Combine combine, const char* operation);

 private:
  static void run_thread();
  void resume(Thread& thread);
  void wait(const uint64_t& generation, const char* operation);
  void end_thread(Thread& thread);
  bool run_warp(unsigned warp, std::mt19937& random);
  [[noreturn]] void report_deadlock() const;
  std::string place() const;

  std::vector<std::unique_ptr<Thread>> threads_;  // kept from block to block
  std::vector<Warp> warps_;
  std::unique_ptr<unsigned char, void (*)(void*)> shared_{nullptr, nullptr};
  Kernel kernel_{};
  Dim3 grid_, size_, index_;
  unsigned count_ = 0;
  unsigned live_ = 0;
  unsigned at_barrier_ = 0;
  bool copies_early_ = false;
  uint64_t barrier_generation_ = 0;
  Thread* thread_ = nullptr;
  Context scheduler_;
  std::exception_ptr thrown_;
};

}  // namespace penstock::shim
