// Reading JavaScript arguments: each check throws std::runtime_error beginning with the place, and `guarded` or `promised` turns
// what is thrown into a JavaScript exception or a rejection, so that nothing crosses as an abort.
#pragma once

#include <napi.h>

#include <cmath>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

namespace penstock {

// Runs a synchronous method.
template <class Body>
Napi::Value guarded(const Napi::CallbackInfo& info, Body&& body) {
  try {
    return body();
  } catch (const Napi::Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Napi::Error::New(info.Env(), error.what());
  }
}

// Runs a method that answers with a promise; whatever is thrown rejects it.
template <class Body>
Napi::Value promised(const Napi::CallbackInfo& info, Body&& body) {
  const Napi::Env env = info.Env();
  const auto rejected = [env](Napi::Value error) {
    const auto deferred = Napi::Promise::Deferred::New(env);
    deferred.Reject(error);
    return deferred.Promise();
  };
  try {
    return body(env);
  } catch (const Napi::Error& error) {
    return rejected(error.Value());
  } catch (const std::exception& error) {
    return rejected(Napi::Error::New(env, error.what()).Value());
  }
}

inline Napi::Value argument(const Napi::CallbackInfo& info, size_t index) {
  return index < info.Length() ? info[index] : info.Env().Undefined();
}

inline double number_value(const Napi::Value& value, const std::string& place, double least, double most) {
  if (!value.IsNumber()) throw std::runtime_error(place + ": expected a number");
  const double number = value.As<Napi::Number>().DoubleValue();
  if (!(number >= least && number <= most)) {
    const auto text = [&](double x) { return Napi::Number::New(value.Env(), x).ToString().Utf8Value(); };
    throw std::runtime_error(place + ": " + text(number) + " is not in " + text(least) + " … " + text(most));
  }
  return number;
}

inline double integer_value(const Napi::Value& value, const std::string& place, double least, double most) {
  const double number = number_value(value, place, least, most);
  if (number != std::floor(number))
    throw std::runtime_error(place + ": expected an integer, found " + value.ToString().Utf8Value());
  return number;
}

inline double number_field(const Napi::Object& object, const char* name, double least, double most) {
  return number_value(object.Get(name), name, least, most);
}

inline double integer_field(const Napi::Object& object, const char* name, double least, double most) {
  return integer_value(object.Get(name), name, least, most);
}

inline Napi::Object object_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  const Napi::Value value = argument(info, index);
  if (!value.IsObject()) throw std::runtime_error(std::string(name) + ": expected an object");
  return value.As<Napi::Object>();
}

inline Napi::Array array_field(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (!value.IsArray()) throw std::runtime_error(std::string(name) + ": expected an array");
  return value.As<Napi::Array>();
}

// A copy: the caller may reuse its array while a step runs.
inline std::vector<int32_t> int32_value(const Napi::Value& value, const std::string& place) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array) {
    throw std::runtime_error(place + ": expected an Int32Array");
  }
  const Napi::Int32Array array = value.As<Napi::Int32Array>();
  return std::vector<int32_t>(array.Data(), array.Data() + array.ElementLength());
}

inline std::vector<int32_t> int32_field(const Napi::Object& object, const char* name) {
  return int32_value(object.Get(name), std::string("Batch.") + name);
}

inline std::vector<int32_t> int32_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  return int32_value(argument(info, index), name);
}

inline Napi::Uint8Array bytes_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  const Napi::Value value = argument(info, index);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array) {
    throw std::runtime_error(std::string(name) + ": expected a Uint8Array");
  }
  return value.As<Napi::Uint8Array>();
}

inline uint32_t uint32_argument(const Napi::CallbackInfo& info, size_t index, const char* name) {
  return static_cast<uint32_t>(integer_value(argument(info, index), name, 0.0, 4294967295.0));
}

}  // namespace penstock
