// What the addon of the device exports; kernels/index.ts describes it.
#include <napi.h>

#include "../arguments.h"
#include "../engine_binding.h"
#include "device.h"

namespace penstock::cuda {

namespace {

// DeviceFacts of kernels/index.ts.
Napi::Value device_facts(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const int number = static_cast<int>(integer_value(argument(info, 0), "device", 0.0, 999.0));
    const std::unique_ptr<Device> device = open_device(number);
    const DeviceFacts& facts = device->facts();
    Napi::Object out = Napi::Object::New(info.Env());
    out.Set("name", facts.name);
    out.Set("computeCapability", std::to_string(facts.compute_major) + "." + std::to_string(facts.compute_minor));
    out.Set("processors", facts.processors);
    out.Set("totalBytes", static_cast<double>(facts.total_bytes));
    out.Set("freeBytes", static_cast<double>(facts.free_bytes));
    out.Set("bytesPerS", facts.bytes_per_s);
    return Napi::Value(out);
  });
}

}  // namespace

}  // namespace penstock::cuda

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  penstock::register_engine(env, exports);
  exports.Set("deviceFacts", Napi::Function::New(env, penstock::cuda::device_facts, "deviceFacts"));
  return exports;
}

NODE_API_MODULE(penstock_cuda, init)
