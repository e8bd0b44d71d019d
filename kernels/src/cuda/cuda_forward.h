// The forward pass of the llama architecture over one batch on the device.
//
// What depends on the step goes through StepMemory; kernels are launched with numbers of rows and addresses that repeat. So a step
// of nothing but single rows, decode, is a graph that was captured at load, of the next larger number of rows: rows that are not
// there have position -1, write no KV and attend to nothing.
#pragma once

#include <vector>

#include "../layer_progress.h"
#include "../segment.h"
#include "device_weights.h"
#include "step_memory.h"

namespace penstock::cuda {

class CudaForward {
 public:
  CudaForward(Device& device, const ModelShape& shape, const DeviceWeights& weights, const KvView& kv, StepMemory& memory,
              StreamHandle stream);

  // Lays out a step in pinned memory. `orders` are in memory.host already.
  void plan(const int32_t* tokens, const std::vector<Segment>& segments, const std::vector<int>& logit_rows, int outputs);

  // Puts the planned step onto the stream, up to what was drawn (memory.drawn). Layers are recorded where `layer_done` is asked for;
  // then no graph is used.
  void launch(bool layer_done);
  // Waits until the KV of a layer is in the pool.
  void await_layer(int layer) { device_.synchronise_event(layers_[layer].get()); }

  size_t graphs() const { return graphs_.size(); }

 private:
  struct Counts {
    int rows;
    int decode_rows;
    int prefill_tasks;
    int logit_rows;
    int outputs;
    int split;  // blocks that share the units of a decode row
  };
  struct DecodeGraph {
    int rows;
    Graph graph;
  };

  static int entries_of(const Segment& segment, int block_tokens) {
    return (segment.position + segment.rows + block_tokens - 1) / block_tokens;
  }
  int units_of(const Segment& segment) const;
  int split_for(int rows) const;
  void capture();
  void enqueue(const Counts& counts, bool layer_done);
  void pad(int rows);

  Device& device_;
  const ModelShape shape_;
  const DeviceWeights& weights_;
  const KvView kv_;
  StepMemory& memory_;
  const StreamHandle stream_;
  std::vector<Event> layers_;
  std::vector<DecodeGraph> graphs_;  // by number of rows

  Counts counts_{};
  size_t entries_ = 0;
  const DecodeGraph* graph_ = nullptr;  // that fits the planned step
};

}  // namespace penstock::cuda
