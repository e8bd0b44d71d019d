#include "engine.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <unordered_set>

namespace penstock {

namespace {

[[noreturn]] void refuse(const std::string& place, const std::string& message) {
  throw std::runtime_error(place + ": " + message);
}

std::string at(const char* array, size_t index, const char* field = nullptr) {
  std::string place = std::string("Batch.") + array + "[" + std::to_string(index) + "]";
  return field == nullptr ? place : place + "." + field;
}

[[noreturn]] void refuse_range(const std::string& place, int64_t value, int64_t least, int64_t most) {
  refuse(place, std::to_string(value) + " is not in " + std::to_string(least) + " … " + std::to_string(most));
}

// The place is put into words only where it is needed.
void check_range(const char* array, size_t index, const char* field, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) refuse_range(at(array, index, field), value, least, most);
}

void check_length(const char* array, size_t length, size_t most) {
  if (length > most)
    refuse(std::string("Batch.") + array, "expected at most " + std::to_string(most) + ", found " + std::to_string(length));
}

}  // namespace

Engine::Engine(const EngineOptions& options) : options_(options), shape_{}, isa_(std::min(options.isa, best_instruction_set())) {
  segments_.reserve(options_.max_rows);
  outputs_.reserve(options_.max_outputs);
  logit_rows_.reserve(options_.max_rows);
  logit_row_of_.assign(options_.max_rows, -1);
  written_.assign(size_t(options_.blocks) * options_.block_tokens, 0);
}

void Engine::adopt(const ModelShape& shape) {
  shape_ = shape;
  if (options_.max_context == 0) options_.max_context = shape.context;
  if (options_.max_context > shape.context) {
    refuse("maxContext",
           "expected at most the model's " + std::to_string(shape.context) + ", found " + std::to_string(options_.max_context));
  }
}

bool Engine::blocks_hold_the_same(const Engine& other) const {
  const ModelShape& theirs = other.shape_;
  return shape_.layers == theirs.layers && shape_.kv_heads == theirs.kv_heads && shape_.head_dim == theirs.head_dim &&
         options_.block_tokens == other.options_.block_tokens && options_.kv_dtype == other.options_.kv_dtype;
}

void Engine::copy_block(int from, int to) {
  const int32_t source = from;
  const int32_t goal = to;
  if (from != to) copy_layers(*this, {&source, 1, 0, shape_.layers}, &goal);
}

int32_t Engine::create_sampler(SamplerOptions options, const std::vector<int32_t>& prompt, const std::vector<int32_t>& output) {
  auto sampler = std::make_shared<Sampler>(std::move(options), shape().vocabulary, prompt.data(), prompt.size(), output.data(),
                                           output.size());
  while (samplers_.count(next_sampler_) != 0) next_sampler_ = (next_sampler_ + 1) & 0x7fffffff;
  const int32_t id = next_sampler_;
  samplers_.emplace(id, std::move(sampler));
  next_sampler_ = (id + 1) & 0x7fffffff;
  return id;
}

void Engine::free_sampler(int32_t id) {
  if (samplers_.erase(id) == 0) refuse("sampler", std::to_string(id) + " is not a live sampler");
}

void Engine::prepare(Batch batch) {
  check_length("tokens", batch.tokens.size(), options_.max_rows);
  check_length("outputs", batch.outputs.size() / 4, options_.max_outputs);
  for (size_t i = 0; i < batch.tokens.size(); ++i) check_range("tokens", i, nullptr, batch.tokens[i], 0, shape().vocabulary - 1);
  check_segments(batch);
  check_outputs(batch);
  batch_ = std::move(batch);
  // Segments point into the block tables, which a move leaves in place.
  plan();
}

void Engine::check_segments(const Batch& batch) {
  if (batch.segments.size() % 4 != 0)
    refuse("Batch.segments", "expected four numbers a segment, found " + std::to_string(batch.segments.size()));
  if (batch.outputs.size() % 4 != 0)
    refuse("Batch.outputs", "expected four numbers an output, found " + std::to_string(batch.outputs.size()));
  if (batch.tokens.empty()) refuse("Batch.tokens", "expected at least one row, found none");
  segments_.clear();
  if (++step_ == 0) {  // the numbering ran over
    std::fill(written_.begin(), written_.end(), 0);
    step_ = 1;
  }
  const int64_t total = static_cast<int64_t>(batch.tokens.size());
  const int64_t entries_there = static_cast<int64_t>(batch.block_tables.size());
  int64_t rows_so_far = 0;
  for (size_t i = 0; i < batch.segments.size() / 4; ++i) {
    const int64_t rows = batch.segments[4 * i];
    const int64_t position = batch.segments[4 * i + 1];
    const int64_t first_entry = batch.segments[4 * i + 2];
    const int64_t entries = batch.segments[4 * i + 3];
    check_range("segments", i, "rows", rows, 1, total - rows_so_far);
    check_range("segments", i, "position", position, 0, options_.max_context - rows);
    check_range("segments", i, "first entry", first_entry, 0, entries_there);
    check_range("segments", i, "entries", entries, 0, entries_there - first_entry);
    const int64_t needed = (position + rows + options_.block_tokens - 1) / options_.block_tokens;
    if (entries < needed) {
      refuse(at("segments", i, "entries"), "expected at least " + std::to_string(needed) + " blocks for positions up to " +
                                               std::to_string(position + rows - 1) + ", found " + std::to_string(entries));
    }
    for (int64_t e = first_entry; e < first_entry + entries; ++e)
      check_range("blockTables", e, nullptr, batch.block_tables[e], 0, options_.blocks - 1);
    segments_.push_back({static_cast<int>(rows_so_far), static_cast<int>(rows), static_cast<int>(position),
                         batch.block_tables.data() + first_entry});
    check_writes(segments_.back(), i);
    rows_so_far += rows;
  }
  if (rows_so_far != total) {
    refuse("Batch.segments",
           "expected rows that add up to the " + std::to_string(total) + " tokens, found " + std::to_string(rows_so_far));
  }
}

