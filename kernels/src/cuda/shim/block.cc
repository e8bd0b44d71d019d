#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <numeric>

namespace penstock::shim {

namespace {

thread_local Block* current_block = nullptr;

constexpr size_t kSharedAlignment = 128;

std::string text(Dim3 at) { return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")"; }

}  // namespace

Block& Block::current() { return *current_block; }

std::string Block::place() const { return "block " + text(index_) + " of " + text(grid_); }

void Block::run(const Kernel& kernel, Dim3 grid, Dim3 threads, Dim3 index, size_t shared_bytes, uint32_t seed) {
  kernel_ = kernel;
  grid_ = grid;
  size_ = threads;
  index_ = index;
  count_ = live_ = static_cast<unsigned>(threads.count());
  at_barrier_ = 0;
  thrown_ = nullptr;
  // Exactly as large as was asked for, so that AddressSanitizer sees the end of it.
  void* shared;
  if (posix_memalign(&shared, kSharedAlignment, std::max(size_t{1}, shared_bytes)) != 0) throw std::bad_alloc();
  shared_ = {static_cast<unsigned char*>(shared), std::free};
  std::memset(shared_.get(), 0xff, shared_bytes);  // NaN in every width

  const unsigned warps = (count_ + kWarpLanes - 1) / kWarpLanes;
  warps_.assign(warps, Warp{});
  while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    thread.index = {i % threads.x, i / threads.x % threads.y, i / (threads.x * threads.y)};
    thread.lane = i % kWarpLanes;
    thread.warp = &warps_[i / kWarpLanes];
    thread.warp->live |= 1u << thread.lane;
    thread.waits_for = nullptr;
    thread.ended = false;
    thread.copies.clear();
    thread.copy_group = 0;
    thread.awaited = false;
    thread.fiber.prepare(run_thread);
  }

  current_block = this;
  scheduler_ = Context{};  // another thread's stack than the last time, maybe
  std::mt19937 random(seed);
  copies_early_ = random() % 2 == 0;
  std::vector<unsigned> order(warps);
  std::iota(order.begin(), order.end(), 0u);
  while (live_ > 0) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned warp : order) progress |= run_warp(warp, random);
    if (thrown_) break;
    if (!progress) report_deadlock();
  }
  current_block = nullptr;
  if (thrown_) std::rethrow_exception(thrown_);
}

// Runs the lanes of a warp until all of them wait or have ended.
bool Block::run_warp(unsigned warp, std::mt19937& random) {
  const unsigned first = warp * kWarpLanes;
  const unsigned lanes = std::min(kWarpLanes, count_ - first);
  const unsigned shift = random() % lanes;
  bool progress = false;
  for (bool again = true; again && !thrown_;) {
    again = false;
    for (unsigned i = 0; i < lanes; ++i) {
      Thread& thread = *threads_[first + (i + shift) % lanes];
      if (thread.ended) continue;
      if (thread.waits_for != nullptr) {
        if (*thread.waits_for == thread.waits_since) continue;
        thread.waits_for = nullptr;
      }
      resume(thread);
      progress = again = true;
      if (thrown_) break;
    }
  }
  return progress;
}

void Block::resume(Thread& thread) {
  thread_ = &thread;
  scheduler_.switch_to(thread.fiber.context());
}

void Block::run_thread() {
  Block& block = current();
  Thread& self = block.thread();
  fiber_has_begun(self.fiber.context());
  try {
    block.kernel_.run(block.kernel_.context);
    if (!self.copies.empty()) throw std::runtime_error("a thread ends before its copies to shared memory have been waited for");
  } catch (...) {
    block.thrown_ = std::current_exception();
  }
  block.end_thread(self);
  self.fiber.context().switch_to(block.scheduler_, true);
  std::abort();  // nobody continues a thread that has ended
}

void Block::end_thread(Thread& thread) {
  thread.ended = true;
  --live_;
  thread.warp->live &= ~(1u << thread.lane);
  // A barrier waits for the threads that are left.
  if (live_ > 0 && at_barrier_ == live_) {
    at_barrier_ = 0;
    ++barrier_generation_;
  }
}

void Block::wait(const uint64_t& generation, const char* operation) {
  Thread& self = *thread_;
  self.waits_for = &generation;
  self.waits_since = generation;
  self.waits_in = operation;
  self.fiber.context().switch_to(scheduler_);
}

void Block::barrier() {
  if (++at_barrier_ == live_) {
    at_barrier_ = 0;
    ++barrier_generation_;
  } else {
    wait(barrier_generation_, "__syncthreads");
  }
}

void Block::meet(uint32_t mask, void* brought, Combine combine, const char* operation) {
  Thread& self = *thread_;
  Warp& warp = *self.warp;
  if ((mask >> self.lane & 1) == 0) throw std::runtime_error(place() + ": " + operation + " by a lane that is not in its mask");
  if ((mask & ~warp.live) != 0) throw std::runtime_error(place() + ": " + operation + " waits for a lane that has ended");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.combine = combine;
    warp.operation = operation;
  } else if (warp.combine != combine || warp.mask != mask) {
    throw std::runtime_error(place() + ": lanes of a warp meet in " + operation + " and in " + warp.operation);
  }
  warp.brought[self.lane] = brought;
  warp.arrived |= 1u << self.lane;
  if (warp.arrived != mask) return wait(warp.generation, operation);
  combine(warp.brought, mask);
  warp.arrived = 0;
  std::fill(std::begin(warp.brought), std::end(warp.brought), nullptr);
  ++warp.generation;
}

void Block::report_deadlock() const {
  std::string message = place() + ": its threads wait for each other";
  unsigned told = 0;
  for (unsigned i = 0; i < count_ && told < 8; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.ended) continue;
    message += (told++ == 0 ? ": thread " : ", thread ") + std::to_string(i) + " in " + thread.waits_in;
  }
  if (live_ > told) message += ", and " + std::to_string(live_ - told) + " more";
  current_block = nullptr;
  throw std::runtime_error(message + "; " + std::to_string(count_ - live_) + " have ended");
}

}  // namespace penstock::shim
