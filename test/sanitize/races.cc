// Everything of the kernels below Node, used as the addon uses it: batches are prepared on one thread and run on another, while
// the first one exports what layers are reported, imports and copies other blocks, and makes and frees samplers. Built with
// ThreadSanitizer by `npm run test:sanitize`; every check is also one of results, bit for bit.
//
//     penstock-races MODEL.gguf …      prints `ok NAME` or `FAILED NAME` for each check, and fails where one has
#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu_engine.h"
#include "layer_progress.h"

using namespace penstock;

namespace {

constexpr int kBlocks = 48;
constexpr int kBlockTokens = 16;
constexpr int kSequences = 4;
constexpr int kSequenceBlocks = 8;   // of each sequence: blocks 0 … 31
constexpr int kFirstFreeBlock = kSequences * kSequenceBlocks;
constexpr int kMaxRows = 64;
constexpr int kMaxOutputs = 8;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}

// As LayerEvents: compute threads wake another one under a lock.
class Events : public LayerProgress {
 public:
  // Waits until the layer is in the pool.
  void await(int layer) {
    std::unique_lock<std::mutex> lock(mutex_);
    woken_.wait(lock, [&] { return done() > layer; });
  }

 private:
  void changed() override {
    std::lock_guard<std::mutex> lock(mutex_);
    woken_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable woken_;
};

struct Setup {
  std::string path;
  InstructionSet isa;
  KvDtype dtype;
};

std::unique_ptr<Engine> load(const Setup& setup, int threads) {
  return std::make_unique<CpuEngine>(EngineOptions{setup.path, kBlocks, kBlockTokens, setup.dtype, threads, kMaxRows, kMaxOutputs, 0, setup.isa, 0});
}

// A seeded crowd of sequences that grow by chunks of any length; the same for every engine.
class Crowd {
 public:
  explicit Crowd(uint32_t seed) : random_(seed) {}

  // Some of the sequences, one to many rows each, within kMaxRows; the last row of each is drawn or scored.
  Batch next(int vocabulary, const std::vector<int32_t>& samplers) {
    Batch batch;
    batch.want_logits = true;
    for (int sequence = 0; sequence < kSequences; ++sequence) {
      if (below(4) == 0 && sequence + 1 < kSequences) continue;
      const int room = kMaxRows - static_cast<int>(batch.tokens.size());
      const int rows = std::min(room, below(3) == 0 ? 1 : 1 + below(33));
      if (rows == 0) break;
      if (positions_[sequence] + rows > kSequenceBlocks * kBlockTokens) positions_[sequence] = 0;
      const int first_entry = static_cast<int>(batch.block_tables.size());
      for (int block = 0; block < kSequenceBlocks; ++block) batch.block_tables.push_back(sequence * kSequenceBlocks + block);
      batch.segments.insert(batch.segments.end(), {rows, positions_[sequence], first_entry, kSequenceBlocks});
      for (int row = 0; row < rows; ++row) batch.tokens.push_back(below(vocabulary));
      const bool draws = !samplers.empty() && below(2) == 0;
      batch.outputs.insert(batch.outputs.end(), {static_cast<int32_t>(batch.tokens.size()) - 1, draws ? samplers[sequence] : -1,
                                                 draws ? -1 : below(vocabulary), below(4) - 1});
      positions_[sequence] += rows;
    }
    return batch;
  }

  int below(int bound) { return static_cast<int>(random_() % static_cast<uint32_t>(bound)); }

