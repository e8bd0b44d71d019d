// Device on the CUDA runtime, which is linked statically and finds the driver when it is first called.
#include <cuda_runtime.h>

#include <set>
#include <stdexcept>

#include "device.h"

namespace penstock::cuda {

namespace {

constexpr int kLeastComputeMajor = 8;    // mma.m16n8k16 and cp.async
constexpr int kOverlapComputeMajor = 9;  // language/overlap.h

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string mebibytes(size_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int number) : number_(number) {
    const std::string place = "cuda:" + std::to_string(number);
    int driver = 0;
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
      throw std::runtime_error(place + ": found no NVIDIA driver; this addon needs one for CUDA " + version(CUDART_VERSION / 1000 * 1000) +
                               " or later (580 or later), or set device: cpu");
    }
    if (driver / 1000 < CUDART_VERSION / 1000) {
      throw std::runtime_error(place + ": found a driver for CUDA " + version(driver) + "; this addon needs one for CUDA " +
                               version(CUDART_VERSION / 1000 * 1000) + " or later (580 or later)");
    }
    int devices = 0;
    const cudaError_t counted = cudaGetDeviceCount(&devices);
    if (counted != cudaSuccess && counted != cudaErrorNoDevice) {
      throw std::runtime_error(place + ": the driver's devices could not be counted: " + cudaGetErrorString(counted));
    }
    if (number >= devices) {
      throw std::runtime_error(place + ": found " + std::to_string(devices) + " CUDA device" + (devices == 1 ? "" : "s") +
                               (devices == 0 ? "" : ", cuda:0 … cuda:" + std::to_string(devices - 1)));
    }
    facts_.number = number;
    facts_.name = place;
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, number), "read its properties");
    facts_.name = place + " (" + properties.name + ")";
    facts_.compute_major = properties.major;
    facts_.compute_minor = properties.minor;
    facts_.processors = properties.multiProcessorCount;
    facts_.shared_bytes = properties.sharedMemPerBlockOptin;
    if (properties.major < kLeastComputeMajor) {
      throw std::runtime_error(facts_.name + ": found compute capability " + std::to_string(properties.major) + "." +
                               std::to_string(properties.minor) + "; the kernels need 8.0 or later (Ampere)");
    }
    int clock_khz = 0;
    int bus_bits = 0;
    if (cudaDeviceGetAttribute(&clock_khz, cudaDevAttrMemoryClockRate, number) == cudaSuccess &&
        cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, number) == cudaSuccess) {
      facts_.bytes_per_s = 2.0 * clock_khz * 1000.0 * bus_bits / 8.0;  // two transfers a clock
    }
    check(cudaSetDevice(number), "select it");
    check(cudaMemGetInfo(&facts_.free_bytes, &facts_.total_bytes), "read its free memory");
  }

  const DeviceFacts& facts() const override { return facts_; }

  void* allocate(size_t bytes, const char* what) override {
    enter();
    void* memory = nullptr;
    const cudaError_t result = cudaMalloc(&memory, bytes);
    if (result == cudaErrorMemoryAllocation) {
      size_t free_bytes = 0;
      size_t total_bytes = 0;
      cudaMemGetInfo(&free_bytes, &total_bytes);
      cudaGetLastError();  // it is told; what follows is not to hear of it
      throw std::runtime_error(facts_.name + ": " + what + ": needs " + mebibytes(bytes) + ", and " + mebibytes(free_bytes) + " of " +
                               mebibytes(total_bytes) + " are free");
    }
    check(result, what);
    return memory;
  }
  void free(void* memory) override {
    enter();
    check(cudaFree(memory), "free memory");
  }
  void* allocate_pinned(size_t bytes, const char* what) override {
    enter();
    void* memory = nullptr;
    check(cudaMallocHost(&memory, bytes), what);
    return memory;
  }
  void free_pinned(void* memory) override {
    enter();
    check(cudaFreeHost(memory), "free pinned memory");
  }
  void forbid(void*, size_t) override {}

  StreamHandle create_stream() override {
    enter();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create a stream");
    return stream;
  }
  void destroy_stream(StreamHandle stream) override {
    enter();
    check(cudaStreamSynchronize(of(stream)), "finish a stream");
    check(cudaStreamDestroy(of(stream)), "destroy a stream");
  }
  void synchronise(StreamHandle stream) override {
    enter();
    check(cudaStreamSynchronize(of(stream)), "wait for a stream");
  }

  EventHandle create_event() override {
    enter();
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "create an event");
    return event;
  }
  void destroy_event(EventHandle event) override {
    enter();
    check(cudaEventDestroy(static_cast<cudaEvent_t>(event)), "destroy an event");
  }
  void record(EventHandle event, StreamHandle stream) override {
    enter();
    check(cudaEventRecord(static_cast<cudaEvent_t>(event), of(stream)), "record an event");
  }
  void wait(StreamHandle stream, EventHandle event) override {
    enter();
    check(cudaStreamWaitEvent(of(stream), static_cast<cudaEvent_t>(event), 0), "let a stream wait");
  }
  void synchronise_event(EventHandle event) override {
    enter();
    check(cudaEventSynchronize(static_cast<cudaEvent_t>(event)), "wait for an event");
  }

  void copy_to_device(void* to, const void* from, size_t bytes, StreamHandle stream) override {
    enter();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, of(stream)), "copy to it");
  }
  void copy_to_host(void* to, const void* from, size_t bytes, StreamHandle stream) override {
    enter();
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, of(stream)), "copy from it");
  }
  void copy_from_peer(void* to, Device& peer, const void* from, size_t bytes, StreamHandle stream) override {
    enter();
    const int other = peer.facts().number;
    // Where it is impossible, or done already, the copy succeeds all the same; the driver then takes the way that there is.
    if (peers_.insert(other).second && cudaDeviceEnablePeerAccess(other, 0) != cudaSuccess) cudaGetLastError();
    check(cudaMemcpyPeerAsync(to, number_, from, other, bytes, of(stream)), "copy from another device");
  }
  void clear(void* memory, size_t bytes, StreamHandle stream) override {
    enter();
    check(cudaMemsetAsync(memory, 0, bytes, of(stream)), "clear memory");
  }
  void launch(const Launch& launch, StreamHandle stream) override {
    enter();
    constexpr size_t kWithoutAsking = 48 << 10;
    if (launch.shared_bytes > kWithoutAsking) {
      check(cudaFuncSetAttribute(launch.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes)),
            launch.name);
    }
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = {launch.grid.x, launch.grid.y, launch.grid.z};
    config.blockDim = {launch.threads.x, launch.threads.y, launch.threads.z};
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = of(stream);
    config.attrs = &overlap;
    config.numAttrs = facts_.compute_major >= kOverlapComputeMajor ? 1 : 0;
    check(cudaLaunchKernelExC(&config, launch.function, launch.arguments), launch.name);
  }

  void begin_capture(StreamHandle stream) override {
    enter();
    check(cudaStreamBeginCapture(of(stream), cudaStreamCaptureModeThreadLocal), "begin a graph");
  }
  GraphHandle end_capture(StreamHandle stream) override {
    enter();
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(of(stream), &graph), "end a graph");
    cudaGraphExec_t runnable = nullptr;
    const cudaError_t result = cudaGraphInstantiate(&runnable, graph, 0);
    cudaGraphDestroy(graph);
    check(result, "make a graph runnable");
    return runnable;
  }
  void launch_graph(GraphHandle graph, StreamHandle stream) override {
    enter();
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), of(stream)), "launch a graph");
  }
  void destroy_graph(GraphHandle graph) override {
    enter();
    check(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)), "destroy a graph");
  }

 private:
  static cudaStream_t of(StreamHandle stream) { return static_cast<cudaStream_t>(stream); }

  // The runtime keeps a device for each thread of the host.
  void enter() const { check(cudaSetDevice(number_), "select it"); }

  void check(cudaError_t result, const char* what) const {
    if (result == cudaSuccess) return;
    throw std::runtime_error(facts_.name + ": " + what + ": " + cudaGetErrorString(result));
  }

  const int number_;
  std::set<int> peers_;  // whose memory it was to get at
  DeviceFacts facts_;
};

}  // namespace

std::unique_ptr<Device> open_device(int number) { return std::make_unique<CudaDevice>(number); }

}  // namespace penstock::cuda
