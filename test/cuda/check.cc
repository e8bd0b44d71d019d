#include "check.h"

#include <cstdio>
#include <cstring>

#include "../../kernels/src/fixed_math.h"
#if defined(PENSTOCK_SHIM)
#include "../../kernels/src/cuda/host_device.h"
#endif

namespace penstock::cuda::test {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void expect(bool condition, const std::string& sentence) {
  if (!condition) throw std::runtime_error("expected that " + sentence);
}

void expect_error(const std::string& part, const std::function<void()>& body) {
  try {
    body();
  } catch (const std::exception& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, "an error says \"" + part + "\", found: " + error.what());
    return;
  }
  expect(false, "there is an error that says \"" + part + "\"");
}

std::vector<float> normals(Random& random, size_t count, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

std::vector<uint16_t> halves(const std::vector<float>& values) {
  std::vector<uint16_t> out;
  for (float value : values) out.push_back(half_of_float(value));
  return out;
}

std::vector<float> floats(const std::vector<uint16_t>& values) {
  std::vector<float> out;
  for (uint16_t value : values) out.push_back(float_of_half(value));
  return out;
}

namespace {

std::unique_ptr<Device> open([[maybe_unused]] uint32_t seed) {
#if defined(PENSTOCK_SHIM)
  return std::make_unique<HostDevice>(HostDeviceOptions{.total_bytes = size_t{1} << 30, .seed = seed});
#else
  return open_device(0);
#endif
}

}  // namespace

Bench::Bench(uint32_t seed) : device_(open(seed)), stream_(*device_, device_->create_stream()) {}

Bench::~Bench() noexcept(false) {
  memory_.clear();
  stream_ = Stream();
#if defined(PENSTOCK_SHIM)
  const size_t live = static_cast<HostDevice&>(*device_).live();
  if (live != 0 && std::uncaught_exceptions() == 0) throw std::runtime_error(std::to_string(live) + " things of the device are left over");
#endif
}

void* Bench::room_bytes(size_t bytes) {
  memory_.emplace_back(*device_, device_->allocate(bytes, "a test's memory"));
  return memory_.back().get();
}

void* Bench::upload_bytes(const void* from, size_t bytes) {
  void* to = room_bytes(bytes);
  PinnedMemory pinned(*device_, device_->allocate_pinned(bytes, "a test's memory"));
  std::memcpy(pinned.get(), from, bytes);
  device_->copy_to_device(to, pinned.get(), bytes, stream_.get());
  device_->synchronise(stream_.get());
  return to;
}

void Bench::download_bytes(void* to, const void* from, size_t bytes) {
  PinnedMemory pinned(*device_, device_->allocate_pinned(bytes, "a test's memory"));
  device_->copy_to_host(pinned.get(), from, bytes, stream_.get());
  device_->synchronise(stream_.get());
  std::memcpy(to, pinned.get(), bytes);
}

}  // namespace penstock::cuda::test

int main(int count, char** arguments) {
  using namespace penstock::cuda::test;
  int failed = 0;
  for (const Test& test : tests()) {
    if (count > 1 && test.name.find(arguments[1]) == std::string::npos) continue;
    try {
      test.body();
      std::printf("ok %s\n", test.name.c_str());
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s: %s\n", test.name.c_str(), error.what());
    }
    std::fflush(stdout);
  }
  return failed == 0 ? 0 : 1;
}
