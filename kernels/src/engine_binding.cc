#include "engine_binding.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "engine.h"
#include "engine_options.h"
#include "layer_events.h"

namespace penstock {

namespace {

class NativeEngine;

// Runs what was prepared; the wrapper is kept alive until then.
class StepWorker : public Napi::AsyncWorker {
 public:
  // `events` is null where nobody asked for them.
  StepWorker(Napi::Env env, std::shared_ptr<Engine> engine, std::shared_ptr<LayerEvents> events, NativeEngine* owner,
             Napi::Object owner_object)
      : Napi::AsyncWorker(env, "penstock.step"),
        deferred_(Napi::Promise::Deferred::New(env)),
        engine_(std::move(engine)),
        events_(std::move(events)),
        owner_(owner),
        owner_object_(Napi::Persistent(owner_object)) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

  void Execute() override {
    try {
      result_ = engine_->run(events_.get());
    } catch (const std::exception& error) {
      SetError(error.what());
    }
  }
  void OnOK() override;
  void OnError(const Napi::Error& error) override;

 private:
  // What is left of the layers is reported before anyone hears of the end; what a callback threw.
  std::optional<Napi::Error> end_step();

  Napi::Promise::Deferred deferred_;
  std::shared_ptr<Engine> engine_;
  std::shared_ptr<LayerEvents> events_;
  NativeEngine* owner_;
  Napi::ObjectReference owner_object_;
  StepResult result_;
};

// Lets go of the last reference to an engine off the event loop: unmapping a large pool takes a while.
class CloseWorker : public Napi::AsyncWorker {
 public:
  CloseWorker(Napi::Env env, std::shared_ptr<Engine> engine, std::vector<Napi::Promise::Deferred> waiting)
      : Napi::AsyncWorker(env, "penstock.close"), engine_(std::move(engine)), waiting_(std::move(waiting)) {}

  void Execute() override { engine_.reset(); }
  void OnOK() override {
    for (const Napi::Promise::Deferred& deferred : waiting_) deferred.Resolve(Env().Undefined());
  }

 private:
  std::shared_ptr<Engine> engine_;
  std::vector<Napi::Promise::Deferred> waiting_;
};

// Block numbers of a pool, checked.
std::vector<int32_t> block_numbers(const Napi::CallbackInfo& info, size_t index, const char* name, int pool_blocks) {
  std::vector<int32_t> blocks = int32_argument(info, index, name);
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i] < 0 || blocks[i] >= pool_blocks) {
      throw std::runtime_error(std::string(name) + "[" + std::to_string(i) + "]: " + std::to_string(blocks[i]) + " is not in 0 … " +
                               std::to_string(pool_blocks - 1));
    }
  }
  return blocks;
}

// Layers of blocks of an engine, checked.
struct KvPlaces {
  std::vector<int32_t> blocks;
  int first_layer;
  int layers;

  KvRange range() const { return {blocks.data(), blocks.size(), first_layer, layers}; }
};

// What exportLayers and importLayers have in common, checked.
struct LayerBytes : KvPlaces {
  uint8_t* at;
  uint32_t seed;
};

