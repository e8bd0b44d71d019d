// A model, its KV pool and its samplers on one device: what kernels/index.ts calls NativeEngine, without Node.
//
// Here is what all devices share: the checks of a batch, and the samplers. CpuEngine (cpu_engine.h) computes on threads of the
// host, CudaEngine (cuda/cuda_engine.h) on a GPU; each is in an addon of its own.
//
// One thread at a time calls an engine, but for `run`, which may overlap with everything except `prepare` and itself.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cpu/kernels.h"
#include "kv_range.h"
#include "layer_progress.h"
#include "model.h"
#include "sampler.h"
#include "segment.h"

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
  int device;  // number of the GPU; the CPU's engine does not look
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
  static constexpr int kNumericsVersion = 4;

  virtual ~Engine() = default;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const ModelShape& shape() const { return shape_; }
  const EngineOptions& options() const { return options_; }  // with the defaults filled in
  InstructionSet isa() const { return isa_; }                 // of what the host computes
  // Where it computes, and what it holds there, in words.
  virtual std::string device() const = 0;

  // On the wire.
  virtual size_t layer_block_bytes() const = 0;
  size_t block_bytes() const { return shape_.layers * layer_block_bytes(); }

  int32_t create_sampler(SamplerOptions options, const std::vector<int32_t>& prompt, const std::vector<int32_t>& output);
  void free_sampler(int32_t id);  // throws where there is none
  size_t samplers() const { return samplers_.size(); }

  // Write to the wire layout and read from it, at any address. Both return the CRC-32C of those bytes, continued from `seed`;
  // what was imported has to be forgotten where it is not the one expected. What `run` reads may be exported while it does, and
  // of what it writes the layers that its progress has reported; nothing that it uses may be imported or copied to.
  virtual uint32_t export_layers(const KvRange& range, uint8_t* into, uint32_t seed) = 0;
  virtual uint32_t import_layers(const KvRange& range, const uint8_t* from, uint32_t seed) = 0;
  // From an engine of the same addon whose blocks hold the same, which may be this one: `range` is of its blocks, and they go to
  // `to`, [range.count] of this one's. Both may run meanwhile, as for an export and an import.
  virtual void copy_layers(Engine& from, const KvRange& range, const int32_t* to) = 0;
  bool blocks_hold_the_same(const Engine& other) const;
  void copy_block(int from, int to);

  // Checks a batch completely and lays it out; throws std::runtime_error with the place of what is wrong, and changes
  // nothing then.
  void prepare(Batch batch);

  // Runs the batch that was prepared. Throws std::runtime_error where a logit is not finite; no sampler has drawn then.
  // `progress`, which may be null, is told of each layer whose KV is complete.
  virtual StepResult run(LayerProgress* progress) = 0;

 protected:
  struct Output {
    int logit_row;                     // index in logit_rows_
    std::shared_ptr<Sampler> sampler;  // or null; shared, as it may be freed while the step runs
    int32_t target;                    // or -1
    int32_t top;                       // or -1
  };

  explicit Engine(const EngineOptions& options);
  // Fills in what depends on the model; throws where it does not fit the options.
  void adopt(const ModelShape& shape);

  // The step that was prepared is in the members below.
  virtual void plan() = 0;

  // What a step gives where nothing has been drawn or scored yet.
  StepResult empty_result() const;
  // Draws or scores one output from its row of logits. `drawn` is a token that was drawn already, or -1.
  void finish(const Output& output, int index, const float* logits, int32_t drawn, SamplerScratch& scratch, StepResult& result) const;
  [[noreturn]] void refuse_logits(int row) const;

  EngineOptions options_;
  ModelShape shape_;
  InstructionSet isa_;

  Batch batch_;
  std::vector<Segment> segments_;
  std::vector<Output> outputs_;
  std::vector<int> logit_rows_;  // rows whose logits are wanted, each once

 private:
  void check_segments(const Batch& batch);
  void check_writes(const Segment& segment, size_t index);
  void check_outputs(const Batch& batch);

  std::unordered_map<int32_t, std::shared_ptr<Sampler>> samplers_;
  int32_t next_sampler_ = 0;
  std::vector<int> logit_row_of_;  // [max_rows] index in logit_rows_, or -1
  std::vector<uint32_t> written_;  // [blocks, block_tokens] number of the step that last wrote the slot
  uint32_t step_ = 0;
};

// The engine of the addon that this is linked into. Throws std::runtime_error.
std::shared_ptr<Engine> open_engine(const EngineOptions& options);

}  // namespace penstock