 private:
  std::mt19937 random_;
  int positions_[kSequences] = {};
};

std::vector<int32_t> make_samplers(Engine& engine) {
  std::vector<int32_t> ids;
  for (int i = 0; i < kSequences; ++i) {
    SamplerOptions options;
    options.temperature = i == 0 ? 0.0f : 0.8f;
    options.top_k = i == 1 ? 20 : 0;
    options.repetition_penalty = i == 2 ? 1.2f : 1.0f;
    options.seed = 7;
    options.choice = i;
    ids.push_back(engine.create_sampler(options, {1, 2, 3}, {}));
  }
  return ids;
}

// Bytes of results: equal where the results are.
std::vector<uint8_t> bytes_of(const StepResult& result) {
  std::vector<uint8_t> bytes;
  const auto add = [&](const auto& values) {
    const auto* from = reinterpret_cast<const uint8_t*>(values.data());
    bytes.insert(bytes.end(), from, from + values.size() * sizeof(values[0]));
  };
  add(result.tokens);
  add(result.logprobs);
  add(result.top_tokens);
  add(result.top_logprobs);
  add(result.logits);
  return bytes;
}

// Runs `meanwhile` on this thread while the step runs on another.
StepResult run_beside(Engine& engine, LayerProgress* progress, const std::function<void()>& meanwhile) {
  StepResult result;
  std::exception_ptr error;
  if (progress != nullptr) progress->start();
  std::thread runner([&] {
    try {
      result = engine.run(progress);
    } catch (...) {
      error = std::current_exception();
    }
  });
  std::exception_ptr here;
  try {
    meanwhile();
  } catch (...) {
    here = std::current_exception();
  }
  runner.join();
  if (here) std::rethrow_exception(here);
  if (error) std::rethrow_exception(error);
  return result;
}

std::vector<std::vector<uint8_t>> results_of(Engine& engine, int steps) {
  Crowd crowd(1);
  const std::vector<int32_t> samplers = make_samplers(engine);
  std::vector<std::vector<uint8_t>> results;
  for (int step = 0; step < steps; ++step) {
    engine.prepare(crowd.next(engine.shape().vocabulary, samplers));
    results.push_back(bytes_of(engine.run(nullptr)));
  }
  return results;
}

// Random batches of many lengths, on more threads than the machine may have cores: the same bits as on one.
void batches(const Setup& setup) {
  constexpr int kSteps = 10;
  const auto expected = results_of(*load(setup, 1), kSteps);
  for (int threads : {2, 3, 5}) expect(results_of(*load(setup, threads), kSteps) == expected, "results differ from those of one thread");
}

// Layers leave while the step computes later ones, for the wire and for another pool, and are what is there in the end.
void layer_events(const Setup& setup) {
  const auto engine = load(setup, 3);
  const auto other = load(setup, 1);
  const int layers = engine->shape().layers;
  const size_t bytes = engine->layer_block_bytes();
  Crowd crowd(2);
  Events events;
  for (int step = 0; step < 12; ++step) {
    const Batch batch = crowd.next(engine->shape().vocabulary, {});
    const std::vector<int32_t> blocks = batch.block_tables;
    engine->prepare(batch);
    std::vector<std::vector<uint8_t>> early(layers, std::vector<uint8_t>(blocks.size() * bytes));
    std::vector<uint32_t> crcs(layers);
    run_beside(*engine, &events, [&] {
      for (int layer = 0; layer < layers; ++layer) {
        events.await(layer);
        crcs[layer] = engine->export_layers({blocks.data(), blocks.size(), layer, 1}, early[layer].data(), 0);
        other->copy_layers(*engine, {blocks.data(), blocks.size(), layer, 1}, blocks.data());
      }
    });
    expect(events.done() == layers, "not every layer was reported");
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<uint8_t> late(early[layer].size());
      expect(engine->export_layers({blocks.data(), blocks.size(), layer, 1}, late.data(), 0) == crcs[layer], "a checksum changed after the layer was reported");
      expect(late == early[layer], "a layer changed after it was reported");
      expect(other->export_layers({blocks.data(), blocks.size(), layer, 1}, late.data(), 0) == crcs[layer], "a layer was copied before it was there");
    }
  }
}

// KV of one engine into blocks of another that its running step does not use, and copies among those: neither is disturbed.
void transfers(const Setup& setup) {
  const auto from = load(setup, 2);
  results_of(*from, 3);
  const int layers = from->shape().layers;
  const size_t bytes = from->layer_block_bytes();
  const std::vector<int32_t> source = {0, 1, 8, 9};
  const std::vector<int32_t> target = {kFirstFreeBlock, kFirstFreeBlock + 3, kFirstFreeBlock + 1, kFirstFreeBlock + 5};
  std::vector<uint8_t> wire(source.size() * bytes * layers + 1);  // at an odd address, as chunks may be
  const uint32_t crc = from->export_layers({source.data(), source.size(), 0, layers}, wire.data() + 1, 0);

  constexpr int kSteps = 6;
  const auto expected = results_of(*load(setup, 1), kSteps);
  const auto engine = load(setup, 3);
  Crowd crowd(1);
  const std::vector<int32_t> samplers = make_samplers(*engine);
  for (int step = 0; step < kSteps; ++step) {
    engine->prepare(crowd.next(engine->shape().vocabulary, samplers));
    const StepResult result = run_beside(*engine, nullptr, [&] {
      uint32_t got = 0;
      for (int layer = 0; layer < layers; ++layer) {
        got = engine->import_layers({target.data(), target.size(), layer, 1}, wire.data() + 1 + layer * source.size() * bytes, got);
      }
      expect(got == crc, "the checksum of what was imported differs");
      engine->copy_layers(*from, {source.data(), source.size(), 0, layers}, target.data());
      engine->copy_block(target[0], kFirstFreeBlock + 8);
      std::vector<uint8_t> back(source.size() * bytes * layers);
      const std::vector<int32_t> copied = {kFirstFreeBlock + 8, target[1], target[2], target[3]};
      engine->export_layers({copied.data(), copied.size(), 0, layers}, back.data(), 0);
      expect(std::memcmp(back.data(), wire.data() + 1, back.size()) == 0, "what was imported does not come out again");
    });
    expect(bytes_of(result) == expected[step], "a step was disturbed");
  }
}

