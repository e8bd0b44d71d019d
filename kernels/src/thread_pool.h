// The compute threads of one engine: persistent, parked when idle.
//
// All threads run the same function, which is a sequence of `for_each` calls (phases). Tasks are claimed one by one, and a phase
// ends with its last task, not with the last thread: a thread whose core was taken away delays only the task it holds, and
// skips what others did meanwhile. Which thread runs a task never changes a result.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace penstock {

class ThreadPool {
 public:
  // `threads` compute threads, of which the caller of `run` is one.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return threads_; }

  // Runs `job(thread)` on the caller, as thread 0, and on whichever other threads come in time; returns when all have left it.
  // What a job does outside of `for_each` has to be the same on every thread and must not throw. Floating point runs in
  // the default environment: to nearest, subnormals kept.
  template <class Job>
  void run(Job&& job) {
    start([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
  }

  // Within `run`: `body(task)` runs once for each task, on some thread; all are done when this returns.
  template <class Body>
  void for_each(int thread, int tasks, Body&& body) {
    for_each(thread, tasks, body, [] {});
  }

  // As above; whoever ends the last task then runs `last` while the others wait: cheaper than a phase of its own for work
  // that is not worth sharing. Nothing runs where there are no tasks.
  template <class Body, class Last>
  void for_each(int thread, int tasks, Body&& body, Last&& last) {
    if (tasks == 0) return;
    const uint32_t phase = locals_[thread].phase++;
    uint64_t next = next_.load(std::memory_order_acquire);
    while (next >> 32 == phase && static_cast<uint32_t>(next) < static_cast<uint32_t>(tasks)) {
      if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      body(static_cast<int>(static_cast<uint32_t>(next)));
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) {
        last();
        end_phase(phase);
        return;
      }
      next = next_.load(std::memory_order_acquire);
    }
    await_end(phase);
  }

 private:
  using Entry = void (*)(void* context, int thread);
  struct alignas(64) Local {
    uint32_t phase;  // number of the next for_each
  };

  void start(Entry entry, void* context);
  void stop();
  void work(int thread);
  void end_phase(uint32_t phase);
  void await_end(uint32_t phase) const;

  const int threads_;
  std::vector<std::thread> workers_;
  std::vector<Local> locals_;  // [threads]
  Entry entry_ = nullptr;
  void* context_ = nullptr;
  uint32_t first_phase_ = 0;  // of the run
  std::atomic<bool> stopping_{false};

  // Each on a cache line of its own: they are written by one thread while others spin on them.
  alignas(64) std::atomic<int> generation_{0};  // odd while a run is open to threads that come
  alignas(64) std::atomic<int> inside_{0};      // threads in the run, but for its caller
  alignas(64) std::atomic<uint64_t> next_{0};   // number of the phase << 32 | next task of it
  alignas(64) std::atomic<int> done_{0};        // tasks of the phase that are done
};

}  // namespace penstock
