#include "gguf.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace penstock {

namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF numbers are read in place");

// Bounds well above any real model (the largest vocabularies have 262,144 tokens), so that a hostile file cannot make
// the reader allocate more than a small multiple of its own size, nor V8 more than it can hold.
constexpr uint64_t kMaxKeys = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 18;
constexpr uint64_t kMaxKeyBytes = 65535;  // the format's own limit
constexpr uint64_t kMaxNameBytes = 1024;
constexpr uint64_t kMaxTextBytes = 1 << 26;
constexpr uint64_t kMaxElements = 1 << 24;
constexpr uint64_t kMaxWeights = uint64_t{1} << 53;  // every number of a shape is exact in a double
constexpr uint64_t kMaxAlignment = 1 << 20;

// Types the engine does not compute with are here for their names and sizes.
constexpr TensorTypeInfo kTensorTypes[] = {
    {0, "F32", 1, 4},          {1, "F16", 1, 2},          {2, "Q4_0", 32, 18},       {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},       {7, "Q5_1", 32, 24},       {8, "Q8_0", 32, 34},
    {10, "Q2_K", 256, 84},     {11, "Q3_K", 256, 110},    {12, "Q4_K", 256, 144},    {13, "Q5_K", 256, 176},
    {14, "Q6_K", 256, 210},    {16, "IQ2_XXS", 256, 66},  {17, "IQ2_XS", 256, 74},
    {18, "IQ3_XXS", 256, 98},  {19, "IQ1_S", 256, 50},    {20, "IQ4_NL", 32, 18},    {21, "IQ3_S", 256, 110},
    {22, "IQ2_S", 256, 82},    {23, "IQ4_XS", 256, 136},  {24, "I8", 1, 1},          {25, "I16", 1, 2},
    {26, "I32", 1, 4},         {27, "I64", 1, 8},         {28, "F64", 1, 8},         {29, "IQ1_M", 256, 56},
    {30, "BF16", 1, 2},        {34, "TQ1_0", 256, 54},    {35, "TQ2_0", 256, 66},    {39, "MXFP4", 32, 17},
};

// Bytes of a number or boolean; 0 for strings, arrays and unknown types.
uint64_t number_bytes(GgufType type) {
  switch (type) {
    case GgufType::U8:
    case GgufType::I8:
    case GgufType::Bool:
      return 1;
    case GgufType::U16:
    case GgufType::I16:
      return 2;
    case GgufType::U32:
    case GgufType::I32:
    case GgufType::F32:
      return 4;
    case GgufType::U64:
    case GgufType::I64:
    case GgufType::F64:
      return 8;
    default:
      return 0;
  }
}

bool is_integer(GgufType type) {
  return number_bytes(type) != 0 && type != GgufType::Bool && type != GgufType::F32 && type != GgufType::F64;
}

bool is_float(GgufType type) { return type == GgufType::F32 || type == GgufType::F64; }

template <typename T>
T read_at(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Text of the file as it may stand in a message: printable, and not long.
std::string shown(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 80)) out += (c >= 0x20 && c < 0x7f) ? c : '?';
  if (text.size() > 80) out += "...";
  return out;
}

std::string describe(const GgufValue& value) {
  if (value.type != GgufType::Array) return gguf_type_name(value.type);
  return std::string("an array of ") + gguf_type_name(value.element);
}

// Bytes of the header that are still to be read. Every read names what it is for.
class Cursor {
 public:
  Cursor(const GgufFile& file, const uint8_t* base, uint64_t size) : file_(file), base_(base), size_(size) {}

  uint64_t offset() const { return offset_; }
  uint64_t left() const { return size_ - offset_; }

  const uint8_t* take(uint64_t bytes, const std::string& place) {
    if (bytes > left()) {
      file_.fail(place + ": needs " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset_) +
                 ", the file ends at " + std::to_string(size_));
    }
    const uint8_t* at = base_ + offset_;
    offset_ += bytes;
    return at;
  }

  template <typename T>
  T number(const std::string& place) {
    return read_at<T>(take(sizeof(T), place));
  }

  std::string_view text(uint64_t most, const std::string& place) {
    const uint64_t length = number<uint64_t>(place);
    if (length > most) {
      file_.fail(place + ": expected at most " + std::to_string(most) + " bytes of text, found a length of " +
                 std::to_string(length));
    }
    const uint8_t* at = take(length, place);
    return {reinterpret_cast<const char*>(at), static_cast<size_t>(length)};
  }

 private:
  const GgufFile& file_;
  const uint8_t* base_;
  uint64_t size_;
  uint64_t offset_ = 0;
};

