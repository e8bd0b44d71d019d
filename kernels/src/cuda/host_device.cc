#include "host_device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace penstock::cuda {

namespace {

constexpr size_t kAlignment = 256;
// Limits of compute capability 8.0 and later, and the shared memory of 8.9, which has the least.
constexpr unsigned kMostThreads = 1024;
constexpr unsigned kMostGridX = 0x7fffffffu;
constexpr unsigned kMostGridYZ = 65535;
constexpr size_t kMostSharedBytes = 99 << 10;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

uint64_t digest(const void* data, size_t bytes) {  // FNV-1a over words
  const auto* at = static_cast<const unsigned char*>(data);
  uint64_t hash = 14695981039346656037u;
  for (size_t i = 0; i < bytes; i += sizeof hash) {
    uint64_t word = 0;
    std::memcpy(&word, at + i, std::min(sizeof word, bytes - i));
    hash = (hash ^ word) * 1099511628211u;
  }
  return hash;
}

}  // namespace

HostDevice::HostDevice(const HostDeviceOptions& options) : options_(options), random_(options.seed) {
  facts_.number = options.number;
  facts_.name = "cuda:" + std::to_string(options.number) + " (a device of the host's)";
  facts_.compute_major = 8;
  facts_.compute_minor = 9;
  facts_.processors = 4;
  facts_.shared_bytes = kMostSharedBytes;
  facts_.total_bytes = facts_.free_bytes = options.total_bytes;
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  all_devices_.insert(this);
}

HostDevice::~HostDevice() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  all_devices_.erase(this);
  for (FakeGraph* graph : graphs_) delete graph;
  for (FakeEvent* event : events_) delete event;
  for (FakeStream* stream : streams_) delete stream;
  for (Allocations* all : {&device_, &pinned_}) {
    for (const auto& [at, allocation] : *all) munmap(allocation.mapping, allocation.mapped);
  }
}

size_t HostDevice::live() const {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  return device_.size() + pinned_.size() + streams_.size() + events_.size() + graphs_.size();
}

void HostDevice::fail(const std::string& message) const { throw std::runtime_error(facts_.name + ": " + message); }

// Every call of the driver's begins with this.
void HostDevice::enter(const char* call) {
  if (calls_++ == options_.fails_at) fail(std::string(call) + ": an error that a test has ordered");
}

// ---- memory ----

void* HostDevice::map(Allocations& allocations, size_t bytes) {
  const size_t page = page_bytes();
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t mapped = (rounded + page - 1) / page * page + page;
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) fail("no memory for " + std::to_string(bytes) + " bytes");
  char* memory = static_cast<char*>(mapping) + mapped - page - rounded;
  mprotect(static_cast<char*>(mapping) + mapped - page, page, PROT_NONE);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory + bytes, rounded - bytes);
#endif
  allocations.emplace(reinterpret_cast<uintptr_t>(memory), Allocation{bytes, mapped, mapping});
  return memory;
}

void HostDevice::unmap(Allocations& allocations, void* memory, const char* what) {
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(memory));
  if (found == allocations.end()) fail(std::string(what) + ": not the beginning of an allocation");
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(found->second.mapping, found->second.mapped);
#endif
  munmap(found->second.mapping, found->second.mapped);
  allocations.erase(found);
}

void* HostDevice::allocate(size_t bytes, const char* what) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("allocate");
  refuse_in_capture("allocate");
  if (sealed_) fail(std::string("allocate ") + what + ": everything was to be allocated at load");
  if (bytes > options_.total_bytes - used_) {
    fail(std::string(what) + ": needs " + std::to_string(bytes) + " bytes, and " + std::to_string(options_.total_bytes - used_) + " of " +
         std::to_string(options_.total_bytes) + " are free");
  }
  void* memory = map(device_, bytes);
  used_ += bytes;
  // As zeros would hide what is read before it is written. Not where it would commit gigabytes that nobody may need.
  std::memset(memory, 0xff, std::min(bytes, size_t{256} << 20));
  const Allocation& allocation = device_.at(reinterpret_cast<uintptr_t>(memory));
  mprotect(allocation.mapping, allocation.mapped, PROT_NONE);
  return memory;
}

// As cudaFree and cudaFreeHost do, before they free anything.
void HostDevice::finish_all() {
  run_until("free", [&] {
    for (const FakeStream* stream : streams_) {
      if (!stream->operations.empty()) return false;
    }
    return true;
  });
}

void HostDevice::free(void* memory) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  refuse_in_capture("free");
  finish_all();
  const auto found = device_.find(reinterpret_cast<uintptr_t>(memory));
  if (found != device_.end()) used_ -= found->second.bytes;
  unmap(device_, memory, "free");
}

void* HostDevice::allocate_pinned(size_t bytes, const char* what) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("allocate_pinned");
  refuse_in_capture("allocate_pinned");
  if (sealed_) fail(std::string("allocate ") + what + ": everything was to be allocated at load");
  return map(pinned_, bytes);
}

