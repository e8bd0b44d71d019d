#include "gguf_binding.h"

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "gguf.h"

namespace penstock {

namespace {

constexpr int64_t kMaxSafe = int64_t{1} << 53;

Napi::String text_of(Napi::Env env, std::string_view text) { return Napi::String::New(env, text.data(), text.size()); }

// Element i as a JavaScript number, boolean or string. Integers beyond 2^53 are found in Execute.
Napi::Value element_of(Napi::Env env, const GgufValue& value, uint64_t i) {
  switch (value.element) {
    case GgufType::String:
      return text_of(env, value.texts[i]);
    case GgufType::Bool:
      return Napi::Boolean::New(env, value.data[i] != 0);
    case GgufType::F32:
    case GgufType::F64:
      return Napi::Number::New(env, gguf_float(value, i));
    default:
      return Napi::Number::New(env, static_cast<double>(gguf_int(value, i)));
  }
}

Napi::Value value_of(Napi::Env env, const GgufValue& value) {
  if (value.type != GgufType::Array) return element_of(env, value, 0);
  Napi::Array out = Napi::Array::New(env, value.count);
  for (uint64_t i = 0; i < value.count; i++) {
    // The handles of a long array would otherwise all live until the end.
    Napi::HandleScope scope(env);
    out.Set(static_cast<uint32_t>(i), element_of(env, value, i));
  }
  return out;
}

void check_integers(const GgufFile& file, std::string_view key, const GgufValue& value) {
  if (value.element != GgufType::U64 && value.element != GgufType::I64) return;
  for (uint64_t i = 0; i < value.count; i++) {
    bool safe = false;
    try {
      const int64_t number = gguf_int(value, i);
      safe = number >= -kMaxSafe && number <= kMaxSafe;
    } catch (const std::range_error&) {
    }
    if (!safe) file.fail(std::string(key) + ": an integer beyond 2^53, which JavaScript cannot hold");
  }
}

class ReadGguf : public Napi::AsyncWorker {
 public:
  ReadGguf(Napi::Env env, std::string path)
      : Napi::AsyncWorker(env, "penstock.readGguf"), deferred_(Napi::Promise::Deferred::New(env)), path_(std::move(path)) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

  void Execute() override {
    try {
      file_ = GgufFile::open(path_);
      for (const auto& [key, value] : file_->metadata()) check_integers(*file_, key, value);
    } catch (const std::exception& error) {
      SetError(error.what());
    }
  }

  void OnOK() override {
    try {
      deferred_.Resolve(result());
    } catch (const Napi::Error& error) {
      deferred_.Reject(error.Value());
    }
  }

  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

 private:
  Napi::Object result() const {
    const Napi::Env env = Env();
    Napi::Array metadata = Napi::Array::New(env, file_->metadata().size());
    uint32_t i = 0;
    for (const auto& [key, value] : file_->metadata()) {
      Napi::HandleScope scope(env);
      Napi::Array pair = Napi::Array::New(env, 2);
      pair.Set(uint32_t{0}, text_of(env, key));
      pair.Set(uint32_t{1}, value_of(env, value));
      metadata.Set(i++, pair);
    }
    Napi::Array tensors = Napi::Array::New(env, file_->tensors().size());
    i = 0;
    for (const GgufTensor& tensor : file_->tensors()) {
      Napi::HandleScope scope(env);
      Napi::Array shape = Napi::Array::New(env, tensor.dims);
      for (uint32_t d = 0; d < tensor.dims; d++) shape.Set(d, Napi::Number::New(env, static_cast<double>(tensor.shape[d])));
      Napi::Object entry = Napi::Object::New(env);
      entry.Set("name", text_of(env, tensor.name));
      entry.Set("type", tensor_type_name(tensor.type));
      entry.Set("shape", shape);
      entry.Set("bytes", Napi::Number::New(env, static_cast<double>(tensor.bytes)));
      tensors.Set(i++, entry);
    }
    Napi::Object out = Napi::Object::New(env);
    out.Set("version", Napi::Number::New(env, file_->version()));
    out.Set("fileBytes", Napi::Number::New(env, static_cast<double>(file_->file_bytes())));
    out.Set("metadata", metadata);
    out.Set("tensors", tensors);
    return out;
  }

  Napi::Promise::Deferred deferred_;
  std::string path_;
  std::shared_ptr<GgufFile> file_;
};

Napi::Value read_gguf(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  if (info.Length() != 1 || !info[0].IsString()) throw Napi::TypeError::New(env, "readGguf: expected a path");
  auto* worker = new ReadGguf(env, info[0].As<Napi::String>().Utf8Value());
  const Napi::Promise promise = worker->promise();
  worker->Queue();
  return promise;
}

}  // namespace

void register_gguf(Napi::Env env, Napi::Object exports) {
  exports.Set("readGguf", Napi::Function::New(env, read_gguf, "readGguf"));
}

}  // namespace penstock
