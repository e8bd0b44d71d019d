#include "cuda_engine.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "../gguf.h"
#include "../thread_pool.h"

namespace penstock::cuda {

namespace {

// Left to the driver and to others.
constexpr size_t kSpareBytes = size_t{64} << 20;
// Vectors of 16 bytes have to fall onto whole rows of every KV type.
constexpr int kBlockMultiple = 8;
constexpr int kHeadMultiple = 16;

std::string mebibytes(size_t bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }

}  // namespace

CudaEngine::CudaEngine(const EngineOptions& options, std::unique_ptr<Device> device)
    : Engine(options), device_(std::move(device)), stream_(*device_, device_->create_stream()) {
  ThreadPool threads(options.threads);
  const std::shared_ptr<GgufFile> file = GgufFile::open(options.path);
  const Model model(*file, threads, AwqForm::AsInFile);
  adopt(model.shape());
  check_shape();
  kv_.bits = kv_bits(options_.kv_dtype);
  kv_.layers = shape_.layers;
  kv_.blocks = options_.blocks;
  kv_.kv_heads = shape_.kv_heads;
  kv_.block_tokens = options_.block_tokens;
  kv_.head_dim = shape_.head_dim;
  const StepLimits limits = step_limits(shape_, kv_, options_.max_rows, options_.max_outputs, options_.max_context);
  check_memory(DeviceWeights::bytes(model), kv_.bytes(), StepMemory::device_bytes(shape_, limits), KvStaging::device_bytes(kv_));

  weights_ = std::make_unique<DeviceWeights>(*device_, model, threads);
  pool_ = DeviceMemory(*device_, device_->allocate(kv_.bytes(), "KV pool"));
  kv_.base = pool_.as<uint8_t>();
  memory_ = std::make_unique<StepMemory>(*device_, shape_, limits, stream_.get());
  forward_ = std::make_unique<CudaForward>(*device_, shape_, *weights_, kv_, *memory_, stream_.get());
  staging_ = std::make_unique<KvStaging>(*device_, kv_, select_crc32c(options_.isa));
}

// What the kernels have no form for is refused by name.
void CudaEngine::check_shape() const {
  const auto refuse = [&](const std::string& what) { throw std::runtime_error(device_->facts().name + ": " + what); };
  if (shape_.head_dim % kHeadMultiple != 0 || shape_.head_dim > kMostAttentionDim) {
    refuse("attention takes heads of a multiple of 16 dimensions, at most " + std::to_string(kMostAttentionDim) + ", and this model's have " +
           std::to_string(shape_.head_dim));
  }
  if (options_.block_tokens % kBlockMultiple != 0) {
    refuse("kv.blockTokens: expected a multiple of " + std::to_string(kBlockMultiple) + ", found " + std::to_string(options_.block_tokens));
  }
  if (shape_.vocabulary > kMostVocabulary) {
    refuse("sampling takes vocabularies of at most " + std::to_string(kMostVocabulary) + ", and this model's has " +
           std::to_string(shape_.vocabulary));
  }
}

void CudaEngine::check_memory(size_t weights, size_t pool, size_t arena, size_t staging) {
  const DeviceFacts& facts = device_->facts();
  const std::string parts = "weights " + mebibytes(weights) + ", KV pool " + mebibytes(pool) + " (" + std::to_string(options_.blocks) +
                            " blocks), step arena " + mebibytes(arena) + ", staging " + mebibytes(staging);
  const size_t needed = weights + pool + arena + staging;
  if (needed + std::min(kSpareBytes, facts.total_bytes / 16) > facts.free_bytes) {
    throw std::runtime_error(facts.name + ": needs " + mebibytes(needed) + ": " + parts + "; " + mebibytes(facts.free_bytes) + " of " +
                             mebibytes(facts.total_bytes) + " are free");
  }
  description_ = facts.name + ": " + parts + ", of " + mebibytes(facts.free_bytes) + " free";
}

void CudaEngine::plan() {
  DrawOrder* orders = memory_->host.orders;
  for (const Output& output : outputs_) {
    DrawOrder order = {};
    order.row = output.logit_row;
    // What is drawn from other logits than the model's is drawn by the host.
    if (output.sampler != nullptr && !output.sampler->adjusts()) {
      const SamplerOptions& o = output.sampler->options();
      order = {o.seed, output.sampler->position(), o.choice, o.temperature, o.top_k, o.top_p, o.min_p, output.logit_row, 1};
    }
    *orders++ = order;
  }
  forward_->plan(batch_.tokens.data(), segments_, logit_rows_, static_cast<int>(outputs_.size()));
}

StepResult CudaEngine::run(LayerProgress* progress) {
  const auto started = std::chrono::steady_clock::now();
  StepResult result = empty_result();
  forward_->launch(progress != nullptr);
  if (!outputs_.empty()) device_->copy_to_host(memory_->drawn_host, memory_->drawn, outputs_.size() * sizeof(int32_t), stream_.get());
  if (progress != nullptr) {
    for (int layer = 0; layer < shape_.layers; ++layer) {
      forward_->await_layer(layer);
      progress->finish(layer);
    }
  }
  device_->synchronise(stream_.get());

  // All rows are checked before any sampler draws, so that a step that fails has changed no sampler.
  for (size_t i = 0; i < outputs_.size(); ++i) {
    if (memory_->drawn_host[i] == kNotFinite) {
      const int row = logit_rows_[outputs_[i].logit_row];
      outputs_.clear();
      refuse_logits(row);
    }
  }
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Output& output = outputs_[i];
    const int32_t drawn = memory_->drawn_host[i];
    if (drawn >= 0) output.sampler->append(drawn);
    if (!needs_logits(output, drawn)) result.tokens[i] = output.sampler != nullptr ? drawn : output.target;
  }
  finish_on_host(result);
  outputs_.clear();
  result.compute_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - started).count();
  return result;
}

