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
      refines_output_(model.output().quantised()),
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
  head_stride_ = round_up(shape_.head_dim, 16);
  gathered_ = kv.key_rows() + 2;
  for (const Layer& layer : model.layers()) {
    for (const Matrix* m :
         {&layer.query, &layer.key, &layer.value, &layer.attention_output, &layer.gate, &layer.up, &layer.down}) {
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
  const size_t output_rows = (refines_output_ ? 2 : 1) * size_t(max_logit_rows_);
  const size_t input_rows = std::max(rows, output_rows);  // of a linear layer
  carver.take(x_, rows * hidden_);
  carver.take(y_, input_rows * wide_);
  carver.take(z_, rows * hidden_);
  carver.take(projected_, rows * std::max(qkv_, 2 * ffn_));
  carver.take(cos_, rows * shape_.rotary);
  carver.take(sin_, rows * shape_.rotary);
  carver.take(values_, input_rows * wide_);
  carver.take(scales_, input_rows * blocks);
  carver.take(offsets_, input_rows * blocks);
  carver.take(sums_, input_rows * blocks * 2);
  carver.take(logits_, output_rows * logit_stride_);
  carver.take(tile_totals_, size_t(kSplitRows) * shape_.heads * tiles_ * head_stride_);
  carver.take(tile_states_, size_t(kSplitRows) * shape_.heads * tiles_ * 2);
  for (ThreadScratch& scratch : scratch_) {
    carver.take(scratch.linear, linear_scratch_);
    carver.take(scratch.attend, kAttendScratch);
    carver.take(scratch.totals, size_t(kMostQueries) * head_stride_);
    carver.take(scratch.gather, size_t(kTileTokens) * gathered_);
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

void Forward::run(int thread, LayerProgress* progress) {
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
    if (progress != nullptr) progress->finish(l);
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
  pool_.for_each(thread, logit_rows, [&](int i) {
    normalise(x_ + (*logit_rows_)[i] * hidden_, model_.output_norm(), i);
    if (refines_output_) refine(i, logit_rows + i);
  });
  const Product output[] = {{&model_.output(), logits_, logit_stride_}};
  multiply(thread, refines_output_ ? 2 * logit_rows : logit_rows, output, 1, [](int) {});
  if (refines_output_) pool_.for_each(thread, logit_rows, [&](int i) { add_refinement(i, logit_rows + i); });
}

// What quantising row `row` has lost becomes a row of its own, so that the logits see twice the bits. The weights are read once
// for both, which is what a single row costs.
void Forward::refine(int row, int rest) {
  const float* y = y_ + row * wide_;
  const int8_t* values = values_ + row * wide_;
  const float* scales = scales_ + row * (wide_ / kBlock);
  float* lost = y_ + rest * wide_;
  for (int i = 0; i < shape_.hidden; ++i) lost[i] = std::fma(-scales[i / kBlock], static_cast<float>(values[i]), y[i]);
  quantise(rest, shape_.hidden);
}

void Forward::add_refinement(int row, int rest) {
  float* logits = logits_ + row * logit_stride_;
  const float* gained = logits_ + rest * logit_stride_;
  for (size_t i = 0; i < logit_stride_; ++i) logits[i] += gained[i];
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
                    {values_ + row * wide_, scales_ + row * blocks, offsets_ + row * blocks, sums_ + row * blocks * 2});
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
                               sums_ + first_row * blocks * 2,
                               blocks};
    const int first = chunk * grain;
    kernels_.linear(*product->matrix, first, std::min(first + grain, product->matrix->panels), input,
                    product->out + first_row * product->stride, product->stride, scratch_[thread].linear);
  };
  for_each_then_rows(thread, panel_tasks * row_blocks, rows, body, row_body);
}

}  // namespace penstock
