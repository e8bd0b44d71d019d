// loadEngine and bestInstructionSet: an Engine as a JavaScript object. Loading and stepping run off the event loop.
#pragma once

#include <napi.h>

namespace penstock {

// Adds `loadEngine(options): Promise<NativeEngine>` and `bestInstructionSet()`.
void register_engine(Napi::Env env, Napi::Object exports);

}  // namespace penstock
