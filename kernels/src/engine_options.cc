#include "engine_options.h"

#include "arguments.h"

namespace penstock {

InstructionSet read_instruction_set(const Napi::Value& value) {
  if (value.IsUndefined()) return InstructionSet::Avx512;
  const std::string name = value.IsString() ? value.As<Napi::String>().Utf8Value() : "";
  for (InstructionSet isa : {InstructionSet::Reference, InstructionSet::Avx2, InstructionSet::Avx512}) {
    if (name == instruction_set_name(isa)) return isa;
  }
  throw std::runtime_error("isa: expected reference, avx2 or avx512");
}

namespace {

KvDtype read_kv_dtype(const Napi::Value& value) {
  if (value.IsUndefined()) return KvDtype::F16;
  const std::string name = value.IsString() ? value.As<Napi::String>().Utf8Value() : "";
  for (KvDtype dtype : {KvDtype::F16, KvDtype::Int8, KvDtype::Int4}) {
    if (name == kv_dtype_name(dtype)) return dtype;
  }
  throw std::runtime_error("kvDtype: expected f16, int8 or int4");
}

}  // namespace

EngineOptions read_engine_options(const Napi::Object& object) {
  const Napi::Value path = object.Get("path");
  if (!path.IsString()) throw std::runtime_error("path: expected a string");
  EngineOptions options;
  options.path = path.As<Napi::String>().Utf8Value();
  options.blocks = static_cast<int>(integer_field(object, "blocks", 1.0, 1 << 26));
  options.block_tokens = static_cast<int>(integer_field(object, "blockTokens", 1.0, 1 << 12));
  options.kv_dtype = read_kv_dtype(object.Get("kvDtype"));
  options.threads = static_cast<int>(integer_field(object, "threads", 1.0, 1024.0));
  options.max_rows = static_cast<int>(integer_field(object, "maxRows", 1.0, 1 << 16));
  options.max_outputs = static_cast<int>(integer_field(object, "maxOutputs", 1.0, 1 << 16));
  options.max_context =
      object.Get("maxContext").IsUndefined() ? 0 : static_cast<int>(integer_field(object, "maxContext", 1.0, 1 << 24));
  options.isa = read_instruction_set(object.Get("isa"));
  options.device = object.Get("deviceNumber").IsUndefined() ? 0 : static_cast<int>(integer_field(object, "deviceNumber", 0.0, 999.0));
  return options;
}

SamplerOptions read_sampler_options(const Napi::Object& options) {
  constexpr double kFloat = 3.4e38;
  constexpr double kInt = 2147483647.0;
  constexpr double kSafe = 9007199254740991.0;
  SamplerOptions out;
  out.temperature = static_cast<float>(number_field(options, "temperature", 0.0, kFloat));
  out.top_k = static_cast<int32_t>(integer_field(options, "topK", 0.0, kInt));
  out.top_p = static_cast<float>(number_field(options, "topP", 0.0, 1.0));
  out.min_p = static_cast<float>(number_field(options, "minP", 0.0, 1.0));
  out.repetition_penalty = static_cast<float>(number_field(options, "repetitionPenalty", 0.0, kFloat));
  out.presence_penalty = static_cast<float>(number_field(options, "presencePenalty", -kFloat, kFloat));
  out.frequency_penalty = static_cast<float>(number_field(options, "frequencyPenalty", -kFloat, kFloat));
  out.min_tokens = static_cast<int32_t>(integer_field(options, "minTokens", 0.0, kInt));
  out.seed = static_cast<uint64_t>(integer_field(options, "seed", 0.0, kSafe));
  out.choice = static_cast<uint32_t>(integer_field(options, "choice", 0.0, kInt));
  const Napi::Array biases = array_field(options, "logitBias");
  for (uint32_t i = 0; i < biases.Length(); ++i) {
    const std::string place = "logitBias[" + std::to_string(i) + "]";
    const Napi::Value pair = biases.Get(i);
    if (!pair.IsArray() || pair.As<Napi::Array>().Length() != 2) throw std::runtime_error(place + ": expected [token, bias]");
    const Napi::Array both = pair.As<Napi::Array>();
    out.logit_bias.emplace_back(static_cast<int32_t>(integer_value(both.Get(uint32_t{0}), place, 0.0, kInt)),
                                static_cast<float>(number_value(both.Get(uint32_t{1}), place, -kFloat, kFloat)));
  }
  const Napi::Array suppressed = array_field(options, "suppressedTokens");
  for (uint32_t i = 0; i < suppressed.Length(); ++i) {
    const std::string place = "suppressedTokens[" + std::to_string(i) + "]";
    out.suppressed_tokens.push_back(static_cast<int32_t>(integer_value(suppressed.Get(i), place, 0.0, kInt)));
  }
  return out;
}

}  // namespace penstock
