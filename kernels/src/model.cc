#include "model.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <unordered_set>

#include "cpu/kernels.h"
#include "fixed_math.h"

namespace penstock {

namespace {

constexpr const char* kArchitecture = "llama";

// A dimension of the model under the architecture's prefix; the bound keeps all later products within int.
int read_count(const GgufFile& file, const std::string& key, uint64_t most, const uint64_t* fallback = nullptr) {
  const uint64_t value = fallback == nullptr ? file.get_uint(key) : file.get_uint(key, *fallback);
  if (value < 1 || value > most) {
    file.fail("key " + key + ": expected an integer in 1 … " + std::to_string(most) + ", found " + std::to_string(value));
  }
  return static_cast<int>(value);
}

}  // namespace

Model::Model(const GgufFile& file, ThreadPool& pool, AwqForm awq) {
  read_shape(file);
  read_frequencies(file);

  const ModelShape& s = shape_;
  const int query_size = s.heads * s.head_dim;
  const int kv_size = s.kv_heads * s.head_dim;
  describe(file, "token_embd.weight", s.vocabulary, s.hidden, embedding_);
  output_norm_ = read_norm(file, "output_norm.weight");
  const bool tied = file.find("output.weight") == nullptr;
  if (!tied) describe(file, "output.weight", s.vocabulary, s.hidden, output_);

  layers_.resize(s.layers);
  for (int i = 0; i < s.layers; ++i) {
    Layer& layer = layers_[i];
    const std::string block = "blk." + std::to_string(i) + ".";
    layer.attention_norm = read_norm(file, block + "attn_norm.weight");
    describe_either(file, block + "attn_q", query_size, s.hidden, layer.query, awq);
    describe_either(file, block + "attn_k", kv_size, s.hidden, layer.key, awq);
    describe_either(file, block + "attn_v", kv_size, s.hidden, layer.value, awq);
    describe_either(file, block + "attn_output", s.hidden, query_size, layer.attention_output, awq);
    layer.feed_forward_norm = read_norm(file, block + "ffn_norm.weight");
    describe_either(file, block + "ffn_gate", s.feed_forward, s.hidden, layer.gate, awq);
    describe_either(file, block + "ffn_up", s.feed_forward, s.hidden, layer.up, awq);
    describe_either(file, block + "ffn_down", s.hidden, s.feed_forward, layer.down, awq);
  }
  refuse_unknown_tensors(file);
  pack(file, pool);
  if (tied) output_ = embedding_;
}

void Model::read_shape(const GgufFile& file) {
  ModelShape& s = shape_;
  s.architecture = std::string(file.get_string("general.architecture"));
  if (s.architecture != kArchitecture) {
    file.fail("key general.architecture: expected one of: " + std::string(kArchitecture) + "; found " + s.architecture);
  }
  const std::string prefix = s.architecture + ".";
  s.layers = read_count(file, prefix + "block_count", 1024);
  s.hidden = read_count(file, prefix + "embedding_length", 1 << 16);
  s.heads = read_count(file, prefix + "attention.head_count", 1024);
  const uint64_t heads = s.heads;
  s.kv_heads = read_count(file, prefix + "attention.head_count_kv", 1024, &heads);
  s.feed_forward = read_count(file, prefix + "feed_forward_length", 1 << 20);
  s.context = read_count(file, prefix + "context_length", 1 << 24);
  s.norm_epsilon = static_cast<float>(file.get_float(prefix + "attention.layer_norm_rms_epsilon"));
  s.rope_base = file.get_float(prefix + "rope.freq_base", 10000.0);
  if (s.heads % s.kv_heads != 0) {
    file.fail("key " + prefix + "attention.head_count_kv: expected a divisor of the " + std::to_string(s.heads) +
              " heads, found " + std::to_string(s.kv_heads));
  }
  if (s.heads / s.kv_heads > kMostQueries) {
    file.fail("key " + prefix + "attention.head_count_kv: expected at most " + std::to_string(kMostQueries) +
              " heads to a KV head, found " + std::to_string(s.heads / s.kv_heads));
  }
  const uint64_t usual_head = s.hidden / s.heads;
  s.head_dim = read_count(file, prefix + "attention.key_length", kMostHeadDim, &usual_head);
  const uint64_t head_dim = s.head_dim;
  if (read_count(file, prefix + "attention.value_length", kMostHeadDim, &head_dim) != s.head_dim) {
    file.fail("key " + prefix + "attention.value_length: expected the key length, " + std::to_string(s.head_dim));
  }
  s.rotary = read_count(file, prefix + "rope.dimension_count", head_dim, &head_dim);
  if (s.rotary % 2 != 0) {
    file.fail("key " + prefix + "rope.dimension_count: expected an even number, found " + std::to_string(s.rotary));
  }
  if (!(s.rope_base > 0.0) || !(s.norm_epsilon >= 0.0f) || !std::isfinite(s.rope_base) ||
      !std::isfinite(s.norm_epsilon)) {
    file.fail("keys " + prefix + "rope.freq_base, attention.layer_norm_rms_epsilon: expected positive numbers");
  }
  // What would change results, and is not done here, is refused rather than ignored.
  const std::string_view scaling = file.get_string(prefix + "rope.scaling.type", "none");
  if (scaling != "none") {
    file.fail("key " + prefix + "rope.scaling.type: expected none, found " + std::string(scaling));
  }
  if (file.get_uint(prefix + "expert_count", 0) != 0) {
    file.fail("key " + prefix + "expert_count: expected 0 (mixtures of experts are not supported)");
  }
  const GgufTensor& embedding = file.tensor("token_embd.weight");
  if (embedding.dims != 2 || embedding.shape[1] > (1u << 24)) {
    file.fail("tensor token_embd.weight: expected [" + std::to_string(s.hidden) + ", vocabulary], found " +
              shape_text(embedding));
  }
  s.vocabulary = static_cast<int>(embedding.shape[1]);
}

void Model::read_frequencies(const GgufFile& file) {
  const int pairs = shape_.rotary / 2;
  const double log_base = fixed_log(shape_.rope_base);
  for (int i = 0; i < pairs; ++i) frequencies_.push_back(fixed_exp(-2.0 * i / shape_.rotary * log_base));

  // Llama 3.1 and its like: a divisor for each frequency.
  const GgufTensor* factors = file.find("rope_freqs.weight");
  if (factors == nullptr) return;
  used_.push_back(factors->name);
  if (factors->type != TensorType::F32 || factors->dims != 1 || factors->shape[0] != static_cast<uint64_t>(pairs)) {
    file.fail("tensor rope_freqs.weight: expected F32 [" + std::to_string(pairs) + "], found " + tensor_type_name(factors->type) +
              " " + shape_text(*factors));
  }
  for (int i = 0; i < pairs; ++i) {
    float factor;
    std::memcpy(&factor, factors->data + i * sizeof factor, sizeof factor);
    if (!(factor > 0.0f) || !std::isfinite(factor)) file.fail("tensor rope_freqs.weight: expected positive numbers");
    frequencies_[i] /= factor;
  }
}

void Model::describe(const GgufFile& file, const std::string& name, int outputs, int inputs, Matrix& matrix) {
  const GgufTensor& tensor = file.tensor(name);
  if (tensor.dims != 2 || tensor.shape[0] != static_cast<uint64_t>(inputs) || tensor.shape[1] != static_cast<uint64_t>(outputs)) {
    file.fail("tensor " + name + ": expected [" + std::to_string(inputs) + ", " + std::to_string(outputs) + "], found " +
              shape_text(tensor));
  }
  matrix = describe_matrix(file, tensor);
  pending_.push_back({&tensor, &matrix, {}});
  used_.push_back(tensor.name);
}

void Model::describe_either(const GgufFile& file, const std::string& name, int outputs, int inputs, Matrix& matrix, AwqForm form) {
  if (!has_awq(file, name)) return describe(file, name + ".weight", outputs, inputs, matrix);
  if (file.find(name + ".weight") != nullptr) {
    file.fail("tensor " + name + ".weight: expected it or " + name + ".qweight, .qzeros and .scales, found both");
  }
  const AwqMatrix awq = read_awq(file, name, outputs, inputs);
  matrix = describe_matrix(awq, form);
  const GgufTensor& scales = file.tensor(name + ".scales");
  if (form == AwqForm::Packed) pending_.push_back({&scales, &matrix, awq});
  for (const char* part : {".qweight", ".qzeros"}) used_.push_back(file.tensor(name + part).name);
  used_.push_back(scales.name);
}

const float* Model::read_norm(const GgufFile& file, const std::string& name) {
  const GgufTensor& tensor = file.tensor(name);
  const size_t hidden = shape_.hidden;
  if (tensor.type != TensorType::F32 || tensor.dims != 1 || tensor.shape[0] != hidden) {
    file.fail("tensor " + name + ": expected F32 [" + std::to_string(hidden) + "], found " + tensor_type_name(tensor.type) + " " +
              shape_text(tensor));
  }
  std::vector<float> norm(round_up(hidden, 16), 0.0f);
  std::memcpy(norm.data(), tensor.data, hidden * sizeof(float));
  used_.push_back(tensor.name);
  return norms_.emplace_back(std::move(norm)).data();
}

// A bias or another tensor that this architecture does not know would silently be left out of the computation.
void Model::refuse_unknown_tensors(const GgufFile& file) const {
  const std::unordered_set<std::string_view> used(used_.begin(), used_.end());
  for (const GgufTensor& tensor : file.tensors()) {
    if (used.count(tensor.name) == 0) {
      file.fail("tensor " + std::string(tensor.name) + ": not known to the architecture " + shape_.architecture);
    }
  }
}

void Model::pack(const GgufFile& file, ThreadPool& pool) {
  size_t bytes = 0;
  for (const Pending& p : pending_) bytes += p.matrix->bytes();
  // The kernels prefetch a few records past the panel they work on.
  weights_ = Region(bytes + 16384, "weights");
  uint8_t* next = weights_.as<uint8_t>();
  for (const Pending& p : pending_) {
    p.matrix->data = next;
    next += p.matrix->bytes();
  }

  std::exception_ptr error;
  std::mutex error_mutex;
  const int count = static_cast<int>(pending_.size());
  pool.run([&](int thread) {
    pool.for_each(thread, count * 16, [&](int task) {  // a sixteenth of a matrix each
      const Pending& p = pending_[task / 16];
      try {
        const int first = static_cast<int>(int64_t{p.matrix->panels} * (task % 16) / 16);
        const int last = static_cast<int>(int64_t{p.matrix->panels} * (task % 16 + 1) / 16);
        for (int panel = first; panel < last; ++panel) {
          if (p.awq) pack_panel(file, *p.tensor, *p.awq, *p.matrix, panel);
          else pack_panel(file, *p.tensor, *p.matrix, panel);
        }
      } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        error = std::current_exception();
      }
    });
  });
  if (error) std::rethrow_exception(error);
  pending_.clear();
  used_.clear();
}

}  // namespace penstock