// The strings of an array, without building a place for each.
void read_texts(const GgufFile& file, Cursor& cursor, uint64_t count, const std::string& place, GgufValue& value) {
  value.texts.reserve(count);
  for (uint64_t i = 0; i < count; i++) {
    if (cursor.left() < 8) file.fail(place + ": the file ends in string " + std::to_string(i) + " of " + std::to_string(count));
    const uint64_t length = read_at<uint64_t>(cursor.take(8, place));
    if (length > kMaxTextBytes || length > cursor.left()) {
      file.fail(place + ": string " + std::to_string(i) + " of " + std::to_string(count) + " has a length of " +
                std::to_string(length) + ", the file has " + std::to_string(cursor.left()) + " bytes left");
    }
    const uint8_t* at = cursor.take(length, place);
    value.texts.emplace_back(reinterpret_cast<const char*>(at), static_cast<size_t>(length));
  }
}

void check_booleans(const GgufFile& file, const GgufValue& value, const std::string& place) {
  for (uint64_t i = 0; i < value.count; i++) {
    if (value.data[i] > 1) file.fail(place + ": expected a boolean 0 or 1, found " + std::to_string(value.data[i]));
  }
}

GgufValue read_value(const GgufFile& file, Cursor& cursor, const std::string& place) {
  GgufValue value;
  const uint32_t type = cursor.number<uint32_t>(place);
  if (type > static_cast<uint32_t>(GgufType::F64)) {
    file.fail(place + ": expected a value type in 0 ... 12, found " + std::to_string(type));
  }
  value.type = value.element = static_cast<GgufType>(type);
  if (value.type == GgufType::String) {
    value.texts.push_back(cursor.text(kMaxTextBytes, place));
    return value;
  }
  if (value.type == GgufType::Array) {
    const uint32_t element = cursor.number<uint32_t>(place);
    value.element = static_cast<GgufType>(element);
    value.count = cursor.number<uint64_t>(place);
    if (value.element != GgufType::String && number_bytes(value.element) == 0) {
      file.fail(place + ": expected an array of numbers, booleans or strings, found elements of " +
                (value.element == GgufType::Array ? "type array" : "type " + std::to_string(element)));
    }
    const uint64_t least = value.element == GgufType::String ? 8 : number_bytes(value.element);
    if (value.count > kMaxElements || value.count > cursor.left() / least) {
      file.fail(place + ": an array of " + std::to_string(value.count) + " elements does not fit in the " +
                std::to_string(cursor.left()) + " bytes left (at most " + std::to_string(kMaxElements) + " elements)");
    }
    if (value.element == GgufType::String) {
      read_texts(file, cursor, value.count, place, value);
      return value;
    }
  }
  value.data = cursor.take(value.count * number_bytes(value.element), place);
  if (value.element == GgufType::Bool) check_booleans(file, value, place);
  return value;
}

// Sets bytes and data of a tensor whose offset counts from `data_start`.
void place_tensor(const GgufFile& file, GgufTensor& tensor, const uint8_t* base, uint64_t data_start, uint64_t offset,
                  uint64_t alignment, const std::string& place) {
  const uint64_t size = file.file_bytes();
  if (offset % alignment != 0) {
    file.fail(place + ": offset " + std::to_string(offset) + " is not a multiple of the alignment " + std::to_string(alignment));
  }
  if (offset > size - data_start) {
    file.fail(place + ": offset " + std::to_string(offset) + " in the data section at " + std::to_string(data_start) +
              " lies beyond the file, which ends at " + std::to_string(size));
  }
  const TensorTypeInfo* info = tensor_type_info(tensor.type);
  if (info == nullptr) return;  // listed, but nobody can read it: its size is not known
  if (tensor.shape[0] % info->block_weights != 0) {
    file.fail(place + ": shape " + shape_text(tensor) + " of " + info->name + ": a row of " + std::to_string(tensor.shape[0]) +
              " weights is not a multiple of the block of " + std::to_string(info->block_weights));
  }
  // At most 2^53 weights of at most 8 bytes: the product stays below 2^57.
  const uint64_t weights = tensor.shape[0] * tensor.shape[1] * tensor.shape[2] * tensor.shape[3];
  tensor.bytes = weights / info->block_weights * info->block_bytes;
  const uint64_t start = data_start + offset;
  if (tensor.bytes > size - start) {
    file.fail(place + ": needs " + std::to_string(tensor.bytes) + " bytes at offset " + std::to_string(start) +
              ", the file ends at " + std::to_string(size));
  }
  tensor.data = base + start;
}

}  // namespace

