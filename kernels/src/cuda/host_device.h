// A device that is not there: memory of the host, kernels through the shim, and a driver that is as unkind as the interface allows.
//
// - Streams do nothing until somebody waits for them; then operations of all streams run in an order that is drawn at random, of
//   which only streams and events are kept. What counted on anything else reads what has not come yet.
// - Device memory cannot be touched but while operations run, begins full of NaN, and ends at a page that is not there.
// - The goal of a copy to the host is spoilt until the copy has run, and its source on the way to the device must not change, nor
//   that of a copy from another device.
// - Every range is checked against what is allocated, every launch against the limits of a GPU, every handle against those that
//   live; what is left over when the device goes is an error, and so is an allocation once `seal` has been called.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <vector>

#include "device.h"

namespace penstock::cuda {

struct HostDeviceOptions {
  size_t total_bytes = size_t{4} << 30;
  uint32_t seed = 1;
  bool runs_kernels = true;
  int fails_at = -1;  // number of the call that answers with an error, from 0; -1: none does
  int number = 0;
};

class HostDevice : public Device {
 public:
  explicit HostDevice(const HostDeviceOptions& options = {});
  ~HostDevice() override;

  const DeviceFacts& facts() const override { return facts_; }
  void* allocate(size_t bytes, const char* what) override;
  void free(void* memory) override;
  void* allocate_pinned(size_t bytes, const char* what) override;
  void free_pinned(void* memory) override;
  void forbid(void* device_memory, size_t bytes) override;
  StreamHandle create_stream() override;
  void destroy_stream(StreamHandle stream) override;
  void synchronise(StreamHandle stream) override;
  EventHandle create_event() override;
  void destroy_event(EventHandle event) override;
  void record(EventHandle event, StreamHandle stream) override;
  void wait(StreamHandle stream, EventHandle event) override;
  void synchronise_event(EventHandle event) override;
  void copy_to_device(void* to, const void* from, size_t bytes, StreamHandle stream) override;
  void copy_to_host(void* to, const void* from, size_t bytes, StreamHandle stream) override;
  void copy_from_peer(void* to, Device& peer, const void* from, size_t bytes, StreamHandle stream) override;
  void clear(void* memory, size_t bytes, StreamHandle stream) override;
  void launch(const Launch& launch, StreamHandle stream) override;
  void begin_capture(StreamHandle stream) override;
  GraphHandle end_capture(StreamHandle stream) override;
  void launch_graph(GraphHandle graph, StreamHandle stream) override;
  void destroy_graph(GraphHandle graph) override;

  // For tests.
  void seal() { sealed_ = true; }
  int calls() const { return calls_; }
  int launches() const { return launches_; }             // put onto streams, those of graphs included
  int graph_launches() const { return graph_launches_; }
  size_t live() const;                                   // allocations, streams, events and graphs

 private:
  struct Allocation {
    size_t bytes;
    size_t mapped;
    void* mapping;
  };
  using Allocations = std::map<uintptr_t, Allocation>;
  struct FakeEvent {
    uint64_t recorded = 0;  // how often
    uint64_t reached = 0;
  };
  struct Operation {
    std::function<void()> run;
    FakeEvent* waits_for = nullptr;
    FakeEvent* records = nullptr;
    uint64_t count = 0;  // of the event's recordings
  };
  struct FakeStream {
    std::deque<Operation> operations;
    bool capturing = false;
    std::vector<std::function<void()>> captured;  // puts the operation onto the stream again
  };
  struct FakeGraph {
    std::vector<std::function<void()>> operations;
  };

  void enter(const char* call);
  [[noreturn]] void fail(const std::string& message) const;
  void* map(Allocations& allocations, size_t bytes);
  void unmap(Allocations& allocations, void* memory, const char* what);
  void check_range(const Allocations& allocations, const void* at, size_t bytes, const char* what) const;
  void refuse_in_capture(const char* call) const;
  FakeStream& stream_of(StreamHandle handle);
  FakeEvent& event_of(EventHandle handle);
  void push(FakeStream& stream, Operation operation);
  void push_work(FakeStream& stream, std::function<void()> work);
  bool can_run(const FakeStream& stream) const;
  void run_one(FakeStream& stream);
  template <class Done>
  void run_until(const char* what, Done done);
  // Of all devices of its number, which are one GPU.
  void open_memory(bool open);
  void finish_all();

  const HostDeviceOptions options_;
  DeviceFacts facts_;
  static inline std::recursive_mutex mutex_;       // calls come from several threads, and devices get at each other's memory
  static inline std::set<HostDevice*> all_devices_;
  std::mt19937 random_;
  Allocations device_, pinned_;
  size_t used_ = 0;
  std::set<FakeStream*> streams_;
  std::set<FakeEvent*> events_;
  std::set<FakeGraph*> graphs_;
  bool sealed_ = false;
  int calls_ = 0;
  int launches_ = 0;
  int graph_launches_ = 0;
};

}  // namespace penstock::cuda
