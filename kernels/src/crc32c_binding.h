// crc32c of kernels/index.ts.
#pragma once

#include <napi.h>

namespace penstock {

// Adds `crc32c(bytes, seed, isa): number`.
void register_crc32c(Napi::Env env, Napi::Object exports);

}  // namespace penstock
