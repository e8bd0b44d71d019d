#include "crc32c_binding.h"

#include "arguments.h"
#include "cpu/crc32c.h"
#include "engine_options.h"

namespace penstock {

namespace {

Napi::Value crc32c(const Napi::CallbackInfo& info) {
  return guarded(info, [&] {
    const Napi::Uint8Array bytes = bytes_argument(info, 0, "bytes");
    const uint32_t seed = uint32_argument(info, 1, "seed");
    const Crc32c crc = select_crc32c(read_instruction_set(argument(info, 2)));
    return Napi::Value(Napi::Number::New(info.Env(), crc(bytes.Data(), bytes.ByteLength(), seed)));
  });
}

}  // namespace

void register_crc32c(Napi::Env env, Napi::Object exports) { exports.Set("crc32c", Napi::Function::New(env, crc32c, "crc32c")); }

}  // namespace penstock