// Two rows that write one slot would race, and the result depend on who comes last.
void Engine::check_writes(const Segment& segment, size_t index) {
  for (int position = segment.position; position < segment.position + segment.rows; ++position) {
    const int block = segment.table[position / options_.block_tokens];
    uint32_t& stamp = written_[size_t(block) * options_.block_tokens + position % options_.block_tokens];
    if (stamp == step_) {
      refuse(at("segments", index), "position " + std::to_string(position) + " falls into block " + std::to_string(block) +
                                        " where another row of the step is written");
    }
    stamp = step_;
  }
}

void Engine::check_outputs(const Batch& batch) {
  outputs_.clear();
  for (int row : logit_rows_) logit_row_of_[row] = -1;
  logit_rows_.clear();
  std::unordered_set<int32_t> used;
  for (size_t i = 0; i < batch.outputs.size() / 4; ++i) {
    const int32_t row = batch.outputs[4 * i];
    const int32_t sampler = batch.outputs[4 * i + 1];
    const int32_t target = batch.outputs[4 * i + 2];
    const int32_t top = batch.outputs[4 * i + 3];
    check_range("outputs", i, "row", row, 0, static_cast<int64_t>(batch.tokens.size()) - 1);
    check_range("outputs", i, "target", target, -1, shape().vocabulary - 1);
    check_range("outputs", i, "top", top, -1, shape().vocabulary);
    Output output = {0, nullptr, target, top};
    if (sampler != -1) {
      const auto found = samplers_.find(sampler);
      if (found == samplers_.end()) refuse(at("outputs", i, "sampler"), std::to_string(sampler) + " is not a live sampler");
      if (target != -1) refuse(at("outputs", i), "expected a sampler or a target, found both");
      if (!used.insert(sampler).second)
        refuse(at("outputs", i, "sampler"), std::to_string(sampler) + " occurs twice in one step");
      output.sampler = found->second;
    }
    if (logit_row_of_[row] < 0) {
      logit_row_of_[row] = static_cast<int>(logit_rows_.size());
      logit_rows_.push_back(row);
    }
    output.logit_row = logit_row_of_[row];
    outputs_.push_back(std::move(output));
  }
}

StepResult Engine::empty_result() const {
  const size_t outputs = outputs_.size();
  StepResult result;
  for (const Output& output : outputs_) result.top_width = std::max(result.top_width, output.top);
  result.tokens.assign(outputs, -1);
  result.logprobs.assign(outputs, std::numeric_limits<float>::quiet_NaN());
  result.top_tokens.assign(outputs * result.top_width, -1);
  result.top_logprobs.assign(outputs * result.top_width, std::numeric_limits<float>::quiet_NaN());
  if (batch_.want_logits) result.logits.resize(outputs * shape_.vocabulary);
  return result;
}

void Engine::refuse_logits(int row) const {
  refuse("Batch.tokens[" + std::to_string(row) + "]",
         "the logits of this row are not finite: the model or the KV it reads is damaged");
}

void Engine::finish(const Output& output, int index, const float* logits, int32_t drawn, SamplerScratch& scratch,
                    StepResult& result) const {
  const int vocabulary = shape_.vocabulary;
  const int32_t token = drawn >= 0                   ? drawn
                        : output.sampler != nullptr ? output.sampler->draw(logits, vocabulary, scratch)
                                                     : output.target;
  result.tokens[index] = token;
  if (output.top >= 0) {
    const float log_sum = log_sum_exp(logits, vocabulary);
    if (token >= 0) result.logprobs[index] = log_softmax_at(logits, log_sum, token);
    const size_t first = size_t(index) * result.top_width;
    if (output.top > 0)
      top_logprobs(logits, vocabulary, log_sum, output.top, &result.top_tokens[first], &result.top_logprobs[first]);
  }
  if (batch_.want_logits) std::copy(logits, logits + vocabulary, &result.logits[size_t(index) * vocabulary]);
}

}  // namespace penstock
