// The device of the host's, which stands in for a driver: it keeps order, and reports what no GPU would forgive.
#include <cstring>

#include "../../kernels/src/cuda/host_device.h"
#include "check.h"

namespace penstock::cuda::test {

namespace {

struct Rig {
  explicit Rig(HostDeviceOptions options = {.total_bytes = 1 << 20}) : device(options) {}
  HostDevice device;
  DeviceMemory memory{device, device.allocate(4096, "memory")};
  PinnedMemory pinned{device, device.allocate_pinned(4096, "pinned")};
  Stream stream{device, device.create_stream()};
  Stream other{device, device.create_stream()};
  Event event{device, device.create_event()};
  uint8_t* at(size_t offset) { return memory.as<uint8_t>() + offset; }
  uint8_t* host(size_t offset) { return pinned.as<uint8_t>() + offset; }
};

Add round_trip("the driver: bytes go to the device and come back", [] {
  Rig rig;
  for (int i = 0; i < 256; ++i) rig.host(0)[i] = static_cast<uint8_t>(i);
  rig.device.copy_to_device(rig.at(512), rig.host(0), 256, rig.stream.get());
  rig.device.copy_to_host(rig.host(1024), rig.at(512), 256, rig.stream.get());
  rig.device.synchronise(rig.stream.get());
  expect(std::memcmp(rig.host(0), rig.host(1024), 256) == 0, "they are the same");
});

Add bounds("the driver: every range is checked against what is allocated", [] {
  Rig rig;
  expect_error("bytes 4090 … 4106 of an allocation of 4096", [&] { rig.device.copy_to_device(rig.at(4090), rig.host(0), 16, rig.stream.get()); });
  expect_error("not allocated", [&] { rig.device.clear(reinterpret_cast<void*>(16), 16, rig.stream.get()); });
  std::vector<char> pageable(16);
  expect_error("copy to the device, its source", [&] { rig.device.copy_to_device(rig.at(0), pageable.data(), 16, rig.stream.get()); });
  expect_error("copy to the host, its goal", [&] { rig.device.copy_to_host(rig.at(0), rig.at(0), 16, rig.stream.get()); });
});

Add early("the driver: what is read before it was waited for has not come", [] {
  Rig rig;
  std::memset(rig.host(0), 7, 16);
  rig.device.copy_to_device(rig.at(0), rig.host(0), 16, rig.stream.get());
  rig.device.copy_to_host(rig.host(16), rig.at(0), 16, rig.stream.get());
  expect(rig.host(16)[0] == 0xa5, "the goal of a copy that has not run is spoilt");
  rig.device.synchronise(rig.stream.get());
  expect(rig.host(16)[0] == 7, "it is there then");
});

Add changed("the driver: the source of a copy must not change before the copy has run", [] {
  Rig rig;
  rig.device.copy_to_device(rig.at(0), rig.host(0), 16, rig.stream.get());
  rig.host(3)[0] ^= 1;
  expect_error("its source was changed", [&] { rig.device.synchronise(rig.stream.get()); });
});

Add peers("the driver: a copy from another device has its ranges checked on both, and its source must be there and stay", [] {
  Rig rig;
  Rig peer({.total_bytes = 1 << 20, .number = 1});
  std::memset(peer.host(0), 7, 16);
  peer.device.copy_to_device(peer.at(64), peer.host(0), 16, peer.stream.get());
  const auto copy = [&](size_t bytes = 16) { rig.device.copy_from_peer(rig.at(4080), peer.device, peer.at(64), bytes, rig.stream.get()); };
  const auto first = [&] {
    rig.device.copy_to_host(rig.host(0), rig.at(4080), 16, rig.stream.get());
    rig.device.synchronise(rig.stream.get());
    return rig.host(0)[0];
  };
  copy();
  expect(first() == 0xff, "what the other device has not done has not come");
  peer.device.synchronise(peer.stream.get());
  copy();
  expect(first() == 7, "it comes then");
  copy();
  peer.device.clear(peer.at(64), 16, peer.stream.get());
  peer.device.synchronise(peer.stream.get());
  expect_error("copy from a peer: its source was changed", first);
  expect_error("copy from a peer, its goal: bytes 4080 … 4097 of an allocation of 4096", [&] { copy(17); });
  expect_error("copy from a peer, its source: ",
               [&] { rig.device.copy_from_peer(rig.at(0), peer.device, rig.at(0), 16, rig.stream.get()); });
  expect_error("it is the same GPU", [&] { rig.device.copy_from_peer(rig.at(0), rig.device, rig.at(64), 16, rig.stream.get()); });
});

Add order("the driver: streams run in any order but for their events", [] {
  int before = 0;
  for (uint32_t seed = 1; seed <= 40; ++seed) {
    for (const bool with_event : {false, true}) {
      Rig rig({.total_bytes = 1 << 20, .seed = seed});
      std::memset(rig.host(0), 1, 16);
      rig.device.clear(rig.at(0), 16, rig.stream.get());
      rig.device.synchronise(rig.stream.get());
      rig.device.copy_to_device(rig.at(0), rig.host(0), 16, rig.stream.get());
      rig.device.record(rig.event.get(), rig.stream.get());
      if (with_event) rig.device.wait(rig.other.get(), rig.event.get());
      rig.device.copy_to_host(rig.host(64), rig.at(0), 16, rig.other.get());
      rig.device.synchronise(rig.other.get());
      if (with_event) {
        expect(rig.host(64)[0] == 1, "a stream that waits for an event sees what was before it");
      } else {
        before += rig.host(64)[0] == 0;
      }
    }
  }
  expect(before > 5 && before < 35, "without it either order happens; " + std::to_string(before) + " of 40 came first");
});

Add never("the driver: waiting for an event that nobody records is reported", [] {
  Rig rig;
  rig.device.record(rig.event.get(), rig.stream.get());
  rig.device.wait(rig.stream.get(), rig.event.get());
  rig.device.synchronise(rig.stream.get());
  Event later(rig.device, rig.device.create_event());
  rig.device.wait(rig.other.get(), later.get());
  rig.device.synchronise(rig.other.get());  // never recorded: as with CUDA nothing is waited for
});

Add memory_limit("the driver: too little memory says how much is needed and how much is free", [] {
  HostDevice device({.total_bytes = 1000});
  DeviceMemory first(device, device.allocate(600, "weights"));
  expect_error("KV pool: needs 500 bytes, and 400 of 1000 are free", [&] { device.allocate(500, "KV pool"); });
});

Add sealed("the driver: an allocation after everything was allocated is reported", [] {
  Rig rig;
  rig.device.seal();
  expect_error("everything was to be allocated at load", [&] { rig.device.allocate(16, "more"); });
  expect_error("everything was to be allocated at load", [&] { rig.device.allocate_pinned(16, "more"); });
});

Add launches("the driver: launches beyond a GPU's limits are refused", [] {
  Rig rig;
  const auto launch = [&](Size3 grid, Size3 threads, size_t shared) {
    rig.device.launch({"a kernel", grid, threads, shared, nullptr, nullptr, [](uint32_t) {}}, rig.stream.get());
  };
  launch({1}, {1024}, 99 << 10);
  expect_error("1056 threads in a block", [&] { launch({1}, {1056}, 0); });
  expect_error("of shared memory", [&] { launch({1}, {32}, 100 << 10); });
  expect_error("the grid is too large", [&] { launch({1, 65536}, {32}, 0); });
});

Add capture("the driver: a graph does again what was captured, and nothing forbidden happens while it is", [] {
  Rig rig;
  const StreamHandle stream = rig.stream.get();
  rig.device.begin_capture(stream);
  rig.device.copy_to_device(rig.at(0), rig.host(0), 16, stream);
  rig.device.copy_to_host(rig.host(64), rig.at(0), 16, stream);
  expect_error("allocate while a graph is captured", [&] { rig.device.allocate(16, "more"); });
  expect_error("synchronise while a graph is captured", [&] { rig.device.synchronise(stream); });
  expect_error("events have no place", [&] { rig.device.record(rig.event.get(), stream); });
  Graph graph(rig.device, rig.device.end_capture(stream));
  for (uint8_t round = 1; round <= 3; ++round) {
    std::memset(rig.host(0), round, 16);
    rig.device.launch_graph(graph.get(), stream);
    rig.device.synchronise(stream);
    expect(rig.host(64)[0] == round, "it copies what is there now");
  }
});

Add handles("the driver: what is destroyed cannot be used", [] {
  Rig rig;
  const StreamHandle gone = rig.device.create_stream();
  rig.device.destroy_stream(gone);
  expect_error("not a stream", [&] { rig.device.synchronise(gone); });
  expect_error("not the beginning of an allocation", [&] { rig.device.free(rig.at(16)); });
});

}  // namespace

}  // namespace penstock::cuda::test
