// The part of the forward pass that touches the KV pool.
#include <algorithm>
#include <cmath>
#include <limits>

#include "forward.h"

namespace penstock {

// How the work is divided changes no bit of it.
void Forward::plan_attention(const std::vector<Segment>& segments) {
  // Rows of a task share each key and value that is read; few enough that tasks outnumber threads.
  constexpr int kTaskRows = 48;
  static_assert(kTaskRows <= kMostQueries);
  const int group = shape_.heads / shape_.kv_heads;
  int tokens_per_task = std::clamp(kTaskRows / group, 1, 16);
  while (tokens_per_task > 1 && rows_ * shape_.kv_heads < 8 * pool_.threads() * tokens_per_task) tokens_per_task /= 2;
  int longest = 0;
  for (const Segment& segment : segments) longest = std::max(longest, segment.position + segment.rows);
  split_ =
      pool_.threads() > 1 && rows_ <= kSplitRows && rows_ * shape_.kv_heads < 4 * pool_.threads() && longest > 2 * kTileTokens;

  tasks_.clear();
  for (const Segment& segment : segments) {
    const int step = split_ ? 1 : tokens_per_task;
    for (int first = 0; first < segment.rows; first += step) {
      const int count = std::min(step, segment.rows - first);
      const int tiles = (segment.position + first + kTileTokens) / kTileTokens;  // of the first row's context
      for (int head = 0; head < shape_.kv_heads; ++head) {
        for (int tile = split_ ? 0 : -1; tile < (split_ ? tiles : 0); ++tile)
          tasks_.push_back({&segment, first, count, head, tile});
      }
    }
  }
  if (split_) return;
  std::sort(tasks_.begin(), tasks_.end(), [](const AttentionTask& a, const AttentionTask& b) {
    return a.segment->position + a.first > b.segment->position + b.first;
  });
}

// Rotates the row's queries and keys, scales the queries, and writes keys and values into the row's place in the pool.
void Forward::store_kv(int layer, int row) {
  const Segment& segment = *segment_of_[row];
  const int position = segment.position + (row - segment.first_row);
  const int block_tokens = kv_.block_tokens();
  const int block = segment.table[position / block_tokens];
  const int head_dim = shape_.head_dim;
  const float* cos = cos_ + size_t(row) * shape_.rotary;
  const float* sin = sin_ + size_t(row) * shape_.rotary;

  float* queries = projected_ + row * qkv_;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int h = 0; h < shape_.heads; ++h) kernels_.rotate(queries + h * head_dim, cos, sin, shape_.rotary);
  for (int i = 0; i < shape_.heads * head_dim; ++i) queries[i] *= scale;

  for (int h = 0; h < shape_.kv_heads; ++h) {
    float* key = projected_ + row * qkv_ + key_offset_ + h * head_dim;
    const float* value = projected_ + row * qkv_ + value_offset_ + h * head_dim;
    kernels_.rotate(key, cos, sin, shape_.rotary);
    kv_.write(layer, block, h, position % block_tokens, key, value);
  }
}

// Tile after tile of the context from position 0, or one tile whose result is put aside.
void Forward::attend(int thread, int layer, const AttentionTask& task) {
  const Segment& segment = *task.segment;
  const ThreadScratch& scratch = scratch_[thread];
  const int group = shape_.heads / shape_.kv_heads;
  const size_t stride = head_stride_;
  const int count = task.tokens * group;

  QueryRow rows[kMostQueries];
  for (int i = 0; i < count; ++i) {
    const int row = segment.first_row + task.first + i / group;
    const int head = task.kv_head * group + i % group;
    float* total = task.tile < 0 ? scratch.totals + i * stride
                                 : tile_totals_ + ((size_t(row) * shape_.heads + head) * tiles_ + task.tile) * stride;
    std::fill(total, total + stride, 0.0f);
    rows[i] = {projected_ + row * qkv_ + head * shape_.head_dim, 0, -std::numeric_limits<float>::infinity(), 0.0f, total};
  }

  if (task.tile < 0) {
    const int end = segment.position + task.first + task.tokens;  // of the last row's context
    for (int tile = 0; tile * kTileTokens < end; ++tile) attend_tile(task, layer, tile, scratch, rows);
    for (int i = 0; i < count; ++i)
      finish_attention(rows[i], segment.first_row + task.first + i / group, task.kv_head * group + i % group);
  } else {
    attend_tile(task, layer, task.tile, scratch, rows);
    for (int i = 0; i < count; ++i) {
      const int row = segment.first_row + task.first + i / group;
      float* state = tile_states_ + ((size_t(row) * shape_.heads + task.kv_head * group + i % group) * tiles_ + task.tile) * 2;
      state[0] = rows[i].max;
      state[1] = rows[i].sum;
    }
  }
}

