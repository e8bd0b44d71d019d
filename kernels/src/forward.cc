#include "forward.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "fixed_math.h"

namespace penstock {

namespace {

// Rows that go through a panel together: their quantised form should stay in the second-level cache.
constexpr int kRowBlock = 256;
// Up to here one thread does what is to be done row by row.
constexpr int kFewRows = 3;
// Up to here attention may be divided by tiles of the context, where rows and heads are too few to go round.
constexpr int kSplitRows = 8;

}  // namespace

Forward::Forward(const Model& model, const Kernels& kernels, KvPool& kv, ThreadPool& pool, int max_rows, int max_logit_rows,
                 int max_context)
    : model_(model),
      shape_(model.shape()),
      kernels_(kernels),
      kv_(kv),
      pool_(pool),
      max_rows_(max_rows),
      max_logit_rows_(max_logit_rows),
      tiles_((max_context + kTileTokens - 1) / kTileTokens),
      scratch_(pool.threads()),
      segment_of_(max_rows) {
  const size_t query = round_up(size_t(shape_.heads) * shape_.head_dim, 16);
  const size_t key = round_up(size_t(shape_.kv_heads) * shape_.head_dim, 16);
  hidden_ = round_up(shape_.hidden, 16);
  ffn_ = round_up(shape_.feed_forward, 16);
  wide_ = round_up(std::max({hidden_, query, ffn_}), kBlock);
  qkv_ = query + 2 * key;
  key_offset_ = query;
  value_offset_ = query + key;
  logit_stride_ = round_up(shape_.vocabulary, 16);
  for (const Layer& layer : model.layers()) {
    for (const Matrix* m : {&layer.query, &layer.key, &layer.value, &layer.attention_output, &layer.gate, &layer.up, &layer.down}) {
      linear_scratch_ = std::max(linear_scratch_, linear_scratch(*m));
    }
  }
  linear_scratch_ = std::max(linear_scratch_, linear_scratch(model.output()));
  memory_ = Region(carve(nullptr), "maxRows, maxOutputs");
  carve(memory_.as<void>());
  tasks_.reserve(std::max(size_t(max_rows) * shape_.kv_heads, size_t(kSplitRows) * shape_.kv_heads * tiles_));
}

size_t Forward::carve(void* base) {
  Carver carver(base);
  const size_t rows = max_rows_;
  const size_t blocks = wide_ / kBlock;
  carver.take(x_, rows * hidden_);
  carver.take(y_, rows * wide_);
  carver.take(z_, rows * hidden_);
  carver.take(projected_, rows * std::max(qkv_, 2 * ffn_));
  carver.take(cos_, rows * shape_.rotary);
  carver.take(sin_, rows * shape_.rotary);
  carver.take(values_, rows * wide_);
  carver.take(scales_, rows * blocks);
  carver.take(offsets_, rows * blocks);
  carver.take(sums_, rows * blocks);
  carver.take(logits_, max_logit_rows_ * logit_stride_);
  carver.take(tile_totals_, size_t(kSplitRows) * shape_.heads * tiles_ * kv_.value_stride());
  carver.take(tile_states_, size_t(kSplitRows) * shape_.heads * tiles_ * 2);
  for (ThreadScratch& scratch : scratch_) {
    carver.take(scratch.linear, linear_scratch_);
    carver.take(scratch.attend, kAttendScratch);
    carver.take(scratch.totals, size_t(kMostQueries) * kv_.value_stride());
    carver.take(scratch.gather, size_t(kTileTokens) * shape_.head_dim);
  }
  return carver.used();
}

void Forward::plan(const int32_t* tokens, const std::vector<Segment>& segments, const std::vector<int>& logit_rows) {
  tokens_ = tokens;
  logit_rows_ = &logit_rows;
  rows_ = 0;
  for (const Segment& segment : segments) {
    for (int i = 0; i < segment.rows; ++i) segment_of_[rows_ + i] = &segment;
    rows_ += segment.rows;
  }
  plan_attention(segments);
}

// How the work is divided changes no bit of it.
void Forward::plan_attention(const std::vector<Segment>& segments) {
  // Rows of a task share each key and value that is read; few enough that tasks outnumber threads.
  const int group = shape_.heads / shape_.kv_heads;
  const int tokens_per_task = std::clamp(24 / group, 1, 8);
  int longest = 0;
  for (const Segment& segment : segments) longest = std::max(longest, segment.position + segment.rows);
  split_ = pool_.threads() > 1 && rows_ <= kSplitRows && rows_ * shape_.kv_heads < 4 * pool_.threads() && longest > 2 * kTileTokens;

  tasks_.clear();
  for (const Segment& segment : segments) {
    const int step = split_ ? 1 : tokens_per_task;
    for (int first = 0; first < segment.rows; first += step) {
      const int count = std::min(step, segment.rows - first);
      const int tiles = (segment.position + first + kTileTokens) / kTileTokens;  // of the first row's context
      for (int head = 0; head < shape_.kv_heads; ++head) {
        for (int tile = split_ ? 0 : -1; tile < (split_ ? tiles : 0); ++tile) tasks_.push_back({&segment, first, count, head, tile});
      }
    }
  }
  if (split_) return;
  std::sort(tasks_.begin(), tasks_.end(), [](const AttentionTask& a, const AttentionTask& b) {
    return a.segment->position + a.first > b.segment->position + b.first;
  });
}

void Forward::run(int thread) {
  const std::vector<Layer>& layers = model_.layers();
  pool_.for_each(thread, rows_, [&](int row) {
    embed(row);
    normalise(x_ + row * hidden_, layers[0].attention_norm, row);
  });
  for (int l = 0; l < shape_.layers; ++l) {
    const Layer& layer = layers[l];

    const Product qkv[] = {{&layer.query, projected_, qkv_},
                           {&layer.key, projected_ + key_offset_, qkv_},
                           {&layer.value, projected_ + value_offset_, qkv_}};
    // All keys and values of the step are in the pool before any row attends: what a row reads does not depend on
    // whether it was computed now or found there.
    multiply(thread, rows_, qkv, 3, [&](int row) { store_kv(l, row); });
    for_each_then_rows(
        thread, static_cast<int>(tasks_.size()), rows_, [&](int task) { attend(thread, l, tasks_[task]); },
        [&](int row) {
          if (split_) merge_tiles(row);
          quantise(row, shape_.heads * shape_.head_dim);
        });
    const Product attention_output[] = {{&layer.attention_output, z_, hidden_}};
    multiply(thread, rows_, attention_output, 1, [&](int row) {
      add(row);
      normalise(x_ + row * hidden_, layer.feed_forward_norm, row);
    });

    const Product gate_up[] = {{&layer.gate, projected_, 2 * ffn_}, {&layer.up, projected_ + ffn_, 2 * ffn_}};
    multiply(thread, rows_, gate_up, 2, [&](int row) { gate(row); });
    const Product down[] = {{&layer.down, z_, hidden_}};
    multiply(thread, rows_, down, 1, [&](int row) {
      add(row);
      if (l + 1 < shape_.layers) normalise(x_ + row * hidden_, layers[l + 1].attention_norm, row);
    });
  }

  const int logit_rows = static_cast<int>(logit_rows_->size());
  pool_.for_each(thread, logit_rows, [&](int i) { normalise(x_ + (*logit_rows_)[i] * hidden_, model_.output_norm(), i); });
  const Product output[] = {{&model_.output(), logits_, logit_stride_}};
  multiply(thread, logit_rows, output, 1, [](int) {});
}

// Runs `body` for each task, and when all are done `row_body` for each row. Few rows are not worth a second round of threads.
template <class Body, class RowBody>
void Forward::for_each_then_rows(int thread, int tasks, int rows, Body&& body, RowBody&& row_body) {
  if (rows <= kFewRows) {
    pool_.for_each(thread, tasks, body, [&] {
      for (int row = 0; row < rows; ++row) row_body(row);
    });
  } else {
    pool_.for_each(thread, tasks, body);
    pool_.for_each(thread, rows, row_body);
  }
}

// The row's embedding, and the angles of its position.
void Forward::embed(int row) {
  float* x = x_ + row * hidden_;
  read_row(model_.embedding(), tokens_[row], x);
  std::fill(x + shape_.hidden, x + hidden_, 0.0f);

  const Segment& segment = *segment_of_[row];
  const double position = segment.position + (row - segment.first_row);
  float* cos = cos_ + size_t(row) * shape_.rotary;
  float* sin = sin_ + size_t(row) * shape_.rotary;
  for (int i = 0; i < shape_.rotary; i += 2) {
    const SinCos angle = fixed_sincos(position * model_.frequencies()[i / 2]);
    cos[i] = cos[i + 1] = angle.cos;
    sin[i] = -angle.sin;
    sin[i + 1] = angle.sin;
  }
}

// RMS norm of x into row `row` of the next linear layer's input.
void Forward::normalise(const float* x, const float* weight, int row) {
  kernels_.rms_norm(x, weight, shape_.hidden, static_cast<int>(hidden_), shape_.norm_epsilon, y_ + row * wide_);
  quantise(row, shape_.hidden);
}

void Forward::quantise(int row, int length) {
  if (length % kBlock != 0) return;  // then no matrix that takes it is quantised
  const size_t blocks = wide_ / kBlock;
  kernels_.quantise(y_ + row * wide_, length,
                    {values_ + row * wide_, scales_ + row * blocks, offsets_ + row * blocks, sums_ + row * blocks});
}

// The residual stream gains what the last linear layer gave.
void Forward::add(int row) {
  float* x = x_ + row * hidden_;
  const float* z = z_ + row * hidden_;
  for (size_t i = 0; i < hidden_; ++i) x[i] += z[i];
}

void Forward::gate(int row) {
  const float* gate = projected_ + row * 2 * ffn_;
  kernels_.swiglu(gate, gate + ffn_, static_cast<int>(ffn_), y_ + row * wide_);
  quantise(row, shape_.feed_forward);
}

// The linear layers in `products`, which share their input y_; then `row_body` for each row. A task is some panels of one of them
// over some rows.
template <class RowBody>
void Forward::multiply(int thread, int rows, const Product* products, int count, RowBody&& row_body) {
  int panels = 0;
  for (int i = 0; i < count; ++i) panels += products[i].matrix->panels;
  const int grain = std::max(1, panels / (pool_.threads() * 6));
  int panel_tasks = 0;
  for (int i = 0; i < count; ++i) panel_tasks += (products[i].matrix->panels + grain - 1) / grain;
  const int row_blocks = (rows + kRowBlock - 1) / kRowBlock;

  const auto body = [&](int task) {
    const int first_row = task / panel_tasks * kRowBlock;
    int chunk = task % panel_tasks;
    const Product* product = products;
    for (;; ++product) {
      const int chunks = (product->matrix->panels + grain - 1) / grain;
      if (chunk < chunks) break;
      chunk -= chunks;
    }
    const size_t blocks = wide_ / kBlock;
    const LinearInput input = {std::min(kRowBlock, rows - first_row),
                               y_ + first_row * wide_,
                               wide_,
                               values_ + first_row * wide_,
                               wide_,
                               scales_ + first_row * blocks,
                               offsets_ + first_row * blocks,
                               sums_ + first_row * blocks,
                               blocks};
    const int first = chunk * grain;
    kernels_.linear(*product->matrix, first, std::min(first + grain, product->matrix->panels), input,
                    product->out + first_row * product->stride, product->stride, scratch_[thread].linear);
  };
  for_each_then_rows(thread, panel_tasks * row_blocks, rows, body, row_body);
}

// Rotates the row's queries and keys, scales the queries, and writes keys and values into the row's place in the pool.
void Forward::store_kv(int layer, int row) {
  const Segment& segment = *segment_of_[row];
  const int position = segment.position + (row - segment.first_row);
  const int block_tokens = kv_.block_tokens();
  const int block = segment.table[position / block_tokens];
  const int slot = position % block_tokens;
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
    uint16_t half[kMostHeadDim];
    kernels_.to_half(key, head_dim, half);
    uint16_t* keys = kv_.keys(layer, block, h) + slot;
    for (int d = 0; d < head_dim; ++d) keys[size_t(d) * block_tokens] = half[d];
    kernels_.to_half(value, head_dim, kv_.values(layer, block, h) + size_t(slot) * kv_.value_stride());
  }
}

