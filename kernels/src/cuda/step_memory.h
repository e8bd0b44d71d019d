// What a step needs in device memory besides weights and KV, and the pinned memory that its inputs and results pass through. All of
// it is allocated once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../model.h"
#include "arena.h"
#include "draw_order.h"
#include "kv_view.h"
#include "prefill_task.h"

namespace penstock::cuda {

struct StepLimits {
  int rows;
  int outputs;
  int logit_rows;
  int context;      // tokens
  size_t entries;   // of block tables
  size_t tasks;     // of prefill attention
  size_t units;     // of decode attention: partial results
};
StepLimits step_limits(const ModelShape& shape, const KvView& kv, int max_rows, int max_outputs, int max_context);

// What the host tells of a step: the same layout in pinned and in device memory.
struct StepInputs {
  int32_t* tokens;        // [rows]
  int32_t* positions;     // [rows]
  int32_t* table_starts;  // [rows]
  int32_t* decode_rows;   // [rows]
  int32_t* unit_starts;   // [rows]
  int32_t* logit_rows;    // [logit rows]
  DrawOrder* orders;      // [outputs]
  PrefillTask* tasks;     // [tasks]
  int32_t* tables;        // [entries]; last, as only what is used of it is copied
};

// Strides in elements.
struct StepStrides {
  size_t hidden;  // of x and z
  size_t normed, attended, gated;  // inputs of linear layers, padded to whole chunks
  size_t queries, keys, projected;
  size_t feed_forward;
  size_t logits;
};

class StepMemory {
 public:
  static size_t device_bytes(const ModelShape& shape, const StepLimits& limits);

  StepMemory(Device& device, const ModelShape& shape, const StepLimits& limits, StreamHandle stream);

  const StepLimits limits;
  const StepStrides strides;

  StepInputs host{};    // pinned
  StepInputs inputs{};  // of the device
  // Copies to the device what `entries` entries of block tables and everything before them are.
  void send(StreamHandle stream, size_t entries);

  float* x = nullptr;            // [rows, hidden] the residual stream
  float* z = nullptr;            // [rows, hidden] what it gains
  // Halves that linear layers read. What their rows are padded with is zero, and nobody writes it.
  uint16_t* normed = nullptr;    // [rows or logit rows]
  uint16_t* attended = nullptr;  // [rows]
  uint16_t* gated = nullptr;     // [rows]
  float* projected = nullptr;    // [rows, projected], or gate and up side by side
  uint16_t* queries = nullptr;   // [rows, heads, head_dim]
  float* angles = nullptr;       // [rows, rotary / 2, 2]
  float* unit_totals = nullptr;  // [units, heads, head_dim]
  float* unit_states = nullptr;  // [units, heads, 2]
  float* logits = nullptr;       // [logit rows, logits]
  uint8_t* partials = nullptr;   // of linear layers
  size_t partial_bytes = 0;
  int32_t* drawn = nullptr;      // [outputs]

  int32_t* drawn_host = nullptr;  // [outputs] pinned
  float* logits_host = nullptr;   // [kLogitRowsTogether, vocabulary] pinned
  static constexpr int kLogitRowsTogether = 4;

 private:
  // Without memory.
  StepMemory(const ModelShape& shape, const StepLimits& limits);
  void lay_out(Arena& arena, const ModelShape& shape);
  static size_t lay_out_inputs(StepInputs& inputs, const StepLimits& limits, void* base);

  Device* device_ = nullptr;
  DeviceMemory memory_;
  PinnedMemory pinned_;
  uint8_t* inputs_base_ = nullptr;
};

}  // namespace penstock::cuda
