// The compute threads of one engine: persistent, parked when idle, in lock-step while they run a step.
//
// All threads run the same function, which is a sequence of `for_each` calls. Tasks are claimed one by one, so a thread
// whose core was taken away delays only the task it holds. Which thread runs a task never changes a result.
#pragma once

#include <atomic>
#include <thread>
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

  // Runs `job(thread)` on every thread, 0 being the caller, and returns when all have ended. The job must not throw.
  // Floating point runs in the default environment: to nearest, subnormals kept.
  template <class Job>
  void run(Job&& job) {
    start([](void* context, int thread) { (*static_cast<std::remove_reference_t<Job>*>(context))(thread); }, &job);
  }

  // Within `run`, called by all threads alike: runs `body(task)` once for each task, then waits until all are done.
  template <class Body>
  void for_each(int tasks, Body&& body) {
    for_each(tasks, body, [] {});
  }

  // As above; the last thread to finish then runs `last` while the others wait: cheaper than a round of its own for work that
  // is not worth sharing.
  template <class Body, class Last>
  void for_each(int tasks, Body&& body, Last&& last) {
    for (int task = next_task_.fetch_add(1, std::memory_order_relaxed); task < tasks;
         task = next_task_.fetch_add(1, std::memory_order_relaxed)) {
      body(task);
    }
    const int phase = phase_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      last();
      release(phase);
    } else {
      wait(phase);
    }
  }

 private:
  using Entry = void (*)(void* context, int thread);
  void release(int phase);
  void wait(int phase) const;
  void start(Entry entry, void* context);
  void work(int thread);

  const int threads_;
  std::vector<std::thread> workers_;
  Entry entry_ = nullptr;
  void* context_ = nullptr;
  bool stopping_ = false;

  // Each on a cache line of its own: they are written by one thread while others spin on them.
  alignas(64) std::atomic<int> generation_{0};  // raised for each run
  alignas(64) std::atomic<int> phase_{0};       // raised when all tasks of a for_each are done
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> next_task_{0};
};

}  // namespace penstock
