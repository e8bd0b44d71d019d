#include "step_memory.h"

#include <algorithm>

#include "launchers.h"
#include "matrix_layout.h"

namespace penstock::cuda {

namespace {

constexpr size_t kAlignment = 256;

size_t padded(size_t inputs) { return round_up(inputs, kChunkInputs); }

StepStrides strides_of(const ModelShape& s) {
  StepStrides strides;
  strides.queries = size_t(s.heads) * s.head_dim;
  strides.keys = size_t(s.kv_heads) * s.head_dim;
  strides.hidden = s.hidden;
  strides.feed_forward = s.feed_forward;
  strides.normed = padded(s.hidden);
  strides.attended = padded(strides.queries);
  strides.gated = padded(s.feed_forward);
  strides.projected = std::max(strides.queries + 2 * strides.keys, 2 * strides.feed_forward);
  strides.logits = s.vocabulary;
  return strides;
}

// Of the layers that give a device few blocks; the wide ones have enough.
size_t most_partial_bytes(const ModelShape& s) {
  const int queries = s.heads * s.head_dim;
  return std::max({penstock::cuda::partial_bytes(queries + 2 * s.kv_heads * s.head_dim, s.hidden), penstock::cuda::partial_bytes(s.hidden, queries),
                   penstock::cuda::partial_bytes(s.hidden, s.feed_forward)});
}

// Partial results of decode attention beyond which rows are computed as prefill is, which needs none.
constexpr size_t kMostUnitBytes = size_t{256} << 20;

}  // namespace

StepLimits step_limits(const ModelShape& s, const KvView& kv, int max_rows, int max_outputs, int max_context) {
  StepLimits limits;
  limits.rows = max_rows;
  limits.outputs = max_outputs;
  limits.logit_rows = std::min(max_rows, max_outputs);
  limits.context = max_context;
  const size_t entries_of_sequence = (size_t(max_context) + kv.block_tokens - 1) / kv.block_tokens;
  limits.entries = entries_of_sequence * max_rows;
  const int group = s.heads / s.kv_heads;
  limits.tasks = size_t(max_rows) * group / prefill_queries(s.head_dim) + max_rows;
  const int unit = attention_unit(s.head_dim);
  // As many as the pool holds, were no block shared, and one for each row's end.
  const size_t wanted = size_t(kv.blocks) * kv.block_tokens / unit + max_rows;
  const size_t unit_bytes = size_t(s.heads) * (s.head_dim + 2) * sizeof(float);
  limits.units = std::max(size_t{1}, std::min({wanted, kMostUnitBytes / unit_bytes, (size_t(max_context) / unit + 1) * max_rows}));
  return limits;
}

size_t StepMemory::lay_out_inputs(StepInputs& inputs, const StepLimits& limits, void* base) {
  size_t used = 0;
  const auto take = [&]<class T>(T*& array, size_t count) {
    if (base != nullptr) array = reinterpret_cast<T*>(static_cast<uint8_t*>(base) + used);
    used = round_up(used + count * sizeof(T), kAlignment);
  };
  take(inputs.tokens, limits.rows);
  take(inputs.positions, limits.rows);
  take(inputs.table_starts, limits.rows);
  take(inputs.decode_rows, limits.rows);
  take(inputs.unit_starts, limits.rows);
  take(inputs.logit_rows, limits.logit_rows);
  take(inputs.orders, limits.outputs);
  take(inputs.tasks, limits.tasks);
  take(inputs.tables, limits.entries);
  return used;
}

size_t StepMemory::device_bytes(const ModelShape& shape, const StepLimits& limits) {
  StepMemory unallocated(shape, limits);
  Arena measure;
  unallocated.lay_out(measure, shape);
  return measure.used();
}

void StepMemory::lay_out(Arena& arena, const ModelShape& s) {
  StepInputs none{};
  const size_t rows = limits.rows;
  arena.take(inputs_base_, lay_out_inputs(none, limits, nullptr));
  arena.take(x, rows * strides.hidden);
  arena.take(z, rows * strides.hidden);
  arena.take(normed, rows * strides.normed);
  arena.take(attended, rows * strides.attended);
  arena.take(gated, rows * strides.gated);
  arena.take(projected, rows * strides.projected);
  arena.take(queries, rows * strides.queries);
  arena.take(angles, rows * s.rotary);
  arena.take(unit_totals, limits.units * s.heads * s.head_dim);
  arena.take(unit_states, limits.units * s.heads * 2);
  arena.take(logits, limits.logit_rows * strides.logits);
  partial_bytes = most_partial_bytes(s);
  arena.take(partials, partial_bytes);
  arena.take(drawn, limits.outputs);
}

StepMemory::StepMemory(const ModelShape& shape, const StepLimits& given) : limits(given), strides(strides_of(shape)) {}

StepMemory::StepMemory(Device& device, const ModelShape& shape, const StepLimits& given, StreamHandle stream)
    : StepMemory(shape, given) {
  device_ = &device;
  Arena measure;
  lay_out(measure, shape);
  memory_ = DeviceMemory(device, device.allocate(measure.used(), "step arena"));
  Arena arena(&device, memory_.get());
  lay_out(arena, shape);
  lay_out_inputs(inputs, limits, inputs_base_);
  const size_t half_rows = limits.rows * sizeof(uint16_t);
  device.clear(normed, half_rows * strides.normed, stream);
  device.clear(attended, half_rows * strides.attended, stream);
  device.clear(gated, half_rows * strides.gated, stream);
  device.synchronise(stream);

  StepInputs none{};
  const size_t input_bytes = lay_out_inputs(none, limits, nullptr);
  const size_t drawn_bytes = round_up(limits.outputs * sizeof(int32_t), kAlignment);
  const size_t logit_bytes = kLogitRowsTogether * strides.logits * sizeof(float);
  pinned_ = PinnedMemory(device, device.allocate_pinned(input_bytes + drawn_bytes + logit_bytes, "inputs and results of steps"));
  lay_out_inputs(host, limits, pinned_.get());
  drawn_host = reinterpret_cast<int32_t*>(pinned_.as<uint8_t>() + input_bytes);
  logits_host = reinterpret_cast<float*>(pinned_.as<uint8_t>() + input_bytes + drawn_bytes);
}

void StepMemory::send(StreamHandle stream, size_t entries) {
  const size_t bytes = reinterpret_cast<uint8_t*>(host.tables + entries) - reinterpret_cast<uint8_t*>(host.tokens);
  device_->copy_to_device(inputs.tokens, host.tokens, bytes, stream);
}

}  // namespace penstock::cuda
