// What the addon exports, and nothing else; kernels/index.ts describes it.
#include <napi.h>

#include "crc32c_binding.h"
#include "engine_binding.h"
#include "gguf_binding.h"

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  penstock::register_gguf(env, exports);
  penstock::register_engine(env, exports);
  penstock::register_crc32c(env, exports);
  return exports;
}

NODE_API_MODULE(penstock, init)
