// Tests of the device's code in C++: named by a sentence, run one after another, reported a line each.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../kernels/src/cuda/device.h"
#include "../../kernels/src/cuda/launchers.h"

namespace penstock::cuda::test {

struct Test {
  std::string name;
  std::function<void()> body;
};
std::vector<Test>& tests();

struct Add {
  Add(std::string name, std::function<void()> body) { tests().push_back({std::move(name), std::move(body)}); }
};

// Throws with the sentence where it is false.
void expect(bool condition, const std::string& sentence);
// Where the body throws nothing, or something that does not say `part`.
void expect_error(const std::string& part, const std::function<void()>& body);

using Random = std::mt19937;
std::vector<float> normals(Random& random, size_t count, float deviation = 1.0f);
std::vector<uint16_t> halves(const std::vector<float>& values);
std::vector<float> floats(const std::vector<uint16_t>& values);

// A device, a stream, and memory for a test. On the shim's device what is left over at the end is an error.
class Bench {
 public:
  explicit Bench(uint32_t seed = 1);
  ~Bench() noexcept(false);

  Device& device() { return *device_; }
  Queue queue() { return {*device_, stream_.get()}; }

  template <class T>
  T* upload(const std::vector<T>& values) {
    return static_cast<T*>(upload_bytes(values.data(), values.size() * sizeof(T)));
  }
  // Full of NaN on the shim's device.
  template <class T>
  T* room(size_t count) {
    return static_cast<T*>(room_bytes(count * sizeof(T)));
  }
  template <class T>
  std::vector<T> download(const T* from, size_t count) {
    std::vector<T> values(count);
    download_bytes(values.data(), from, count * sizeof(T));
    return values;
  }
  void clear(void* memory, size_t bytes) { device_->clear(memory, bytes, stream_.get()); }

 private:
  void* upload_bytes(const void* from, size_t bytes);
  void* room_bytes(size_t bytes);
  void download_bytes(void* to, const void* from, size_t bytes);

  std::unique_ptr<Device> device_;
  Stream stream_;
  std::vector<DeviceMemory> memory_;
};


}  // namespace penstock::cuda::test
