// The engine over the driver that is not there: what it allocates and when, its graphs, and that an error anywhere leaves nothing
// behind. Kernels do not run here; what they compute is test/cuda/engine.test.ts.
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "../../kernels/src/cuda/cuda_engine.h"
#include "../../kernels/src/cuda/host_device.h"
#include "check.h"

namespace penstock::cuda::test {

namespace {

// A model that main.ts writes before the tests run; see tiny-model.ts.
EngineOptions options() {
  const char* path = std::getenv("PENSTOCK_TEST_MODEL");
  expect(path != nullptr, "PENSTOCK_TEST_MODEL names a model");
  return {path, 24, 16, KvDtype::F16, 1, 64, 32, 128, InstructionSet::Avx512, 0};
}

struct Rig {
  explicit Rig(HostDeviceOptions of = {.total_bytes = size_t{256} << 20, .seed = 1, .runs_kernels = false}) {
    auto made = std::make_unique<HostDevice>(of);
    device = made.get();
    engine = std::make_unique<CudaEngine>(options(), std::move(made));
  }
  HostDevice* device;
  std::unique_ptr<CudaEngine> engine;
};

// One row of each of so many sequences, all drawn.
Batch decode_batch(CudaEngine& engine, int rows, int position) {
  Batch batch;
  for (int row = 0; row < rows; ++row) {
    batch.tokens.push_back(row);
    batch.segments.insert(batch.segments.end(), {1, position, row, 1});
    batch.block_tables.push_back(row);
    batch.outputs.insert(batch.outputs.end(), {row, engine.create_sampler({}, {1, 2}, {}), -1, -1});
  }
  return batch;
}

Batch prefill_batch(int rows) {
  Batch batch;
  for (int row = 0; row < rows; ++row) batch.tokens.push_back(row);
  batch.segments = {rows, 0, 0, 4};
  batch.block_tables = {3, 1, 0, 2};
  return batch;
}

void run(CudaEngine& engine, Batch batch) {
  engine.prepare(std::move(batch));
  engine.run(nullptr);
}

struct Progress : LayerProgress {
  int changes = 0;
  void changed() override { ++changes; }
};

Add graphs("the engine: decode of 1 … 32 rows is a graph of the next power of two, everything else is launched", [] {
  Rig rig;
  // No kernel runs, so the device's draws are whatever is there; 0xff bytes are "not drawn" and the host draws from NaN.
  for (const int rows : {1, 3, 24}) {
    Batch batch = decode_batch(*rig.engine, rows, 5);
    for (int row = 0; row < rows; ++row) batch.outputs[4 * row + 1] = -1;  // computed, and nothing drawn
    const int before = rig.device->graph_launches();
    const int launches = rig.device->launches();
    run(*rig.engine, batch);
    expect(rig.device->graph_launches() == before + 1 && rig.device->launches() == launches, std::to_string(rows) + " rows are one graph");
  }
  const int before = rig.device->graph_launches();
  run(*rig.engine, prefill_batch(40));
  expect(rig.device->graph_launches() == before, "a chunk of a prompt is none");
});

Add layers("the engine: every layer is reported, in order, while later ones may be under way", [] {
  Rig rig;
  Progress progress;
  rig.engine->prepare(prefill_batch(40));
  progress.start();
  rig.engine->run(&progress);
  expect(progress.done() == rig.engine->shape().layers && progress.changes == progress.done(), "each layer is reported once");
});

Add no_allocation("the engine: after it has loaded nothing is allocated", [] {
  Rig rig;
  rig.device->seal();
  for (int i = 0; i < 3; ++i) run(*rig.engine, prefill_batch(30 + i));
  std::vector<uint8_t> bytes(rig.engine->block_bytes() * 2);
  const int32_t blocks[] = {1, 7};
  rig.engine->export_layers({blocks, 2, 0, rig.engine->shape().layers}, bytes.data(), 0);
  rig.engine->import_layers({blocks, 2, 0, rig.engine->shape().layers}, bytes.data(), 0);
  rig.engine->copy_block(1, 2);
  for (const int number : {0, 1}) {
    Rig other({.total_bytes = size_t{256} << 20, .seed = 1, .runs_kernels = false, .number = number});
    other.device->seal();
    other.engine->copy_layers(*rig.engine, {blocks, 2, 0, rig.engine->shape().layers}, blocks);
  }
});

Add too_little("the engine: too little memory says what is needed, part by part, and what is free", [] {
  expect_error("step arena", [] { Rig rig({.total_bytes = 1 << 20, .seed = 1, .runs_kernels = false}); });
  expect_error("are free", [] { Rig rig({.total_bytes = 1 << 20, .seed = 1, .runs_kernels = false}); });
});

// Keeps the device when its engine goes, to see what is left.
class Borrowed : public Device {
 public:
  explicit Borrowed(HostDevice& device) : d(device) {}
  const DeviceFacts& facts() const override { return d.facts(); }
  void* allocate(size_t bytes, const char* what) override { return d.allocate(bytes, what); }
  void free(void* memory) override { d.free(memory); }
  void* allocate_pinned(size_t bytes, const char* what) override { return d.allocate_pinned(bytes, what); }
  void free_pinned(void* memory) override { d.free_pinned(memory); }
  void forbid(void* memory, size_t bytes) override { d.forbid(memory, bytes); }
  StreamHandle create_stream() override { return d.create_stream(); }
  void destroy_stream(StreamHandle stream) override { d.destroy_stream(stream); }
  void synchronise(StreamHandle stream) override { d.synchronise(stream); }
  EventHandle create_event() override { return d.create_event(); }
  void destroy_event(EventHandle event) override { d.destroy_event(event); }
  void record(EventHandle event, StreamHandle stream) override { d.record(event, stream); }
  void wait(StreamHandle stream, EventHandle event) override { d.wait(stream, event); }
  void synchronise_event(EventHandle event) override { d.synchronise_event(event); }
  void copy_to_device(void* to, const void* from, size_t bytes, StreamHandle stream) override { d.copy_to_device(to, from, bytes, stream); }
  void copy_to_host(void* to, const void* from, size_t bytes, StreamHandle stream) override { d.copy_to_host(to, from, bytes, stream); }
  void copy_from_peer(void* to, Device& peer, const void* from, size_t bytes, StreamHandle stream) override {
    d.copy_from_peer(to, dynamic_cast<Borrowed&>(peer).d, from, bytes, stream);
  }
  void clear(void* memory, size_t bytes, StreamHandle stream) override { d.clear(memory, bytes, stream); }
  void launch(const Launch& launch, StreamHandle stream) override { d.launch(launch, stream); }
  void begin_capture(StreamHandle stream) override { d.begin_capture(stream); }
  GraphHandle end_capture(StreamHandle stream) override { return d.end_capture(stream); }
  void launch_graph(GraphHandle graph, StreamHandle stream) override { d.launch_graph(graph, stream); }
  void destroy_graph(GraphHandle graph) override { d.destroy_graph(graph); }