// Tile after tile of the context from position 0, or one tile whose result is put aside.
void Forward::attend(int thread, int layer, const AttentionTask& task) {
  const Segment& segment = *task.segment;
  const ThreadScratch& scratch = scratch_[thread];
  const int group = shape_.heads / shape_.kv_heads;
  const int stride = kv_.value_stride();
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
    for (int i = 0; i < count; ++i) finish_attention(rows[i], segment.first_row + task.first + i / group, task.kv_head * group + i % group);
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
  for (int i = 0; i < task.tokens * group; ++i) rows[i].visible = std::clamp(first_position + i / group + 1 - start, 0, kTileTokens);
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
  const int stride = kv_.value_stride();
  alignas(64) float total[kMostHeadDim];
  for (int head = 0; head < shape_.heads; ++head) {
    const size_t first = (size_t(row) * shape_.heads + head) * tiles_;
    std::fill(total, total + stride, 0.0f);
    QueryRow merged = {nullptr, 0, -std::numeric_limits<float>::infinity(), 0.0f, total};
    for (size_t i = first; i < first + tiles; ++i) {
      kernels_.merge(merged, {nullptr, 0, tile_states_[2 * i], tile_states_[2 * i + 1], tile_totals_ + i * stride}, shape_.head_dim);
    }
    finish_attention(merged, row, head);
  }
}