const TensorTypeInfo* tensor_type_info(TensorType type) {
  for (const TensorTypeInfo& info : kTensorTypes) {
    if (info.id == static_cast<uint32_t>(type)) return &info;
  }
  return nullptr;
}

std::string tensor_type_name(TensorType type) {
  const TensorTypeInfo* info = tensor_type_info(type);
  return info != nullptr ? info->name : "type " + std::to_string(static_cast<uint32_t>(type));
}

const char* gguf_type_name(GgufType type) {
  static const char* const names[] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                      "bool", "string", "array", "u64", "i64", "f64"};
  const uint32_t id = static_cast<uint32_t>(type);
  return id < sizeof names / sizeof *names ? names[id] : "unknown type";
}

std::string shape_text(const GgufTensor& tensor) {
  std::string out = "[";
  for (uint32_t d = 0; d < tensor.dims; d++) out += (d > 0 ? ", " : "") + std::to_string(tensor.shape[d]);
  return out + "]";
}

GgufFile::GgufFile(std::string path) : path_(std::move(path)) {
  name_ = path_.substr(path_.find_last_of('/') + 1);
}

GgufFile::~GgufFile() {
  if (base_ != nullptr) munmap(base_, size_);
}

void GgufFile::fail(const std::string& message) const { throw std::runtime_error(name_ + ": " + message); }

std::shared_ptr<GgufFile> GgufFile::open(const std::string& path) {
  std::shared_ptr<GgufFile> file(new GgufFile(path));
  file->map();
  file->parse();
  return file;
}

void GgufFile::map() {
  // O_NONBLOCK: a named pipe must be refused, not waited for.
  const int fd = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) throw std::runtime_error(path_ + ": " + std::strerror(errno));
  struct stat status;
  const bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  const uint64_t size = regular ? static_cast<uint64_t>(status.st_size) : 0;
  void* base = MAP_FAILED;
  if (size >= 24) base = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);
  if (!regular) throw std::runtime_error(path_ + ": not a regular file");
  if (size < 24) fail("expected a GGUF file, whose header has 24 bytes, found " + std::to_string(size) + " bytes");
  if (base == MAP_FAILED) throw std::runtime_error(path_ + ": " + std::strerror(error));
  base_ = static_cast<uint8_t*>(base);
  size_ = size;
}

