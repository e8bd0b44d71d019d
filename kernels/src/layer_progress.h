// How many layers of the running step have the keys and values of all its rows in the pool.
//
// From then on the step only reads them: another thread that has seen `done() > layer` may read that layer of the step's blocks
// while the later ones are computed.
#pragma once

#include <atomic>

namespace penstock {

class LayerProgress {
 public:
  virtual ~LayerProgress() = default;

  // Before a step, on the thread that prepares it.
  void start() { done_.store(0, std::memory_order_relaxed); }

  // Layers 0 … done() - 1 are in the pool, and what was written there is seen by who has read this.
  int done() const { return done_.load(std::memory_order_acquire); }

  // Called by every compute thread after every layer; the first to come counts. It has seen the end of the phase that wrote the
  // layer, so that its release hands on what all threads have written; and as each thread has been here for every
  // earlier layer, the count never runs behind by more than one.
  void finish(int layer) {
    int expected = layer;
    if (done_.compare_exchange_strong(expected, layer + 1, std::memory_order_release, std::memory_order_relaxed)) changed();
  }

 protected:
  // On a compute thread: short, and without waiting.
  virtual void changed() = 0;

 private:
  std::atomic<int> done_{0};
};

}  // namespace penstock