// NativeEngine of kernels/index.ts. Its methods run on the event loop.
class NativeEngine : public Napi::ObjectWrap<NativeEngine> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "NativeEngine",
        {InstanceMethod("info", &NativeEngine::info), InstanceMethod("createSampler", &NativeEngine::create_sampler),
         InstanceMethod("freeSampler", &NativeEngine::free_sampler), InstanceMethod("samplers", &NativeEngine::samplers),
         InstanceMethod("step", &NativeEngine::step), InstanceMethod("exportLayers", &NativeEngine::export_layers),
         InstanceMethod("importLayers", &NativeEngine::import_layers), InstanceMethod("copyLayers", &NativeEngine::copy_layers),
         InstanceMethod("copyBlock", &NativeEngine::copy_block), InstanceMethod("close", &NativeEngine::close)});
  }

  explicit NativeEngine(const Napi::CallbackInfo& info) : Napi::ObjectWrap<NativeEngine>(info) {
    if (info.Length() != 1 || !info[0].IsExternal()) throw Napi::TypeError::New(info.Env(), "NativeEngine: use loadEngine");
    engine_ = std::move(*info[0].As<Napi::External<std::shared_ptr<Engine>>>().Data());
  }
  ~NativeEngine() override {
    if (events_ != nullptr) events_->close();
  }

  // On the event loop, when the step in flight has settled.
  void step_ended() {
    stepping_ = false;
    if (closing_) release();
  }

 private:
  Engine& engine() const {
    if (engine_ == nullptr || closing_) throw std::runtime_error("engine: it is closed");
    return *engine_;
  }

  Napi::Value info(const Napi::CallbackInfo& info);
  Napi::Value create_sampler(const Napi::CallbackInfo& info);
  Napi::Value free_sampler(const Napi::CallbackInfo& info);
  Napi::Value samplers(const Napi::CallbackInfo& info);
  Napi::Value step(const Napi::CallbackInfo& info);
  Napi::Value export_layers(const Napi::CallbackInfo& info);
  Napi::Value import_layers(const Napi::CallbackInfo& info);
  Napi::Value copy_layers(const Napi::CallbackInfo& info);
  Napi::Value copy_block(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);
  KvPlaces places(const Napi::CallbackInfo& info, size_t index, const char* blocks) const;
  LayerBytes layer_bytes(const Napi::CallbackInfo& info, const char* bytes) const;
  void release();

  std::shared_ptr<Engine> engine_;       // null once closed
  std::shared_ptr<LayerEvents> events_;  // null until a step asks for them
  bool stepping_ = false;
  bool closing_ = false;
  std::vector<Napi::Promise::Deferred> waiting_;  // for the end of the step in flight, then for the close
};

Napi::Value NativeEngine::info(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const Engine& engine = this->engine();
    const ModelShape& shape = engine.shape();
    const EngineOptions& options = engine.options();
    Napi::Object out = Napi::Object::New(info.Env());
    out.Set("architecture", shape.architecture);
    out.Set("layers", shape.layers);
    out.Set("hidden", shape.hidden);
    out.Set("heads", shape.heads);
    out.Set("kvHeads", shape.kv_heads);
    out.Set("headDim", shape.head_dim);
    out.Set("vocabulary", shape.vocabulary);
    out.Set("contextLength", options.max_context);
    out.Set("blocks", options.blocks);
    out.Set("blockTokens", options.block_tokens);
    out.Set("kvDtype", kv_dtype_name(options.kv_dtype));
    out.Set("blockBytes", static_cast<double>(engine.block_bytes()));
    out.Set("layerBlockBytes", static_cast<double>(engine.layer_block_bytes()));
    out.Set("isa", instruction_set_name(engine.isa()));
    out.Set("threads", options.threads);
    out.Set("device", engine.device());
    return Napi::Value(out);
  });
}

Napi::Value NativeEngine::create_sampler(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    Engine& engine = this->engine();
    const int32_t id = engine.create_sampler(read_sampler_options(object_argument(info, 0, "SamplerOptions")),
                                             int32_argument(info, 1, "prompt"), int32_argument(info, 2, "output"));
    return Napi::Value(Napi::Number::New(info.Env(), id));
  });
}

Napi::Value NativeEngine::free_sampler(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    engine().free_sampler(static_cast<int32_t>(integer_value(argument(info, 0), "sampler", 0.0, 2147483647.0)));
    return info.Env().Undefined();
  });
}

Napi::Value NativeEngine::samplers(const Napi::CallbackInfo& info) {
  return guarded(info, [&] { return Napi::Value(Napi::Number::New(info.Env(), static_cast<double>(engine().samplers()))); });
}

Napi::Value NativeEngine::step(const Napi::CallbackInfo& info) {
  return promised(info, [&](Napi::Env env) {
    Engine& engine = this->engine();
    if (stepping_) throw std::runtime_error("step: another step is in flight");
    const Napi::Object object = object_argument(info, 0, "Batch");
    const Napi::Value on_layer = argument(info, 1);
    if (!on_layer.IsUndefined() && !on_layer.IsFunction()) throw std::runtime_error("onLayer: expected a function");
    Batch batch;
    batch.tokens = int32_field(object, "tokens");
    batch.segments = int32_field(object, "segments");
    batch.block_tables = int32_field(object, "blockTables");
    batch.outputs = int32_field(object, "outputs");
    batch.want_logits = object.Get("wantLogits").ToBoolean();
    engine.prepare(std::move(batch));
    std::shared_ptr<LayerEvents> events;
    if (on_layer.IsFunction()) {
      if (events_ == nullptr) events_ = LayerEvents::open(env);
      events_->begin(on_layer.As<Napi::Function>());
      events = events_;
    }
    auto* worker = new StepWorker(env, engine_, std::move(events), this, info.This().As<Napi::Object>());
    const Napi::Promise promise = worker->promise();
    worker->Queue();
    stepping_ = true;
    return promise;
  });
}