void GgufFile::parse() {
  Cursor cursor(*this, base_, size_);
  if (std::memcmp(cursor.take(4, "magic"), "GGUF", 4) != 0) fail("expected a GGUF file, found other first bytes than \"GGUF\"");
  version_ = cursor.number<uint32_t>("version");
  if (version_ == 0x03000000 || version_ == 0x02000000) fail("a big-endian GGUF file; expected a little-endian one");
  if (version_ != 3) fail("expected GGUF version 3, found version " + std::to_string(version_));

  const uint64_t tensor_count = cursor.number<uint64_t>("tensor count");
  const uint64_t key_count = cursor.number<uint64_t>("key count");
  // The least a key and a tensor can take: 8 + 1 + 4 + 1 and 8 + 1 + 4 + 8 + 4 + 8 bytes.
  if (key_count > kMaxKeys || key_count > cursor.left() / 14) {
    fail("key count: " + std::to_string(key_count) + " keys do not fit in the " + std::to_string(cursor.left()) +
         " bytes left (at most " + std::to_string(kMaxKeys) + " keys)");
  }
  if (tensor_count > kMaxTensors || tensor_count > cursor.left() / 33) {
    fail("tensor count: " + std::to_string(tensor_count) + " tensors do not fit in the " + std::to_string(cursor.left()) +
         " bytes left (at most " + std::to_string(kMaxTensors) + " tensors)");
  }

  metadata_.reserve(key_count);
  keys_.reserve(key_count);
  for (uint64_t i = 0; i < key_count; i++) {
    const std::string numbered = "key " + std::to_string(i);
    const std::string_view key = cursor.text(kMaxKeyBytes, numbered);
    const std::string place = numbered + " (" + shown(key) + ")";
    const bool plain = std::all_of(key.begin(), key.end(), [](char c) { return c > 0x20 && c < 0x7f; });
    if (key.empty() || !plain) fail(place + ": expected a key of printable ASCII");
    if (!keys_.emplace(key, i).second) fail(place + ": the key occurs twice");
    metadata_.emplace_back(key, read_value(*this, cursor, place));
  }

  uint64_t alignment = 32;
  if (const GgufValue* value = get("general.alignment")) {
    if (value->type != GgufType::U32) fail_value("general.alignment", "u32", value);
    alignment = read_at<uint32_t>(value->data);
    if (alignment < 8 || alignment > kMaxAlignment || (alignment & (alignment - 1)) != 0) {
      fail("general.alignment: expected a power of two in 8 ... " + std::to_string(kMaxAlignment) + ", found " +
           std::to_string(alignment));
    }
  }

  std::vector<uint64_t> offsets;
  tensors_.reserve(tensor_count);
  names_.reserve(tensor_count);
  offsets.reserve(tensor_count);
  const auto place_of = [](uint64_t i, std::string_view name) {
    return "tensor " + std::to_string(i) + " (" + shown(name) + ")";
  };
  for (uint64_t i = 0; i < tensor_count; i++) {
    GgufTensor tensor{};
    tensor.name = cursor.text(kMaxNameBytes, "tensor " + std::to_string(i));
    const std::string place = place_of(i, tensor.name);
    const bool plain = std::all_of(tensor.name.begin(), tensor.name.end(), [](char c) { return c > 0x20 && c < 0x7f; });
    if (tensor.name.empty() || !plain) fail(place + ": expected a name of printable ASCII");
    if (!names_.emplace(tensor.name, i).second) fail(place + ": the name occurs twice");
    tensor.dims = cursor.number<uint32_t>(place);
    if (tensor.dims < 1 || tensor.dims > 4) fail(place + ": expected 1 to 4 dimensions, found " + std::to_string(tensor.dims));
    uint64_t weights = 1;
    for (uint32_t d = 0; d < 4; d++) {
      tensor.shape[d] = d < tensor.dims ? cursor.number<uint64_t>(place) : 1;
      if (tensor.shape[d] == 0) fail(place + ": dimension " + std::to_string(d) + " is zero");
      if (__builtin_mul_overflow(weights, tensor.shape[d], &weights) || weights > kMaxWeights) {
        fail(place + ": its shape has more than 2^53 weights");
      }
    }
    tensor.type = static_cast<TensorType>(cursor.number<uint32_t>(place));
    offsets.push_back(cursor.number<uint64_t>(place));
    tensors_.push_back(tensor);
  }

  // A file without tensors may end with its header, without the padding.
  const uint64_t data_start = (cursor.offset() + alignment - 1) / alignment * alignment;
  if (tensor_count > 0 && data_start > size_) {
    fail("the data section begins at " + std::to_string(data_start) + ", the file ends at " + std::to_string(size_));
  }
  for (uint64_t i = 0; i < tensor_count; i++) {
    place_tensor(*this, tensors_[i], base_, data_start, offsets[i], alignment, place_of(i, tensors_[i].name));
  }

  std::vector<size_t> order(tensor_count);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return offsets[a] != offsets[b] ? offsets[a] < offsets[b] : a < b;
  });
  for (size_t i = 1; i < order.size(); i++) {
    const GgufTensor& before = tensors_[order[i - 1]];
    if (offsets[order[i]] - offsets[order[i - 1]] < before.bytes) {
      fail(place_of(order[i], tensors_[order[i]].name) + ": overlaps " + place_of(order[i - 1], before.name));
    }
  }
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto at = names_.find(name);
  return at == names_.end() ? nullptr : &tensors_[at->second];
}

const GgufValue* GgufFile::get(std::string_view key) const {
  const auto at = keys_.find(key);
  return at == keys_.end() ? nullptr : &metadata_[at->second].second;
}