// A client that goes away: its sampler is freed while the step that draws with it runs, and others come.
void cancels(const Setup& setup) {
  const auto engine = load(setup, 3);
  Crowd crowd(3);
  for (int step = 0; step < 12; ++step) {
    const std::vector<int32_t> samplers = make_samplers(*engine);
    engine->prepare(crowd.next(engine->shape().vocabulary, samplers));
    std::vector<int32_t> others;
    run_beside(*engine, nullptr, [&] {
      for (int32_t id : samplers) engine->free_sampler(id);
      others = make_samplers(*engine);
    });
    for (int32_t id : others) engine->free_sampler(id);
    expect(engine->samplers() == 0, "a sampler was left");
  }
}

// A step that fails on its compute threads fails alone.
void failures(const Setup& setup) {
  const auto engine = load(setup, 3);
  const std::vector<int32_t> block = {0};
  const std::vector<uint8_t> nan(engine->block_bytes(), 0xff);
  std::vector<uint8_t> good(engine->block_bytes());
  Batch batch;
  batch.tokens = {5, 6};
  batch.segments = {2, 3, 0, 1};
  batch.block_tables = {0};
  batch.outputs = {1, -1, 7, 0};
  engine->export_layers({block.data(), 1, 0, engine->shape().layers}, good.data(), 0);
  for (int round = 0; round < 5; ++round) {
    engine->import_layers({block.data(), 1, 0, engine->shape().layers}, nan.data(), 0);
    engine->prepare(batch);
    bool failed = false;
    try {
      run_beside(*engine, nullptr, [] {});
    } catch (const std::runtime_error&) {
      failed = true;
    }
    expect(failed, "logits that are no numbers were taken");
    engine->import_layers({block.data(), 1, 0, engine->shape().layers}, good.data(), 0);
    engine->prepare(batch);
    expect(run_beside(*engine, nullptr, [] {}).tokens == std::vector<int32_t>{7}, "the next step fails too");
  }
}

// Pools come and go beside each other, right after a step or without one.
void lives(const Setup& setup) {
  std::vector<std::thread> owners;
  for (int owner = 0; owner < 3; ++owner) {
    owners.emplace_back([&, owner] {
      for (int life = 0; life < 6; ++life) {
        const auto engine = load(setup, 2 + owner);
        if (life % 3 != 0) results_of(*engine, life % 3);
      }
    });
  }
  for (std::thread& owner : owners) owner.join();
}

struct Check {
  const char* name;
  void (*run)(const Setup& setup);
};

}  // namespace

int main(int count, char** arguments) {
  const Check checks[] = {{"batches", batches}, {"layer events", layer_events}, {"transfers", transfers},
                          {"cancels", cancels}, {"failures", failures},         {"lives", lives}};
  const InstructionSet sets[] = {InstructionSet::Reference, InstructionSet::Avx2, InstructionSet::Avx512};
  bool failed = count < 2;
  const KvDtype dtypes[] = {KvDtype::F16, KvDtype::Int8, KvDtype::Int4};
  for (int i = 1; i < count; ++i) {
    // One dtype a model, so that all are seen and the run stays short.
    const KvDtype dtype = dtypes[(i - 1) % 3];
    std::vector<std::vector<uint8_t>> expected;
    for (InstructionSet isa : sets) {
      if (isa > best_instruction_set()) continue;
      const Setup setup = {arguments[i], isa, dtype};
      const std::string name = std::string(arguments[i]) + ", KV in " + kv_dtype_name(dtype) + ", " + instruction_set_name(isa) + ": ";
      const auto check = [&](const char* what, const std::function<void()>& run) {
        std::string message;
        try {
          run();
        } catch (const std::exception& error) {
          message = error.what();
        }
        failed |= !message.empty();
        std::printf("%s %s%s%s%s\n", message.empty() ? "ok" : "FAILED", name.c_str(), what, message.empty() ? "" : ": ", message.c_str());
        std::fflush(stdout);
      };
      for (const Check& each : checks) check(each.name, [&] { each.run(setup); });
      check("the same bits as the reference", [&] {
        const auto results = results_of(*load(setup, 2), 6);
        if (expected.empty()) expected = results;
        expect(results == expected, "results differ");
      });
    }
  }
  return failed ? 1 : 0;
}
