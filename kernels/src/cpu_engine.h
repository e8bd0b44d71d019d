// The engine on threads of the host.
#pragma once

#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "engine.h"
#include "forward.h"
#include "kv_pool.h"
#include "model.h"
#include "thread_pool.h"

namespace penstock {

class CpuEngine : public Engine {
 public:
  explicit CpuEngine(const EngineOptions& options);

  std::string device() const override { return "cpu"; }
  size_t layer_block_bytes() const override { return kv_->layer_block_bytes(); }
  uint32_t export_layers(const KvRange& range, uint8_t* into, uint32_t seed) override {
    return kv_->export_layers(range, into, seed);
  }
  uint32_t import_layers(const KvRange& range, const uint8_t* from, uint32_t seed) override {
    return kv_->import_layers(range, from, seed);
  }
  void copy_layers(Engine& from, const KvRange& range, const int32_t* to) override {
    kv_->copy_layers(*dynamic_cast<CpuEngine&>(from).kv_, range, to);
  }
  StepResult run(LayerProgress* progress) override;

 private:
  void plan() override { forward_->plan(batch_.tokens.data(), segments_, logit_rows_); }

  const Kernels& kernels_;
  ThreadPool pool_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvPool> kv_;
  std::unique_ptr<Forward> forward_;
  std::vector<SamplerScratch> sampler_scratch_;  // [threads]
};

}  // namespace penstock
