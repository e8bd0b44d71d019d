// The engine on a GPU, or on the device of the host's that stands in for one. It owns the device's memory: weights, the pool of KV and
// a step arena, all allocated at load.
#pragma once

#include <memory>
#include <string>

#include "../engine.h"
#include "cuda_forward.h"
#include "device.h"
#include "kv_staging.h"

namespace penstock::cuda {

class CudaEngine : public Engine {
 public:
  CudaEngine(const EngineOptions& options, std::unique_ptr<Device> device);

  std::string device() const override { return description_; }
  size_t layer_block_bytes() const override { return kv_.layer_block_bytes(); }
  uint32_t export_layers(const KvRange& range, uint8_t* into, uint32_t seed) override { return staging_->export_layers(range, into, seed); }
  uint32_t import_layers(const KvRange& range, const uint8_t* from, uint32_t seed) override {
    return staging_->import_layers(range, from, seed);
  }
  void copy_layers(Engine& from, const KvRange& range, const int32_t* to) override {
    staging_->copy_layers(*dynamic_cast<CudaEngine&>(from).staging_, range, to);
  }
  StepResult run(LayerProgress* progress) override;

  Device& gpu() { return *device_; }  // for tests

 private:
  void plan() override;
  void check_shape() const;
  void check_memory(size_t weights, size_t pool, size_t arena, size_t staging);
  bool needs_logits(const Output& output, int32_t drawn) const;
  void finish_on_host(StepResult& result);

  std::unique_ptr<Device> device_;
  Stream stream_;
  KvView kv_;
  std::string description_;
  std::unique_ptr<DeviceWeights> weights_;
  DeviceMemory pool_;
  std::unique_ptr<StepMemory> memory_;
  std::unique_ptr<CudaForward> forward_;
  std::unique_ptr<KvStaging> staging_;
  SamplerScratch scratch_;
};

}  // namespace penstock::cuda