void HostDevice::free_pinned(void* memory) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  refuse_in_capture("free pinned memory");
  finish_all();
  unmap(pinned_, memory, "free pinned memory");
}

void HostDevice::forbid([[maybe_unused]] void* device_memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(device_memory, bytes);
#endif
}

void HostDevice::check_range(const Allocations& allocations, const void* at, size_t bytes, const char* what) const {
  const auto address = reinterpret_cast<uintptr_t>(at);
  auto found = allocations.upper_bound(address);
  if (found == allocations.begin()) fail(std::string(what) + ": an address that is not allocated");
  --found;
  if (address - found->first > found->second.bytes || bytes > found->second.bytes - (address - found->first)) {
    fail(std::string(what) + ": bytes " + std::to_string(address - found->first) + " … " +
         std::to_string(address - found->first + bytes) + " of an allocation of " + std::to_string(found->second.bytes));
  }
}

void HostDevice::open_memory(bool open) {
  const size_t page = page_bytes();
  for (const HostDevice* device : all_devices_) {
    if (device->facts_.number != facts_.number) continue;
    for (const auto& [at, allocation] : device->device_) {
      mprotect(allocation.mapping, allocation.mapped - page, open ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
  }
}

// ---- streams and events ----

StreamHandle HostDevice::create_stream() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("create_stream");
  return *streams_.insert(new FakeStream).first;
}

void HostDevice::destroy_stream(StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  FakeStream& stream = stream_of(handle);
  run_until("destroy_stream", [&] { return stream.operations.empty(); });
  streams_.erase(&stream);
  delete &stream;
}

HostDevice::FakeStream& HostDevice::stream_of(StreamHandle handle) {
  auto* stream = static_cast<FakeStream*>(handle);
  if (streams_.count(stream) == 0) fail("not a stream, or one that is destroyed");
  return *stream;
}

HostDevice::FakeEvent& HostDevice::event_of(EventHandle handle) {
  auto* event = static_cast<FakeEvent*>(handle);
  if (events_.count(event) == 0) fail("not an event, or one that is destroyed");
  return *event;
}

void HostDevice::refuse_in_capture(const char* call) const {
  for (const FakeStream* stream : streams_) {
    if (stream->capturing) fail(std::string(call) + " while a graph is captured");
  }
}

void HostDevice::push(FakeStream& stream, Operation operation) {
  if (stream.capturing) fail("events have no place in a graph of one stream");
  stream.operations.push_back(std::move(operation));
}

void HostDevice::push_work(FakeStream& stream, std::function<void()> work) {
  if (stream.capturing) {
    stream.captured.push_back(std::move(work));
  } else {
    stream.operations.push_back({std::move(work)});
  }
}

bool HostDevice::can_run(const FakeStream& stream) const {
  if (stream.operations.empty()) return false;
  const Operation& next = stream.operations.front();
  return next.waits_for == nullptr || next.waits_for->reached >= next.count;
}

void HostDevice::run_one(FakeStream& stream) {
  Operation operation = std::move(stream.operations.front());
  stream.operations.pop_front();
  if (operation.records != nullptr) operation.records->reached = operation.count;
  if (operation.run) operation.run();
}

// Runs what can run, any stream first, until `done`. Only meanwhile is there device memory.
template <class Done>
void HostDevice::run_until(const char* what, Done done) {
  if (done()) return;
  open_memory(true);
  try {
    while (!done()) {
      std::vector<FakeStream*> ready;
      for (FakeStream* stream : streams_) {
        if (can_run(*stream)) ready.push_back(stream);
      }
      if (ready.empty()) fail(std::string(what) + ": waits for what nobody will do");
      run_one(*ready[random_() % ready.size()]);
    }
  } catch (...) {
    open_memory(false);
    // A device that has failed does nothing more.
    for (FakeStream* stream : streams_) stream->operations.clear();
    throw;
  }
  open_memory(false);
}

void HostDevice::synchronise(StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("synchronise");
  refuse_in_capture("synchronise");
  FakeStream& stream = stream_of(handle);
  run_until("synchronise", [&] { return stream.operations.empty(); });
}

EventHandle HostDevice::create_event() {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("create_event");
  return *events_.insert(new FakeEvent).first;
}

void HostDevice::destroy_event(EventHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  FakeEvent& event = event_of(handle);
  // As CUDA does, it goes when no stream has to do with it any more.
  run_until("destroy_event", [&] {
    for (const FakeStream* stream : streams_) {
      for (const Operation& operation : stream->operations) {
        if (operation.waits_for == &event || operation.records == &event) return false;
      }
    }
    return true;
  });
  events_.erase(&event);
  delete &event;
}

void HostDevice::record(EventHandle handle, StreamHandle stream) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("record");
  FakeEvent& event = event_of(handle);
  push(stream_of(stream), {nullptr, nullptr, &event, ++event.recorded});
}

