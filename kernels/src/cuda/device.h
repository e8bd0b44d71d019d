// One GPU as the engine sees it: memory, streams, events, graphs. Two of them exist: cuda_device.cc on the CUDA runtime, and
// host_device.cc, which runs kernels through the shim and is as unkind about order and bounds as the interface allows.
//
// Operations on a stream happen in order, later, and at the same time as those of other streams; `synchronise` and events say when.
// Everything throws std::runtime_error that begins with the device's name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace penstock::cuda {

struct DeviceFacts {
  int number = 0;    // Devices of one number are one GPU, and each has the other's memory
  std::string name;  // as "cuda:0 (NVIDIA H100 80GB HBM3)"
  int compute_major = 0;
  int compute_minor = 0;
  int processors = 0;        // streaming multiprocessors
  size_t shared_bytes = 0;   // most that a block can ask for
  size_t total_bytes = 0;
  size_t free_bytes = 0;     // when the device was opened
  double bytes_per_s = 0.0;  // of its memory, by its clock and width; 0 where the driver does not tell
};

struct Size3 {
  unsigned x = 1, y = 1, z = 1;
};

// One kernel launch. `function` and `arguments` are for the CUDA runtime, `run` is for the shim: it runs the whole grid.
struct Launch {
  const char* name;
  Size3 grid;
  Size3 threads;
  size_t shared_bytes;
  const void* function;
  void** arguments;
  std::function<void(uint32_t seed)> run;
};

using StreamHandle = void*;
using EventHandle = void*;
using GraphHandle = void*;

class Device {
 public:
  virtual ~Device() = default;
  virtual const DeviceFacts& facts() const = 0;

  // Of device memory, aligned to 256 bytes. `what` names it in the error where there is too little.
  virtual void* allocate(size_t bytes, const char* what) = 0;
  virtual void free(void* memory) = 0;
  // Host memory that copies may go to and come from while the host does something else.
  virtual void* allocate_pinned(size_t bytes, const char* what) = 0;
  virtual void free_pinned(void* memory) = 0;
  // Nothing has to be there: the shim reports whoever touches it.
  virtual void forbid(void* device_memory, size_t bytes) = 0;

  virtual StreamHandle create_stream() = 0;
  virtual void destroy_stream(StreamHandle stream) = 0;
  virtual void synchronise(StreamHandle stream) = 0;

  virtual EventHandle create_event() = 0;
  virtual void destroy_event(EventHandle event) = 0;
  virtual void record(EventHandle event, StreamHandle stream) = 0;
  // `stream` goes on only after what `event` was last recorded behind.
  virtual void wait(StreamHandle stream, EventHandle event) = 0;
  virtual void synchronise_event(EventHandle event) = 0;

  // The host's side is pinned memory.
  virtual void copy_to_device(void* to, const void* from, size_t bytes, StreamHandle stream) = 0;
  virtual void copy_to_host(void* to, const void* from, size_t bytes, StreamHandle stream) = 0;
  // From the memory of a GPU of another number, on a stream of this one; what is there has to be there already.
  virtual void copy_from_peer(void* to, Device& peer, const void* from, size_t bytes, StreamHandle stream) = 0;
  virtual void clear(void* memory, size_t bytes, StreamHandle stream) = 0;
  virtual void launch(const Launch& launch, StreamHandle stream) = 0;

  // What is put onto the stream between these two is not done but becomes a graph, with the addresses and numbers that it had.
  virtual void begin_capture(StreamHandle stream) = 0;
  virtual GraphHandle end_capture(StreamHandle stream) = 0;
  virtual void launch_graph(GraphHandle graph, StreamHandle stream) = 0;
  virtual void destroy_graph(GraphHandle graph) = 0;
};

// Throws where there is no driver, no such device, one too old or a driver too old: what was found, and what is needed.
std::unique_ptr<Device> open_device(int number);

// ---- owners ----

template <void (Device::*release)(void*)>
class Owned {
 public:
  Owned() = default;
  Owned(Device& device, void* handle) : device_(&device), handle_(handle) {}
  Owned(Owned&& other) noexcept : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ == nullptr) return;
    try {
      (device_->*release)(handle_);
    } catch (...) {  // the device is lost, and its memory with it
    }
  }
  explicit operator bool() const { return handle_ != nullptr; }
  void* get() const { return handle_; }

  template <class T>
  T* as() const {
    return static_cast<T*>(handle_);
  }

 private:
  Device* device_ = nullptr;
  void* handle_ = nullptr;
};

using DeviceMemory = Owned<&Device::free>;
using PinnedMemory = Owned<&Device::free_pinned>;
using Stream = Owned<&Device::destroy_stream>;
using Event = Owned<&Device::destroy_event>;
using Graph = Owned<&Device::destroy_graph>;

}  // namespace penstock::cuda
