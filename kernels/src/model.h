// A model's shape and weights, read from a GGUF file and packed once. Immutable after load.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "gguf.h"
#include "matrix.h"
#include "region.h"
#include "thread_pool.h"

namespace penstock {

struct ModelShape {
  std::string architecture;
  int layers;
  int hidden;
  int heads;
  int kv_heads;
  int head_dim;
  int rotary;  // leading dimensions of a head that are rotated
  int feed_forward;
  int vocabulary;
  int context;  // most tokens in a sequence
  float norm_epsilon;
  double rope_base;
};

struct Layer {
  const float* attention_norm;     // [hidden padded to 16]
  Matrix query;                    // [heads * head_dim, hidden]
  Matrix key;                      // [kv_heads * head_dim, hidden]
  Matrix value;                    // [kv_heads * head_dim, hidden]
  Matrix attention_output;         // [hidden, heads * head_dim]
  const float* feed_forward_norm;  // [hidden padded to 16]
  Matrix gate;                     // [feed_forward, hidden]
  Matrix up;                       // [feed_forward, hidden]
  Matrix down;                     // [hidden, feed_forward]
};

class Model {
 public:
  // Reads and packs all weights, on the threads of `pool`. The file is not needed afterwards, but where `awq` is AsInFile. Throws
  // std::runtime_error naming the tensor or key where something is missing, of a wrong shape or type, or not known to the
  // architecture.
  Model(const GgufFile& file, ThreadPool& pool, AwqForm awq = AwqForm::Packed);

  const ModelShape& shape() const { return shape_; }
  const std::vector<Layer>& layers() const { return layers_; }
  const Matrix& embedding() const { return embedding_; }     // [vocabulary, hidden]
  const Matrix& output() const { return output_; }           // [vocabulary, hidden]; the embedding where the file has no other
  const float* output_norm() const { return output_norm_; }  // [hidden padded to 16]
  const std::vector<double>& frequencies() const { return frequencies_; }  // [rotary / 2] radians per position

 private:
  // A matrix of the file and where its description is to go; data follows when all are known.
  struct Pending {
    const GgufTensor* tensor;  // of AWQ's the scales
    Matrix* matrix;
    std::optional<AwqMatrix> awq;
  };

  void read_shape(const GgufFile& file);
  void read_frequencies(const GgufFile& file);
  void describe(const GgufFile& file, const std::string& name, int outputs, int inputs, Matrix& matrix);
  // A matrix of a layer: the tensor `name`.weight, or AWQ's three.
  void describe_either(const GgufFile& file, const std::string& name, int outputs, int inputs, Matrix& matrix, AwqForm form);
  const float* read_norm(const GgufFile& file, const std::string& name);
  void refuse_unknown_tensors(const GgufFile& file) const;
  void pack(const GgufFile& file, ThreadPool& pool);

  ModelShape shape_;
  std::vector<Layer> layers_;
  Matrix embedding_;
  Matrix output_;
  const float* output_norm_ = nullptr;
  std::vector<double> frequencies_;
  std::vector<std::vector<float>> norms_;
  std::vector<Pending> pending_;
  std::vector<std::string_view> used_;
  Region weights_;
};

}  // namespace penstock