void HostDevice::wait(StreamHandle stream, EventHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("wait");
  FakeEvent& event = event_of(handle);
  push(stream_of(stream), {nullptr, &event, nullptr, event.recorded});
}

void HostDevice::synchronise_event(EventHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("synchronise_event");
  refuse_in_capture("synchronise_event");
  FakeEvent& event = event_of(handle);
  const uint64_t count = event.recorded;
  run_until("synchronise_event", [&] { return event.reached >= count; });
}

// ---- work ----

void HostDevice::copy_to_device(void* to, const void* from, size_t bytes, StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("copy_to_device");
  check_range(device_, to, bytes, "copy to the device, its goal");
  check_range(pinned_, from, bytes, "copy to the device, its source");
  FakeStream& stream = stream_of(handle);
  // A graph copies whatever is there when it runs.
  const bool fixed = !stream.capturing;
  const uint64_t source = fixed ? digest(from, bytes) : 0;
  push_work(stream, [=, this] {
    if (fixed && digest(from, bytes) != source) fail("copy to the device: its source was changed before it ran");
    std::memcpy(to, from, bytes);
  });
}

void HostDevice::copy_to_host(void* to, const void* from, size_t bytes, StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("copy_to_host");
  check_range(pinned_, to, bytes, "copy to the host, its goal");
  check_range(device_, from, bytes, "copy to the host, its source");
  FakeStream& stream = stream_of(handle);
  if (!stream.capturing) std::memset(to, 0xa5, bytes);
  push_work(stream, [=] { std::memcpy(to, from, bytes); });
}

void HostDevice::copy_from_peer(void* to, Device& other, const void* from, size_t bytes, StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("copy_from_peer");
  auto& peer = dynamic_cast<HostDevice&>(other);
  if (peer.facts_.number == facts_.number) fail("copy from a peer: it is the same GPU");
  check_range(device_, to, bytes, "copy from a peer, its goal");
  peer.check_range(peer.device_, from, bytes, "copy from a peer, its source");
  FakeStream& stream = stream_of(handle);
  if (stream.capturing) fail("copies from a peer have no place in a graph of one device");
  peer.open_memory(true);
  const uint64_t source = digest(from, bytes);
  peer.open_memory(false);
  push_work(stream, [=, this, &peer] {
    peer.open_memory(true);
    const bool same = digest(from, bytes) == source;
    std::memcpy(to, from, bytes);
    peer.open_memory(false);
    if (!same) fail("copy from a peer: its source was changed before it ran");
  });
}

void HostDevice::clear(void* memory, size_t bytes, StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("clear");
  check_range(device_, memory, bytes, "clear");
  push_work(stream_of(handle), [=] { std::memset(memory, 0, bytes); });
}

void HostDevice::launch(const Launch& launch, StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("launch");
  const std::string name = std::string("launch of ") + launch.name;
  const uint64_t threads = uint64_t{launch.threads.x} * launch.threads.y * launch.threads.z;
  if (threads == 0 || threads > kMostThreads) fail(name + ": " + std::to_string(threads) + " threads in a block");
  if (launch.grid.x > kMostGridX || launch.grid.y > kMostGridYZ || launch.grid.z > kMostGridYZ) fail(name + ": the grid is too large");
  if (launch.shared_bytes > kMostSharedBytes) fail(name + ": " + std::to_string(launch.shared_bytes) + " bytes of shared memory");
  ++launches_;
  FakeStream& stream = stream_of(handle);
  const uint32_t seed = random_();
  if (!options_.runs_kernels) return push_work(stream, [] {});
  push_work(stream, [run = launch.run, name, seed, this] {
    try {
      run(seed);
    } catch (const std::exception& error) {
      fail(name + ": " + error.what());
    }
  });
}

// ---- graphs ----

void HostDevice::begin_capture(StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("begin_capture");
  refuse_in_capture("begin_capture");
  stream_of(handle).capturing = true;
}

GraphHandle HostDevice::end_capture(StreamHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  FakeStream& stream = stream_of(handle);
  if (!stream.capturing) fail("end_capture: the stream is not captured");
  stream.capturing = false;
  auto graph = std::make_unique<FakeGraph>(FakeGraph{std::move(stream.captured)});
  stream.captured.clear();
  enter("end_capture");
  return *graphs_.insert(graph.release()).first;
}

void HostDevice::launch_graph(GraphHandle handle, StreamHandle stream) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  enter("launch_graph");
  auto* graph = static_cast<FakeGraph*>(handle);
  if (graphs_.count(graph) == 0) fail("not a graph, or one that is destroyed");
  ++graph_launches_;
  for (const std::function<void()>& operation : graph->operations) push_work(stream_of(stream), operation);
}

void HostDevice::destroy_graph(GraphHandle handle) {
  std::lock_guard<std::recursive_mutex> lock(mutex_);
  auto* graph = static_cast<FakeGraph*>(handle);
  if (graphs_.erase(graph) == 0) fail("not a graph, or one that is destroyed");
  delete graph;
}

}  // namespace penstock::cuda
