#include "thread_pool.h"

#include <cfenv>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace penstock {

namespace {

// Tens of microseconds between phases, then the core is given up: it may be the very one another thread needs.
constexpr int kPhaseSpins = 2000;
// Between steps: long enough for the event loop to compose the next one.
constexpr int kIdleSpins = 4000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Waits until `ready(value)`, spinning first; returns the value. Whoever changes it notifies.
template <class T, class Ready>
T await(const std::atomic<T>& value, int spins, Ready&& ready) {
  T seen = value.load(std::memory_order_acquire);
  for (int i = 0; i < spins && !ready(seen); ++i) {
    pause();
    seen = value.load(std::memory_order_acquire);
  }
  while (!ready(seen)) {
    value.wait(seen, std::memory_order_acquire);
    seen = value.load(std::memory_order_acquire);
  }
  return seen;
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

ThreadPool::ThreadPool(int threads) : threads_(threads), locals_(threads) {
  workers_.reserve(threads - 1);
  try {
    for (int thread = 1; thread < threads; ++thread) workers_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // no more threads to be had: let those go that were started
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true);
  generation_.fetch_add(2);  // still closed, but not what the workers have seen
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::start(Entry entry, void* context) {
  DefaultFloatingPoint mode;
  entry_ = entry;
  context_ = context;
  first_phase_ = static_cast<uint32_t>(next_.load() >> 32);
  generation_.fetch_add(1);
  generation_.notify_all();
  locals_[0].phase = first_phase_;
  entry(context, 0);
  // Closed before the count is read, as a worker raises the count before it looks whether the run is open: either it sees
  // the run closed, or it is waited for. What it works on may go out of scope after this.
  generation_.fetch_add(1);
  await(inside_, kPhaseSpins, [](int inside) { return inside == 0; });
}

void ThreadPool::work(int thread) {
  DefaultFloatingPoint mode;
  for (int seen = 0; !stopping_.load();) {
    await(generation_, kIdleSpins, [seen](int generation) { return generation != seen; });
    inside_.fetch_add(1);
    seen = generation_.load();
    if ((seen & 1) != 0) {
      locals_[thread].phase = first_phase_;
      entry_(context_, thread);
    }
    if (inside_.fetch_sub(1) == 1) inside_.notify_all();
  }
}

void ThreadPool::end_phase(uint32_t phase) {
  done_.store(0, std::memory_order_relaxed);
  next_.store(static_cast<uint64_t>(phase + 1) << 32, std::memory_order_release);
  next_.notify_all();
}

void ThreadPool::await_end(uint32_t phase) const {
  await(next_, kPhaseSpins, [phase](uint64_t next) { return next >> 32 != phase; });
}

}  // namespace penstock
