#include "thread_pool.h"

#include <cfenv>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace penstock {

namespace {

// About 50 us between phases, then the core is given up: it may be the very one another thread needs.
constexpr int kPhaseSpins = 1500;
// Between steps; long enough for the event loop to compose the next one.
constexpr int kIdleSpins = 3000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// These counters run over within days; unsigned arithmetic lets them.
inline int next(int counter) { return static_cast<int>(static_cast<unsigned>(counter) + 1u); }

void wait_while(const std::atomic<int>& value, int old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// Rounding to nearest, no flushing of subnormals, no traps, whatever the host program has set on this thread.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

}  // namespace

ThreadPool::ThreadPool(int threads) : threads_(threads) {
  workers_.reserve(threads - 1);
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // no more threads to be had: let those go that were started
    stopping_ = true;
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  stopping_ = true;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Entry entry, void* context) {
  DefaultFloatingPoint mode;
  entry_ = entry;
  context_ = context;
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  entry(context, 0);
  for_each(0, [](int) {});
}

void ThreadPool::work(int thread) {
  DefaultFloatingPoint mode;
  for (int seen = 0;;) {
    wait_while(generation_, seen, kIdleSpins);
    seen = next(seen);  // runs do not overlap: the end of a run holds its caller until all threads have come there
    if (stopping_) return;
    entry_(context_, thread);
    for_each(0, [](int) {});
  }
}

void ThreadPool::release(int phase) {
  arrived_.store(0, std::memory_order_relaxed);
  next_task_.store(0, std::memory_order_relaxed);
  phase_.store(next(phase), std::memory_order_release);
  phase_.notify_all();
}

void ThreadPool::wait(int phase) const { wait_while(phase_, phase, kPhaseSpins); }

}  // namespace penstock
