#include "device_weights.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>

#include "packed_weights.h"

namespace penstock::cuda {

namespace {

constexpr size_t kStagingBytes = size_t{8} << 20;

void take(Arena& arena, const Matrix& from, DeviceMatrix& matrix) {
  matrix = describe_for_device(from);
  arena.take(matrix.levels, matrix.level_bytes());
  arena.take(matrix.scales, matrix.scale_bytes() / sizeof(uint16_t));
}

bool tied(const Model& model) { return model.output().data == model.embedding().data; }

}  // namespace

// Bytes on their way to the device through two pinned buffers: one is filled while the other is copied.
class DeviceWeights::Upload {
 public:
  Upload(Device& device, size_t bytes) : device_(device), stream_(device, device.create_stream()) {
    for (Slot& slot : slots_) {
      slot.pinned = PinnedMemory(device, device.allocate_pinned(bytes, "staging of weights"));
      slot.copied = Event(device, device.create_event());
    }
  }
  ~Upload() { finish_quietly(); }

  // A buffer that nothing is copied from.
  uint8_t* begin() {
    Slot& slot = slots_[next_];
    device_.synchronise_event(slot.copied.get());
    return slot.pinned.as<uint8_t>();
  }
  void copy(const void* to, size_t offset, size_t bytes) {
    if (bytes > 0) device_.copy_to_device(const_cast<void*>(to), slots_[next_].pinned.as<uint8_t>() + offset, bytes, stream_.get());
  }
  void end() {
    device_.record(slots_[next_].copied.get(), stream_.get());
    next_ = 1 - next_;
  }
  void finish() { device_.synchronise(stream_.get()); }

 private:
  struct Slot {
    PinnedMemory pinned;
    Event copied;
  };
  void finish_quietly() {
    try {
      finish();
    } catch (...) {  // what was thrown before says more
    }
  }

  Device& device_;
  Stream stream_;
  Slot slots_[2];
  int next_ = 0;
};

size_t DeviceWeights::bytes(const Model& model) {
  Arena arena;
  DeviceMatrix matrix;
  const float* norm;
  const double* frequencies;
  take(arena, model.embedding(), matrix);
  if (!tied(model)) take(arena, model.output(), matrix);
  for (const Layer& layer : model.layers()) {
    for (const Matrix* m : {&layer.query, &layer.key, &layer.value, &layer.attention_output, &layer.gate, &layer.up, &layer.down})
      take(arena, *m, matrix);
    for (int i = 0; i < 2; ++i) arena.take(norm, model.shape().hidden);
  }
  arena.take(norm, model.shape().hidden);
  arena.take(frequencies, model.frequencies().size());
  return arena.used();
}

void DeviceWeights::lay_out(const Model& model, Arena& arena) {
  take(arena, model.embedding(), embedding_);
  output_ = embedding_;
  if (!tied(model)) take(arena, model.output(), output_);
  for (const Layer& layer : model.layers()) {
    DeviceLayer& to = layers_.emplace_back();
    take(arena, layer.query, to.query);
    take(arena, layer.key, to.key);
    take(arena, layer.value, to.value);
    take(arena, layer.attention_output, to.attention_output);
    take(arena, layer.gate, to.gate);
    take(arena, layer.up, to.up);
    take(arena, layer.down, to.down);
    arena.take(to.attention_norm, model.shape().hidden);
    arena.take(to.feed_forward_norm, model.shape().hidden);
  }
  arena.take(output_norm_, model.shape().hidden);
  arena.take(frequencies_, model.frequencies().size());
}

DeviceWeights::DeviceWeights(Device& device, const Model& model, ThreadPool& pool) {
  memory_ = DeviceMemory(device, device.allocate(bytes(model), "weights"));
  Arena arena(&device, memory_.get());
  lay_out(model, arena);

  size_t largest = std::max(model.shape().hidden * sizeof(float), model.frequencies().size() * sizeof(double));
  const auto with_all = [&](auto body) {
    body(model.embedding(), embedding_);
    if (!tied(model)) body(model.output(), output_);
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& from = model.layers()[i];
      const DeviceLayer& to = layers_[i];
      body(from.query, to.query), body(from.key, to.key), body(from.value, to.value), body(from.attention_output, to.attention_output);
      body(from.gate, to.gate), body(from.up, to.up), body(from.down, to.down);
    }
  };
  with_all([&](const Matrix&, const DeviceMatrix& to) { largest = std::max(largest, panel_level_bytes(to) + panel_scale_bytes(to)); });
  const size_t staging = std::max(kStagingBytes, largest);
  Upload upload(device, staging);

  const auto send = [&](const void* from, const void* to, size_t bytes) {
    if (bytes == 0) return;
    std::memcpy(upload.begin(), from, bytes);
    upload.copy(to, 0, bytes);
    upload.end();
  };
  with_all([&](const Matrix& from, const DeviceMatrix& to) {
    const size_t level_bytes = panel_level_bytes(to);
    const size_t scale_bytes = panel_scale_bytes(to);
    const int together = std::max(1, static_cast<int>(staging / (level_bytes + scale_bytes)));
    for (int first = 0; first < to.panels; first += together) {
      const int count = std::min(together, to.panels - first);
      uint8_t* levels = upload.begin();
      uint8_t* scales = levels + count * level_bytes;
      std::memset(levels, 0, count * (level_bytes + scale_bytes));
      std::exception_ptr error;
      std::mutex error_mutex;
      pool.run([&](int thread) {
        pool.for_each(thread, count, [&](int i) {
          try {
            repack_panel(from, first + i, to, levels + i * level_bytes, scales + i * scale_bytes);
          } catch (...) {
            std::lock_guard<std::mutex> lock(error_mutex);
            error = std::current_exception();
          }
        });
      });
      if (error) std::rethrow_exception(error);
      upload.copy(to.levels + first * level_bytes, 0, count * level_bytes);
      upload.copy(to.scales + first * scale_bytes / sizeof(uint16_t), count * level_bytes, count * scale_bytes);
      upload.end();
    }
  });
  const size_t norm_bytes = model.shape().hidden * sizeof(float);
  for (size_t i = 0; i < layers_.size(); ++i) {
    send(model.layers()[i].attention_norm, layers_[i].attention_norm, norm_bytes);
    send(model.layers()[i].feed_forward_norm, layers_[i].feed_forward_norm, norm_bytes);
  }
  send(model.output_norm(), output_norm_, norm_bytes);
  send(model.frequencies().data(), frequencies_, model.frequencies().size() * sizeof(double));
  upload.finish();
}

}  // namespace penstock::cuda