// (blocks, firstLayer, layers) from the argument `index` on; `blocks` is what the caller's own name for them is.
KvPlaces NativeEngine::places(const Napi::CallbackInfo& info, size_t index, const char* blocks) const {
  KvPlaces out;
  out.blocks = block_numbers(info, index, blocks, engine().options().blocks);
  const int layers = engine().shape().layers;
  out.first_layer = static_cast<int>(integer_value(argument(info, index + 1), "firstLayer", 0.0, layers - 1.0));
  out.layers = static_cast<int>(integer_value(argument(info, index + 2), "layers", 1.0, layers - out.first_layer));
  return out;
}

// (blocks, firstLayer, layers, bytes, offset, seed); `bytes` is what the caller's own name for them is.
LayerBytes NativeEngine::layer_bytes(const Napi::CallbackInfo& info, const char* bytes) const {
  LayerBytes out;
  static_cast<KvPlaces&>(out) = places(info, 0, "blocks");
  Napi::Uint8Array array = bytes_argument(info, 3, bytes);
  const size_t length = array.ByteLength();
  const size_t offset = static_cast<size_t>(integer_value(argument(info, 4), "offset", 0.0, static_cast<double>(length)));
  const size_t needed = out.blocks.size() * out.layers * engine().layer_block_bytes();
  if (needed > length - offset) {
    throw std::runtime_error(std::string(bytes) + ": expected at least " + std::to_string(needed) + " bytes from offset " +
                             std::to_string(offset) + " on, found " + std::to_string(length - offset));
  }
  out.at = array.Data() + offset;
  out.seed = uint32_argument(info, 5, "seed");
  return out;
}

Napi::Value NativeEngine::export_layers(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const LayerBytes into = layer_bytes(info, "into");
    return Napi::Value(Napi::Number::New(info.Env(), engine().export_layers(into.range(), into.at, into.seed)));
  });
}

Napi::Value NativeEngine::import_layers(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const LayerBytes from = layer_bytes(info, "from");
    const uint32_t crc = uint32_argument(info, 6, "crc");
    return Napi::Value(Napi::Boolean::New(info.Env(), engine().import_layers(from.range(), from.at, from.seed) == crc));
  });
}

// (from, fromBlocks, firstLayer, layers, blocks)
Napi::Value NativeEngine::copy_layers(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const Napi::Object object = object_argument(info, 0, "from");
    if (!object.InstanceOf(info.Env().GetInstanceData<Napi::FunctionReference>()->Value())) {
      throw std::runtime_error("from: expected an engine of the same addon");
    }
    const NativeEngine& from = *Unwrap(object);
    if (!engine().blocks_hold_the_same(from.engine())) throw std::runtime_error("from: its blocks hold something else");
    const KvPlaces source = from.places(info, 1, "fromBlocks");
    const std::vector<int32_t> goal = block_numbers(info, 4, "blocks", engine().options().blocks);
    if (goal.size() != source.blocks.size()) {
      throw std::runtime_error("blocks: expected " + std::to_string(source.blocks.size()) + ", found " + std::to_string(goal.size()));
    }
    engine().copy_layers(from.engine(), source.range(), goal.data());
    return info.Env().Undefined();
  });
}

Napi::Value NativeEngine::copy_block(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const double last = engine().options().blocks - 1.0;
    const int from = static_cast<int>(integer_value(argument(info, 0), "from", 0.0, last));
    const int to = static_cast<int>(integer_value(argument(info, 1), "to", 0.0, last));
    engine().copy_block(from, to);
    return info.Env().Undefined();
  });
}

Napi::Value NativeEngine::close(const Napi::CallbackInfo& info) {
  return promised(info, [&](Napi::Env env) {
    const auto deferred = Napi::Promise::Deferred::New(env);
    if (engine_ == nullptr) {  // closed, or about to be
      deferred.Resolve(env.Undefined());
    } else {
      closing_ = true;
      waiting_.push_back(deferred);
      if (!stepping_) release();
    }
    return deferred.Promise();
  });
}