void Forward::attend_tile(const AttentionTask& task, int layer, int tile, const ThreadScratch& scratch, QueryRow* rows) const {
  const int group = shape_.heads / shape_.kv_heads;
  const int start = tile * kTileTokens;
  const int first_position = task.segment->position + task.first;
  const int tokens = std::min(kTileTokens, first_position + task.tokens - start);
  KeyTile keys;
  gather_tile(*task.segment, layer, task.kv_head, start, tokens, scratch.gather, keys);
  for (int i = 0; i < task.tokens * group; ++i)
    rows[i].visible = std::clamp(first_position + i / group + 1 - start, 0, kTileTokens);
  kernels_.attend(keys, rows, task.tokens * group, shape_.head_dim, scratch.attend);
}

// The weighted mean of the values becomes a part of the next linear layer's input.
void Forward::finish_attention(const QueryRow& row, int index, int head) {
  float* out = y_ + index * wide_ + head * shape_.head_dim;
  const float inverse = 1.0f / row.sum;
  for (int d = 0; d < shape_.head_dim; ++d) out[d] = row.total[d] * inverse;
}

// All heads of a row whose tiles were tasks of their own: in the order in which one task would have met them.
void Forward::merge_tiles(int row) {
  const Segment& segment = *segment_of_[row];
  const int tiles = (segment.position + (row - segment.first_row) + kTileTokens) / kTileTokens;
  const size_t stride = head_stride_;
  alignas(64) float total[kMostHeadDim];
  for (int head = 0; head < shape_.heads; ++head) {
    const size_t first = (size_t(row) * shape_.heads + head) * tiles_;
    std::fill(total, total + stride, 0.0f);
    QueryRow merged = {nullptr, 0, -std::numeric_limits<float>::infinity(), 0.0f, total};
    for (size_t i = first; i < first + tiles; ++i) {
      kernels_.merge(merged, {nullptr, 0, tile_states_[2 * i], tile_states_[2 * i + 1], tile_totals_ + i * stride},
                     shape_.head_dim);
    }
    finish_attention(merged, row, head);
  }
}

// Finds the keys and values of positions start … start + tokens - 1 (start is a multiple of a tile).
void Forward::gather_tile(const Segment& segment, int layer, int kv_head, int start, int tokens, uint16_t* gather,
                          KeyTile& tile) const {
  const int block_tokens = kv_.block_tokens();
  const int key_rows = kv_.key_rows();
  const bool in_place = block_tokens % kGroupTokens == 0;  // a group never crosses a block
  const bool codes = kv_.dtype() != KvDtype::F16;
  tile.dtype = kv_.dtype();
  tile.key_stride = in_place ? block_tokens : kGroupTokens;
  for (int t = 0; t < tokens;) {
    const int block = segment.table[(start + t) / block_tokens];
    const int slot = (start + t) % block_tokens;
    const int run = std::min(block_tokens - slot, tokens - t);
    const uint16_t* keys = kv_.keys(layer, block, kv_head) + slot;
    const uint16_t* values = kv_.values(layer, block, kv_head) + size_t(slot) * kv_.value_stride();
    const uint16_t* scales = kv_.value_scales(layer, block, kv_head) + slot;
    for (int i = 0; i < run; ++i, ++t) {
      const int g = t / kGroupTokens;
      tile.values[t] = values + size_t(i) * kv_.value_stride();
      if (in_place) {
        if (t % kGroupTokens != 0) continue;
        tile.keys[g] = keys + i;
        tile.value_scales[g] = scales + i;
      } else {
        uint16_t* group = gather + g * gathered_ * kGroupTokens;  // [key_rows, and two for the scales, 16]
        uint16_t* column = group + t % kGroupTokens;
        for (int row = 0; row < key_rows; ++row) column[row * kGroupTokens] = keys[size_t(row) * block_tokens + i];
        for (int row = 0; codes && row < 2; ++row)
          column[(key_rows + row) * kGroupTokens] = scales[size_t(row) * block_tokens + i];
        tile.keys[g] = group;
        tile.value_scales[g] = group + size_t(key_rows) * kGroupTokens;
      }
    }
  }
}

}  // namespace penstock
