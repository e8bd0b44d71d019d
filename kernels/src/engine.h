// A model, its KV pool, its compute threads and its samplers: what kernels/index.ts calls NativeEngine, without Node.
//
// One thread at a time calls an engine, but for `run`, which may overlap with everything except `prepare` and itself.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/kernels.h"
#include "forward.h"
#include "kv_pool.h"
#include "model.h"
#include "sampler.h"
#include "thread_pool.h"

namespace penstock {

struct EngineOptions {
  std::string path;
  int blocks;
  int block_tokens;
  KvDtype kv_dtype;
  int threads;
  int max_rows;
  int max_outputs;
  int max_context;  // 0: the model's own
  InstructionSet isa;
};

// The arrays of Batch in kernels/index.ts.
struct Batch {
  std::vector<int32_t> tokens;        // [rows]
  std::vector<int32_t> segments;      // [segments, 4]
  std::vector<int32_t> block_tables;  // [entries]
  std::vector<int32_t> outputs;       // [outputs, 4]
  bool want_logits = false;
};

struct StepResult {
  std::vector<int32_t> tokens;  // [outputs]
  std::vector<float> logprobs;  // [outputs]
  int top_width = 0;
  std::vector<int32_t> top_tokens;  // [outputs, top_width]
  std::vector<float> top_logprobs;  // [outputs, top_width]
  std::vector<float> logits;        // [outputs, vocabulary], empty where not wanted
  double compute_ms = 0.0;
};

class Engine {
 public:
  // Raised by any change that changes a bit of any result.
  static constexpr int kNumericsVersion = 3;

  explicit Engine(const EngineOptions& options);

  const ModelShape& shape() const { return model_->shape(); }
  const KvPool& kv() const { return *kv_; }
  const EngineOptions& options() const { return options_; }  // with the defaults filled in
  InstructionSet isa() const { return kernels_.isa; }

  int32_t create_sampler(SamplerOptions options, const std::vector<int32_t>& prompt, const std::vector<int32_t>& output);
  void free_sampler(int32_t id);  // throws where there is none
  size_t samplers() const { return samplers_.size(); }

  // As KvPool's. What `run` reads may be exported while it does, and of what it writes the layers that its progress has
  // reported; nothing that it uses may be imported or copied to.
  uint32_t export_layers(const KvRange& range, uint8_t* into, uint32_t seed) const {
    return kv_->export_layers(range, into, seed);
  }
  uint32_t import_layers(const KvRange& range, const uint8_t* from, uint32_t seed) {
    return kv_->import_layers(range, from, seed);
  }
  void copy_block(int from, int to) { kv_->copy_block(from, to); }

  // Checks a batch completely and lays it out; throws std::runtime_error with the place of what is wrong, and changes
  // nothing then.
  void prepare(Batch batch);

  // Runs the batch that was prepared. Throws std::runtime_error where a logit is not finite; no sampler has drawn then.
  // `progress`, which may be null, is told of each layer whose KV is complete.
  StepResult run(LayerProgress* progress);

 private:
  struct Output {
    int logit_row;                     // of Forward::logits
    std::shared_ptr<Sampler> sampler;  // or null; shared, as it may be freed while the step runs
    int32_t target;                    // or -1
    int32_t top;                       // or -1
  };

  void check_segments(const Batch& batch);
  void check_writes(const Segment& segment, size_t index);
  void check_outputs(const Batch& batch);
  void finish(const Output& output, int index, SamplerScratch& scratch, StepResult& result) const;

  EngineOptions options_;
  const Kernels& kernels_;
  ThreadPool pool_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<Forward> forward_;
  std::unordered_map<int32_t, std::shared_ptr<Sampler>> samplers_;
  int32_t next_sampler_ = 0;
  std::vector<SamplerScratch> sampler_scratch_;  // [threads]

  // The step that was prepared.
  Batch batch_;
  std::vector<Segment> segments_;
  std::vector<Output> outputs_;
  std::vector<int> logit_rows_;    // rows whose logits are wanted, each once
  std::vector<int> logit_row_of_;  // [max_rows] index in logit_rows_, or -1
  std::vector<uint32_t> written_;  // [blocks, block_tokens] number of the step that last wrote the slot
  uint32_t step_ = 0;
};

}  // namespace penstock