void NativeEngine::release() {
  if (events_ != nullptr) events_->close();
  events_ = nullptr;
  auto* worker = new CloseWorker(Env(), std::move(engine_), std::move(waiting_));
  engine_ = nullptr;
  waiting_.clear();
  worker->Queue();
}

// ---- results ----

Napi::Value int32_array(Napi::Env env, const std::vector<int32_t>& values) {
  Napi::Int32Array array = Napi::Int32Array::New(env, values.size());
  if (!values.empty()) std::memcpy(array.Data(), values.data(), values.size() * sizeof(int32_t));
  return array;
}

Napi::Value float_array(Napi::Env env, const std::vector<float>& values) {
  Napi::Float32Array array = Napi::Float32Array::New(env, values.size());
  if (!values.empty()) std::memcpy(array.Data(), values.data(), values.size() * sizeof(float));
  return array;
}

std::optional<Napi::Error> StepWorker::end_step() {
  std::optional<Napi::Error> thrown;
  if (events_ != nullptr) thrown = events_->end(Env());
  engine_.reset();
  owner_->step_ended();
  return thrown;
}

void StepWorker::OnOK() {
  if (const std::optional<Napi::Error> thrown = end_step()) return deferred_.Reject(thrown->Value());
  const Napi::Env env = Env();
  try {
    Napi::Object out = Napi::Object::New(env);
    out.Set("tokens", int32_array(env, result_.tokens));
    out.Set("logprobs", float_array(env, result_.logprobs));
    out.Set("topWidth", result_.top_width);
    out.Set("topTokens", int32_array(env, result_.top_tokens));
    out.Set("topLogprobs", float_array(env, result_.top_logprobs));
    out.Set("logits", result_.logits.empty() ? env.Undefined() : float_array(env, result_.logits));
    out.Set("computeMs", result_.compute_ms);
    deferred_.Resolve(out);
  } catch (const Napi::Error& error) {
    deferred_.Reject(error.Value());
  }
}

void StepWorker::OnError(const Napi::Error& error) {
  end_step();
  deferred_.Reject(error.Value());
}

// ---- loading ----

class LoadWorker : public Napi::AsyncWorker {
 public:
  LoadWorker(Napi::Env env, EngineOptions options)
      : Napi::AsyncWorker(env, "penstock.loadEngine"),
        deferred_(Napi::Promise::Deferred::New(env)),
        options_(std::move(options)) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

  void Execute() override {
    try {
      engine_ = open_engine(options_);
    } catch (const std::bad_alloc&) {
      SetError("loadEngine: not enough memory for blocks, maxRows and maxOutputs");
    } catch (const std::exception& error) {
      SetError(error.what());
    }
  }

  void OnOK() override {
    const Napi::Env env = Env();
    try {
      const auto* constructor = env.GetInstanceData<Napi::FunctionReference>();
      deferred_.Resolve(constructor->New({Napi::External<std::shared_ptr<Engine>>::New(env, &engine_)}));
    } catch (const Napi::Error& error) {
      deferred_.Reject(error.Value());
    }
  }

  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

 private:
  Napi::Promise::Deferred deferred_;
  EngineOptions options_;
  std::shared_ptr<Engine> engine_;
};

Napi::Value load_engine(const Napi::CallbackInfo& info) {
  return promised(info, [&](Napi::Env env) {
    auto* worker = new LoadWorker(env, read_engine_options(object_argument(info, 0, "EngineOptions")));
    const Napi::Promise promise = worker->promise();
    worker->Queue();
    return promise;
  });
}

}  // namespace

void register_engine(Napi::Env env, Napi::Object exports) {
  exports.Set("numericsVersion", Engine::kNumericsVersion);
  auto* constructor = new Napi::FunctionReference(Napi::Persistent(NativeEngine::define(env)));
  env.SetInstanceData(constructor);  // freed with the environment
  exports.Set("loadEngine", Napi::Function::New(env, load_engine, "loadEngine"));
  exports.Set("bestInstructionSet", Napi::Function::New(
                                        env,
                                        [](const Napi::CallbackInfo& info) {
                                          return Napi::String::New(info.Env(), instruction_set_name(best_instruction_set()));
                                        },
                                        "bestInstructionSet"));
}

}  // namespace penstock
