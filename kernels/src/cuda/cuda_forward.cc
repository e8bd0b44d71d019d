#include "cuda_forward.h"

#include <algorithm>

#include "launchers.h"

namespace penstock::cuda {

namespace {

// Rows of the decode graphs.
constexpr int kMostGraphRows = 64;
// Blocks of decode attention that keep a processor busy.
constexpr int kBlocksOfProcessor = 2;

}  // namespace

CudaForward::CudaForward(Device& device, const ModelShape& shape, const DeviceWeights& weights, const KvView& kv, StepMemory& memory,
                         StreamHandle stream)
    : device_(device), shape_(shape), weights_(weights), kv_(kv), memory_(memory), stream_(stream) {
  for (int layer = 0; layer < shape.layers; ++layer) layers_.emplace_back(device, device.create_event());
  capture();
}

int CudaForward::units_of(const Segment& segment) const {
  const int unit = attention_unit(shape_.head_dim);
  return (segment.position + unit) / unit;
}

// Which blocks compute which units changes no bit, only how busy the device is.
int CudaForward::split_for(int rows) const {
  const int group = shape_.heads / shape_.kv_heads;
  const int blocks = rows * shape_.kv_heads * ((group + 15) / 16);
  const int most = memory_.limits.context / attention_unit(shape_.head_dim) + 1;
  return std::clamp(device_.facts().processors * kBlocksOfProcessor / blocks, 1, most);
}

void CudaForward::capture() {
  const int most = std::min({kMostGraphRows, memory_.limits.rows, memory_.limits.logit_rows, memory_.limits.outputs});
  for (int rows = 1; rows <= most; rows *= 2) {
    device_.begin_capture(stream_);
    try {
      enqueue({rows, rows, 0, rows, rows, split_for(rows)}, false);
    } catch (...) {
      device_.destroy_graph(device_.end_capture(stream_));
      throw;
    }
    graphs_.push_back({rows, Graph(device_, device_.end_capture(stream_))});
  }
}

void CudaForward::plan(const int32_t* tokens, const std::vector<Segment>& segments, const std::vector<int>& logit_rows, int outputs) {
  StepInputs& host = memory_.host;
  counts_ = {};
  counts_.logit_rows = static_cast<int>(logit_rows.size());
  counts_.outputs = outputs;
  entries_ = 0;
  size_t units = 0;
  const int group = shape_.heads / shape_.kv_heads;
  for (const Segment& segment : segments) {
    const int entries = entries_of(segment, kv_.block_tokens);
    std::copy(segment.table, segment.table + entries, host.tables + entries_);
    for (int i = 0; i < segment.rows; ++i) {
      const int row = segment.first_row + i;
      host.tokens[row] = tokens[row];
      host.positions[row] = segment.position + i;
      host.table_starts[row] = static_cast<int32_t>(entries_);
    }
    entries_ += entries;
    counts_.rows += segment.rows;
    if (segment.rows == 1 && units + units_of(segment) <= memory_.limits.units) {
      host.decode_rows[counts_.decode_rows] = segment.first_row;
      host.unit_starts[counts_.decode_rows++] = static_cast<int32_t>(units);
      units += units_of(segment);
    } else {
      for (int first = 0; first < segment.rows * group; first += prefill_queries(shape_.head_dim))
        host.tasks[counts_.prefill_tasks++] = {segment.first_row, segment.rows, first, 0};
    }
  }
  std::copy(logit_rows.begin(), logit_rows.end(), host.logit_rows);
  counts_.split = split_for(std::max(1, counts_.decode_rows));

  graph_ = nullptr;
  if (counts_.prefill_tasks > 0) return;
  for (const DecodeGraph& graph : graphs_) {
    if (graph.rows >= std::max({counts_.rows, counts_.logit_rows, counts_.outputs})) {
      graph_ = &graph;
      pad(graph.rows);
      return;
    }
  }
}

// Rows, and rows of logits, that a graph has and the step has not.
void CudaForward::pad(int rows) {
  StepInputs& host = memory_.host;
  for (int row = counts_.rows; row < rows; ++row) {
    host.tokens[row] = 0;
    host.positions[row] = -1;
    host.table_starts[row] = 0;
    host.decode_rows[row] = row;
    host.unit_starts[row] = 0;
  }
  std::fill(host.logit_rows + counts_.logit_rows, host.logit_rows + rows, 0);
  std::fill(host.orders + counts_.outputs, host.orders + rows, DrawOrder{});
}

void CudaForward::launch(bool layer_done) {
  memory_.send(stream_, entries_);
  if (graph_ != nullptr && !layer_done) {
    device_.launch_graph(graph_->graph.get(), stream_);
  } else {
    enqueue(counts_, layer_done);
  }
}

void CudaForward::enqueue(const Counts& counts, bool layer_done) {
  const Queue queue = {device_, stream_};
  StepMemory& m = memory_;
  const StepStrides& s = m.strides;
  const int rows = counts.rows;
  const StepRows step = {m.inputs.tokens, m.inputs.positions, m.inputs.table_starts, m.inputs.tables};
  const int hidden = shape_.hidden;

  embed(queue, step, rows, {weights_.embedding(), weights_.frequencies(), shape_.rotary / 2, m.x, s.hidden, m.angles});
  const auto normalise = [&](const float* gained, const float* weight) {
    rms_norm(queue, rows, {m.x, gained, s.hidden, nullptr, weight, hidden, shape_.norm_epsilon, m.normed, s.normed});
  };
  const auto multiply = [&](const uint16_t* input, size_t stride, int count, std::initializer_list<Product> products) {
    linear(queue, products.begin(), static_cast<int>(products.size()), {input, stride, count}, {m.partials, m.partial_bytes});
  };
  const AttentionArguments attention = {m.queries, m.attended, s.attended, shape_.heads};
  const size_t key_offset = s.queries;
  const size_t value_offset = s.queries + s.keys;
  for (int l = 0; l < shape_.layers; ++l) {
    const DeviceLayer& layer = weights_.layers()[l];
    normalise(l == 0 ? nullptr : m.z, layer.attention_norm);
    multiply(m.normed, s.normed, rows,
             {{layer.query, m.projected, s.projected},
              {layer.key, m.projected + key_offset, s.projected},
              {layer.value, m.projected + value_offset, s.projected}});
    // All keys and values of the step are in the pool before any row attends: what a row reads does not depend on whether it
    // was computed now or found there.
    rotate_and_store(queue, kv_, l, step, rows,
                     {m.projected, s.projected, key_offset, value_offset, m.angles, shape_.rotary, shape_.heads, m.queries});
    if (layer_done) device_.record(layers_[l].get(), stream_);
    attend_prefill(queue, kv_, l, step, attention, m.inputs.tasks, counts.prefill_tasks);
    attend_decode(queue, kv_, l, step, attention,
                  {m.inputs.decode_rows, m.inputs.unit_starts, counts.decode_rows, counts.split, m.unit_totals, m.unit_states});
    multiply(m.attended, s.attended, rows, {{layer.attention_output, m.z, s.hidden}});
    normalise(m.z, layer.feed_forward_norm);
    float* const up = m.projected + s.feed_forward;
    multiply(m.normed, s.normed, rows, {{layer.gate, m.projected, s.projected}, {layer.up, up, s.projected}});
    swiglu(queue, rows, m.projected, up, s.projected, shape_.feed_forward, m.gated, s.gated);
    multiply(m.gated, s.gated, rows, {{layer.down, m.z, s.hidden}});
  }
  // The residual stream of the rows whose logits are wanted gains what the last layer gave.
  rms_norm(queue, counts.logit_rows,
           {m.x, m.z, s.hidden, m.inputs.logit_rows, weights_.output_norm(), hidden, shape_.norm_epsilon, m.normed, s.normed});
  multiply(m.normed, s.normed, counts.logit_rows, {{weights_.output(), m.logits, s.logits}});
  draw_tokens(queue, m.logits, s.logits, shape_.vocabulary, m.inputs.orders, counts.outputs, m.drawn);
}

}  // namespace penstock::cuda
