// readGguf: the header of a GGUF file as plain JavaScript values, parsed off the event loop.
#pragma once

#include <napi.h>

namespace penstock {

// Adds `readGguf(path): Promise<{version, fileBytes, metadata, tensors}>`; kernels/index.ts describes the shapes.
void register_gguf(Napi::Env env, Napi::Object exports);

}  // namespace penstock
