// A GGUF v3 file, mapped read-only and checked before use.
//
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
// A file is treated as hostile: every count, length, offset and product is compared with what is left of the file before
// it is used, and every error is a std::runtime_error that names the file and the place in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace penstock {

// Ids of ggml's tensor types that the engine computes with. A file may hold others: see tensor_type_name.
enum class TensorType : uint32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  I32 = 26,  // words of AWQ (awq.h)
  BF16 = 30,
};

struct TensorTypeInfo {
  uint32_t id;
  const char* name;
  uint32_t block_weights;  // weights in a block; a row is a whole number of blocks
  uint32_t block_bytes;
};

// Null where the id is not known.
const TensorTypeInfo* tensor_type_info(TensorType type);

// "Q4_1", or "type 99" where the id is not known.
std::string tensor_type_name(TensorType type);

// Ids of metadata value types.
enum class GgufType : uint32_t {
  U8 = 0,
  I8 = 1,
  U16 = 2,
  I16 = 3,
  U32 = 4,
  I32 = 5,
  F32 = 6,
  Bool = 7,
  String = 8,
  Array = 9,
  U64 = 10,
  I64 = 11,
  F64 = 12,
};

const char* gguf_type_name(GgufType type);

// A metadata value. Everything it points to lies in the mapping and lives as long as its GgufFile.
struct GgufValue {
  GgufType type = GgufType::U8;     // Array for arrays
  GgufType element = GgufType::U8;  // of an array; otherwise equal to type
  uint64_t count = 1;               // elements of an array; 1 for a scalar
  const uint8_t* data = nullptr;    // [count] little-endian numbers or booleans, unaligned; null for strings
  std::vector<std::string_view> texts;  // [count] of a string or an array of strings
};

struct GgufTensor {
  std::string_view name;
  TensorType type;       // may be an id that tensor_type_info does not know
  uint64_t shape[4];     // fastest dimension first; 1 beyond dims
  uint32_t dims;         // 1 … 4
  const uint8_t* data;   // in the mapping, aligned to general.alignment (at least 8); null where the type is not known
  uint64_t bytes;        // shape[3] * shape[2] * shape[1] rows of shape[0] weights; 0 where the type is not known
};

// "[64, 320]"
std::string shape_text(const GgufTensor& tensor);

class GgufFile {
 public:
  // Maps and checks a file. Throws std::runtime_error.
  //
  // The mapping is private and read-only. A file that is truncated by somebody else after this point raises SIGBUS on
  // the next touch of a lost page: replace model files by rename, never by writing into them.
  static std::shared_ptr<GgufFile> open(const std::string& path);

  ~GgufFile();
  GgufFile(const GgufFile&) = delete;
  GgufFile& operator=(const GgufFile&) = delete;

  const std::string& path() const { return path_; }
  uint32_t version() const { return version_; }
  uint64_t file_bytes() const { return size_; }

  // Null where there is none.
  const GgufTensor* find(std::string_view name) const;
  const GgufValue* get(std::string_view key) const;

  // As find, but throws "<file>: tensor <name>: expected, found none".
  const GgufTensor& tensor(std::string_view name) const;

  const std::vector<GgufTensor>& tensors() const { return tensors_; }                               // in file order
  const std::vector<std::pair<std::string_view, GgufValue>>& metadata() const { return metadata_; }  // in file order

  // Typed getters. Without a fallback an absent key throws; a value of another kind, or out of range, always throws with
  // the key, what was expected and what was found. Any integer type will do for an integer, F32 or F64 for a float.
  uint64_t get_uint(std::string_view key) const;
  uint64_t get_uint(std::string_view key, uint64_t fallback) const;
  double get_float(std::string_view key) const;
  double get_float(std::string_view key, double fallback) const;
  bool get_bool(std::string_view key) const;
  bool get_bool(std::string_view key, bool fallback) const;
  std::string_view get_string(std::string_view key) const;
  std::string_view get_string(std::string_view key, std::string_view fallback) const;
  // Empty where the key is absent.
  std::vector<int64_t> get_ints(std::string_view key) const;
  std::vector<double> get_floats(std::string_view key) const;
  std::vector<std::string_view> get_strings(std::string_view key) const;

  // Throws std::runtime_error("<file>: <message>"), for errors of those who read this file further.
  [[noreturn]] void fail(const std::string& message) const;

 private:
  explicit GgufFile(std::string path);
  void map();
  void parse();
  [[noreturn]] void fail_value(std::string_view key, const char* expected, const GgufValue* found) const;

  std::string path_;
  std::string name_;  // last component of the path, for messages
  uint8_t* base_ = nullptr;
  uint64_t size_ = 0;
  uint32_t version_ = 0;
  std::vector<std::pair<std::string_view, GgufValue>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::unordered_map<std::string_view, size_t> keys_;   // -> index in metadata_
  std::unordered_map<std::string_view, size_t> names_;  // -> index in tensors_
};

// Number i of an integer or boolean value; U64 beyond 2^63-1 throws std::range_error.
int64_t gguf_int(const GgufValue& value, uint64_t i);
// Number i of a float value.
double gguf_float(const GgufValue& value, uint64_t i);

}  // namespace penstock