// Finds the keys and values of positions start … start + tokens - 1 (start is a multiple of a tile).
void Forward::gather_tile(const Segment& segment, int layer, int kv_head, int start, int tokens, uint16_t* gather,
                          KeyTile& tile) const {
  const int block_tokens = kv_.block_tokens();
  const int head_dim = shape_.head_dim;
  const bool in_place = block_tokens % kGroupTokens == 0;  // a group never crosses a block
  tile.key_stride = in_place ? block_tokens : kGroupTokens;
  for (int t = 0; t < tokens;) {
    const int block = segment.table[(start + t) / block_tokens];
    const int slot = (start + t) % block_tokens;
    const int run = std::min(block_tokens - slot, tokens - t);
    const uint16_t* keys = kv_.keys(layer, block, kv_head) + slot;
    const uint16_t* values = kv_.values(layer, block, kv_head) + size_t(slot) * kv_.value_stride();
    for (int i = 0; i < run; ++i, ++t) {
      tile.values[t] = values + size_t(i) * kv_.value_stride();
      uint16_t* group = gather + size_t(t / kGroupTokens) * kGroupTokens * head_dim;
      if (in_place) {
        if (t % kGroupTokens == 0) tile.keys[t / kGroupTokens] = keys + i;
      } else {
        for (int d = 0; d < head_dim; ++d) group[d * kGroupTokens + t % kGroupTokens] = keys[size_t(d) * block_tokens + i];
        tile.keys[t / kGroupTokens] = group;
      }
    }
  }
}

}  // namespace penstock
