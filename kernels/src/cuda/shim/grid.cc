#include "grid.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

namespace penstock::shim {

namespace {

// Blocks are kept with the stacks of their threads, as making those takes longer than most kernels.
class Spares {
 public:
  std::unique_ptr<Block> take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (blocks_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(blocks_.back());
    blocks_.pop_back();
    return block;
  }
  void give(std::unique_ptr<Block> block) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

Spares spares;

}  // namespace

void run_grid(Dim3 grid, Dim3 threads, size_t shared_bytes, uint32_t seed, const Block::Kernel& kernel) {
  const uint64_t blocks = grid.count();
  std::atomic<uint64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto work = [&] {
    std::unique_ptr<Block> block = spares.take();
    for (uint64_t i; (i = next.fetch_add(1)) < blocks;) {
      // From the last to the first where the seed is odd: a block must not count on those with lower numbers.
      const uint64_t at = seed % 2 == 0 ? i : blocks - 1 - i;
      const Dim3 index(static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                       static_cast<unsigned>(at / (uint64_t{grid.x} * grid.y)));
      try {
        block->run(kernel, grid, threads, index, shared_bytes, static_cast<uint32_t>(seed + at));
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(blocks);
      }
    }
    spares.give(std::move(block));
  };
  std::vector<std::thread> others;
  const uint64_t most = std::min<uint64_t>(std::max(1u, std::thread::hardware_concurrency()), blocks);
  for (uint64_t i = 1; i < most; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace penstock::shim
