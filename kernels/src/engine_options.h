// EngineOptions and SamplerOptions of kernels/index.ts as C++ values, each field checked by name.
#pragma once

#include <napi.h>

#include "engine.h"

namespace penstock {

// An InstructionSet's name, or undefined for the best.
InstructionSet read_instruction_set(const Napi::Value& value);
EngineOptions read_engine_options(const Napi::Object& object);
SamplerOptions read_sampler_options(const Napi::Object& options);

}  // namespace penstock
