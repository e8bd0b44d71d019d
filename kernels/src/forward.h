// The forward pass of the llama architecture over one batch, with all scratch allocated beforehand.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "kv_pool.h"
#include "layer_progress.h"
#include "model.h"
#include "region.h"
#include "segment.h"
#include "thread_pool.h"

namespace penstock {

class Forward {
 public:
  Forward(const Model& model, const Kernels& kernels, KvPool& kv, ThreadPool& pool, int max_rows, int max_logit_rows,
          int max_context);

  // Lays out a step. The arrays have to live until `run` has ended.
  void plan(const int32_t* tokens, const std::vector<Segment>& segments, const std::vector<int>& logit_rows);

  // Called on every thread of the pool: writes the rows' KV and computes the logits of the rows asked for. `progress`, which may
  // be null, is told of each layer whose KV is complete.
  void run(int thread, LayerProgress* progress);

  // [logit_rows, vocabulary padded to 16]
  const float* logits(int row) const { return logits_ + row * logit_stride_; }

 private:
  // Up to so many rows, attention may be divided by tiles of the context, where rows and heads are too few to go round.
  static constexpr int kSplitRows = 8;

  // Some consecutive rows of a segment, all heads of one KV head, over some tiles of their context.
  struct AttentionTask {
    const Segment* segment;
    int first;   // row within the segment
    int tokens;  // rows
    int kv_head;
    int tile;  // the only tile, or -1: all
  };

  // What one thread needs for itself.
  struct ThreadScratch {
    uint8_t* linear;   // linear_scratch of the largest matrix
    float* attend;     // [kAttendScratch]
    float* totals;     // [kMostQueries, head_stride]
    uint16_t* gather;  // [kTileGroups, gathered, 16] keys and scales whose blocks are not a multiple of 16 tokens
  };

  struct Product {
    const Matrix* matrix;
    float* out;  // [rows, stride]
    size_t stride;
  };

  size_t carve(void* base);
  void embed(int row);
  void normalise(const float* x, const float* weight, int row);
  void quantise(int row, int length);
  template <class Body, class RowBody>
  void for_each_then_rows(int thread, int tasks, int rows, Body&& body, RowBody&& row_body);
  template <class RowBody>
  void multiply(int thread, int rows, const Product* products, int count, RowBody&& row_body);
  void add(int row);
  void refine(int row, int rest);
  void add_refinement(int row, int rest);
  void gate(int row);
  void store_kv(int layer, int row);
  void plan_attention(const std::vector<Segment>& segments);
  void attend(int thread, int layer, const AttentionTask& task);
  void attend_tile(const AttentionTask& task, int layer, int tile, const ThreadScratch& scratch, QueryRow* rows) const;
  void finish_attention(const QueryRow& row, int index, int head);
  void merge_tiles(int row);
  void gather_tile(const Segment& segment, int layer, int kv_head, int start, int tokens, uint16_t* gather, KeyTile& tile) const;

  const Model& model_;
  const ModelShape& shape_;
  const Kernels& kernels_;
  KvPool& kv_;
  ThreadPool& pool_;
  const int max_rows_;
  const int max_logit_rows_;
  const int tiles_;  // of the longest context
  const bool refines_output_;  // the logits are computed from twice the bits, see refine

  // Strides in elements.
  size_t hidden_;      // hidden padded
  size_t wide_;        // widest input of a linear layer
  size_t qkv_;         // queries, keys and values side by side, each padded
  size_t key_offset_;  // of the keys in a row of qkv_
  size_t value_offset_;
  size_t ffn_;  // feed_forward padded; the gate and the up projection lie side by side
  size_t logit_stride_;
  size_t head_stride_;  // head_dim padded to 16
  size_t gathered_;     // rows of a tile's group that are gathered where they cannot be read in place
  size_t linear_scratch_ = 0;

  Region memory_;
  float* x_;                            // [rows, hidden] the residual stream
  float* y_;                            // [input rows, wide] input of the next linear layer; rows, or twice the logit rows
  float* z_;                            // [rows, hidden] what the residual stream gains
  float* projected_;                    // [rows, qkv] or [rows, 2 * ffn]
  float* cos_;                          // [rows, rotary]
  float* sin_;                          // [rows, rotary], signed as Kernels::rotate wants it
  int8_t* values_;                      // [input rows, wide] y_ quantised, with its scales, offsets and sums
  float* scales_;                       // [input rows, wide / 32]
  float* offsets_;                      // [input rows, wide / 32]
  int16_t* sums_;                       // [input rows, wide / 32, 2]
  float* logits_;                       // [logit rows, and as many refinements, logit_stride]
  float* tile_totals_;                  // [kSplitRows, heads, tiles, head_stride] what rows gathered over single tiles
  float* tile_states_;                  // [kSplitRows, heads, tiles, 2] and the max and sum that belong to it
  std::vector<ThreadScratch> scratch_;  // [threads]

  // The step being run.
  const int32_t* tokens_ = nullptr;
  int rows_ = 0;
  const std::vector<int>* logit_rows_ = nullptr;
  std::vector<const Segment*> segment_of_;  // [rows]
  std::vector<AttentionTask> tasks_;        // longest first
  bool split_ = false;                      // whether each tile of the context is a task of its own
};

}  // namespace penstock