 private:
  HostDevice& d;
};

// Loads, steps, exports, takes KV of another and goes; how many calls of the driver that took.
int live_through(int fails_at, bool* failed) {
  HostDevice device({.total_bytes = size_t{256} << 20, .seed = 3, .runs_kernels = false, .fails_at = fails_at});
  HostDevice peer({.total_bytes = size_t{256} << 20, .seed = 3, .runs_kernels = false, .number = 1});
  CudaEngine other(options(), std::make_unique<Borrowed>(peer));
  *failed = false;
  try {
    CudaEngine engine(options(), std::make_unique<Borrowed>(device));
    run(engine, prefill_batch(20));
    std::vector<uint8_t> bytes(engine.block_bytes());
    const int32_t blocks[] = {1};
    engine.export_layers({blocks, 1, 0, engine.shape().layers}, bytes.data(), 0);
    engine.import_layers({blocks, 1, 0, engine.shape().layers}, bytes.data(), 0);
    engine.copy_block(1, 2);
    engine.copy_layers(other, {blocks, 1, 0, engine.shape().layers}, blocks);
  } catch (const std::exception& error) {
    *failed = true;
    expect(std::string(error.what()).find("cuda:0 (a device of the host's)") == 0, std::string("the error names the device: ") + error.what());
  }
  expect(device.live() == 0, "call " + std::to_string(fails_at) + " leaves " + std::to_string(device.live()) + " things behind");
  return device.calls();
}

Add errors("the engine: an error in any call of the driver is thrown with the device's name, and leaves nothing behind", [] {
  bool failed;
  const int calls = live_through(-1, &failed);
  expect(!failed, "nothing fails by itself");
  for (int call = 0; call < calls; call += call < 60 ? 1 : 7) {
    live_through(call, &failed);
    expect(failed, "call " + std::to_string(call) + " of " + std::to_string(calls) + " fails");
  }
});

}  // namespace

}  // namespace penstock::cuda::test