const GgufTensor& GgufFile::tensor(std::string_view name) const {
  const GgufTensor* found = find(name);
  if (found == nullptr) fail("tensor " + shown(name) + ": expected, found none");
  return *found;
}

void GgufFile::fail_value(std::string_view key, const char* expected, const GgufValue* found) const {
  fail(shown(key) + ": expected " + expected + ", found " + (found == nullptr ? "no such key" : describe(*found)));
}

uint64_t GgufFile::get_uint(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr || !is_integer(value->type)) fail_value(key, "an integer", value);
  if (value->type == GgufType::U64) return read_at<uint64_t>(value->data);
  const int64_t number = gguf_int(*value, 0);
  if (number < 0) fail(shown(key) + ": expected an integer that is not negative, found " + std::to_string(number));
  return static_cast<uint64_t>(number);
}

double GgufFile::get_float(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr || !is_float(value->type)) fail_value(key, "f32 or f64", value);
  return gguf_float(*value, 0);
}

bool GgufFile::get_bool(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr || value->type != GgufType::Bool) fail_value(key, "bool", value);
  return value->data[0] != 0;
}

std::string_view GgufFile::get_string(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr || value->type != GgufType::String) fail_value(key, "string", value);
  return value->texts[0];
}

uint64_t GgufFile::get_uint(std::string_view key, uint64_t fallback) const {
  return get(key) == nullptr ? fallback : get_uint(key);
}

double GgufFile::get_float(std::string_view key, double fallback) const {
  return get(key) == nullptr ? fallback : get_float(key);
}

bool GgufFile::get_bool(std::string_view key, bool fallback) const {
  return get(key) == nullptr ? fallback : get_bool(key);
}

std::string_view GgufFile::get_string(std::string_view key, std::string_view fallback) const {
  return get(key) == nullptr ? fallback : get_string(key);
}

std::vector<int64_t> GgufFile::get_ints(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr) return {};
  const bool fits = is_integer(value->element) || value->element == GgufType::Bool;
  if (value->type != GgufType::Array || !fits) fail_value(key, "an array of integers", value);
  std::vector<int64_t> out(value->count);
  for (uint64_t i = 0; i < value->count; i++) out[i] = gguf_int(*value, i);
  return out;
}

std::vector<double> GgufFile::get_floats(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr) return {};
  if (value->type != GgufType::Array || !is_float(value->element)) fail_value(key, "an array of f32 or f64", value);
  std::vector<double> out(value->count);
  for (uint64_t i = 0; i < value->count; i++) out[i] = gguf_float(*value, i);
  return out;
}

std::vector<std::string_view> GgufFile::get_strings(std::string_view key) const {
  const GgufValue* value = get(key);
  if (value == nullptr) return {};
  if (value->type != GgufType::Array || value->element != GgufType::String) fail_value(key, "an array of string", value);
  return value->texts;
}

int64_t gguf_int(const GgufValue& value, uint64_t i) {
  switch (value.element) {
    case GgufType::U8:
    case GgufType::Bool:
      return value.data[i];
    case GgufType::I8:
      return static_cast<int8_t>(value.data[i]);
    case GgufType::U16:
      return read_at<uint16_t>(value.data + 2 * i);
    case GgufType::I16:
      return read_at<int16_t>(value.data + 2 * i);
    case GgufType::U32:
      return read_at<uint32_t>(value.data + 4 * i);
    case GgufType::I32:
      return read_at<int32_t>(value.data + 4 * i);
    case GgufType::I64:
      return read_at<int64_t>(value.data + 8 * i);
    case GgufType::U64: {
      const uint64_t number = read_at<uint64_t>(value.data + 8 * i);
      if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        throw std::range_error("an integer beyond 2^63-1: " + std::to_string(number));
      }
      return static_cast<int64_t>(number);
    }
    default:
      throw std::logic_error("gguf_int: not an integer");
  }
}

double gguf_float(const GgufValue& value, uint64_t i) {
  if (value.element == GgufType::F32) return read_at<float>(value.data + 4 * i);
  if (value.element == GgufType::F64) return read_at<double>(value.data + 8 * i);
  throw std::logic_error("gguf_float: not a float");
}

}  // namespace penstock
