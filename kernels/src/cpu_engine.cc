#include "cpu_engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>
#include <mutex>

#include "gguf.h"

namespace penstock {

namespace {

bool all_finite(const float* values, int count) {
  int bad = 0;
  for (int i = 0; i < count; ++i) bad |= !(std::fabs(values[i]) <= std::numeric_limits<float>::max());
  return bad == 0;
}

}  // namespace

CpuEngine::CpuEngine(const EngineOptions& options) : Engine(options), kernels_(select_kernels(options.isa)), pool_(options.threads) {
  const std::shared_ptr<GgufFile> file = GgufFile::open(options.path);
  model_ = std::make_unique<Model>(*file, pool_);
  adopt(model_->shape());
  const ModelShape& s = shape();
  kv_ = std::make_unique<KvPool>(kernels_, options_.kv_dtype, s.layers, options_.blocks, s.kv_heads, options_.block_tokens, s.head_dim);
  forward_ = std::make_unique<Forward>(*model_, kernels_, *kv_, pool_, options_.max_rows,
                                       std::min(options_.max_rows, options_.max_outputs), options_.max_context);
  sampler_scratch_.resize(options_.threads);
}

StepResult CpuEngine::run(LayerProgress* progress) {
  const auto started = std::chrono::steady_clock::now();
  const int outputs = static_cast<int>(outputs_.size());
  StepResult result = empty_result();

  std::atomic<int> bad_row{-1};
  std::exception_ptr error;
  std::mutex error_mutex;
  pool_.run([&](int thread) {
    forward_->run(thread, progress);
    pool_.for_each(thread, static_cast<int>(logit_rows_.size()), [&](int i) {
      if (!all_finite(forward_->logits(i), shape_.vocabulary)) bad_row.store(logit_rows_[i]);
    });
    // All rows are checked before any sampler draws, so that a step that fails has changed no sampler.
    if (bad_row.load() >= 0) return;
    pool_.for_each(thread, outputs, [&](int i) {
      try {
        finish(outputs_[i], i, forward_->logits(outputs_[i].logit_row), -1, sampler_scratch_[thread], result);
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        error = std::current_exception();
      }
    });
  });
  outputs_.clear();
  if (bad_row.load() >= 0) refuse_logits(bad_row.load());
  if (error) std::rethrow_exception(error);
  result.compute_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
  return result;
}

std::shared_ptr<Engine> open_engine(const EngineOptions& options) { return std::make_shared<CpuEngine>(options); }

}  // namespace penstock
