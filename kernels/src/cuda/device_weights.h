// A model's weights in device memory: repacked once, in one allocation.
#pragma once

#include <vector>

#include "../model.h"
#include "arena.h"
#include "matrix_layout.h"

namespace penstock::cuda {

struct DeviceLayer {
  const float* attention_norm;     // [hidden]
  DeviceMatrix query, key, value;
  DeviceMatrix attention_output;
  const float* feed_forward_norm;  // [hidden]
  DeviceMatrix gate, up, down;
};

class DeviceWeights {
 public:
  // What it will take.
  static size_t bytes(const Model& model);

  // Repacks on the threads of `pool`. The model is not needed afterwards.
  DeviceWeights(Device& device, const Model& model, ThreadPool& pool);

  const std::vector<DeviceLayer>& layers() const { return layers_; }
  const DeviceMatrix& embedding() const { return embedding_; }
  const DeviceMatrix& output() const { return output_; }
  const float* output_norm() const { return output_norm_; }
  const double* frequencies() const { return frequencies_; }  // [rotary / 2]

 private:
  class Upload;

  void lay_out(const Model& model, Arena& arena);

  std::vector<DeviceLayer> layers_;
  DeviceMatrix embedding_, output_;
  const float* output_norm_ = nullptr;
  const double* frequencies_ = nullptr;
  DeviceMemory memory_;
};

}  // namespace penstock::cuda