bool CudaEngine::needs_logits(const Output& output, int32_t drawn) const {
  return batch_.want_logits || output.top >= 0 || (output.sampler != nullptr && drawn < 0);
}

// Outputs that need their logits here: log probabilities, and draws that the device has not made. A few rows are fetched at a time.
void CudaEngine::finish_on_host(StepResult& result) {
  const size_t vocabulary = shape_.vocabulary;
  int fetched[StepMemory::kLogitRowsTogether];
  size_t next = 0;
  while (next < outputs_.size()) {
    int count = 0;
    const size_t first = next;
    for (; next < outputs_.size(); ++next) {
      if (!needs_logits(outputs_[next], memory_->drawn_host[next])) continue;
      const int row = outputs_[next].logit_row;
      if (std::find(fetched, fetched + count, row) != fetched + count) continue;
      if (count == StepMemory::kLogitRowsTogether) break;
      device_->copy_to_host(memory_->logits_host + count * vocabulary, memory_->logits + row * memory_->strides.logits,
                            vocabulary * sizeof(float), stream_.get());
      fetched[count++] = row;
    }
    if (count > 0) device_->synchronise(stream_.get());
    for (size_t i = first; i < next; ++i) {
      const int32_t drawn = memory_->drawn_host[i];
      if (!needs_logits(outputs_[i], drawn)) continue;
      const float* logits = memory_->logits_host + (std::find(fetched, fetched + count, outputs_[i].logit_row) - fetched) * vocabulary;
      finish(outputs_[i], static_cast<int>(i), logits, std::max(drawn, -1), scratch_, result);
    }
  }
}

}  // namespace penstock::cuda

namespace penstock {

std::shared_ptr<Engine> open_engine(const EngineOptions& options) {
  return std::make_shared<cuda::CudaEngine>(options, cuda::open_device(options.device));
}

}  // namespace penstock
