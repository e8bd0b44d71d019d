#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fixed_math.h"
#include "region.h"

namespace penstock {

namespace {

template <class T>
inline T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

inline float half_at(const uint8_t* at, int index) { return float_of_half(load<uint16_t>(at + 2 * index)); }

bool finite_half(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

bool finite_element(TensorType type, const uint8_t* at) {
  switch (type) {
    case TensorType::F32: return std::isfinite(load<float>(at));
    case TensorType::BF16: return (load<uint16_t>(at) & 0x7f80u) != 0x7f80u;
    default: return finite_half(load<uint16_t>(at));
  }
}

[[noreturn]] void not_finite(const GgufFile& file, const GgufTensor& tensor, int output) {
  file.fail("tensor " + std::string(tensor.name) + ", row " + std::to_string(output) +
            ": expected finite values, found one that is not");
}

void pack_floats(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int first, int count, uint8_t* into) {
  const size_t size = tensor_type_info(tensor.type)->block_bytes;
  for (int o = 0; o < count; ++o) {
    const uint8_t* from = tensor.data + tensor.bytes / matrix.outputs * (first + o);
    for (int k = 0; k < matrix.inputs; ++k, from += size) {
      if (!finite_element(tensor.type, from)) not_finite(file, tensor, first + o);
      std::memcpy(into + (size_t(k) * kPanel + o) * size, from, size);
    }
  }
}

// A block of 32 as the file has it: levels without the centre taken off, and the scales of its type.
struct FileBlock {
  uint8_t levels[kBlock];
  uint16_t scale;      // f16
  uint16_t offset;     // f16; of Offset and Factors
  uint8_t factors[2];  // of Factors: scale's and offset's; of HalfFactors: first and last 16 inputs
};

// Byte j of the nibbles has input j in its low and input 16 + j in its high half, bit j of the fifth bits is input j's.
void read_nibbles(const uint8_t* nibbles, uint32_t fifths, uint8_t* levels) {
  for (int j = 0; j < 16; ++j) {
    levels[j] = static_cast<uint8_t>((nibbles[j] & 15) | (fifths >> j & 1) << 4);
    levels[16 + j] = static_cast<uint8_t>((nibbles[j] >> 4) | (fifths >> (16 + j) & 1) << 4);
  }
}

// Factors of block s: eight of six bits each for the scale and the offset, in 12 bytes. The first four of both fill the low six
// bits of bytes 0 … 7; the others have their low halves in bytes 8 … 11 and their upper two bits atop those of bytes 0 … 7.
void read_factors(const uint8_t* packed, int s, uint8_t* factors) {
  if (s < 4) {
    factors[0] = packed[s] & 63;
    factors[1] = packed[4 + s] & 63;
  } else {
    factors[0] = static_cast<uint8_t>((packed[4 + s] & 15) | (packed[s - 4] >> 6) << 4);
    factors[1] = static_cast<uint8_t>((packed[4 + s] >> 4) | (packed[s] >> 6) << 4);
  }
}

// Block s of a super-block. Blocks 2c and 2c + 1 are the low and high halves of 32 bytes of nibbles; bit s of byte i of the fifth
// bits is input i's.
void read_q4_q5_k(const uint8_t* from, bool with_fifths, int s, FileBlock& block) {
  block.scale = load<uint16_t>(from);
  block.offset = load<uint16_t>(from + 2) ^ 0x8000u;  // the file's is subtracted
  read_factors(from + 4, s, block.factors);
  const uint8_t* fifths = from + 16;
  const uint8_t* nibbles = from + (with_fifths ? 48 : 16) + s / 2 * kBlock;
  for (int i = 0; i < kBlock; ++i) {
    const int fifth = with_fifths ? fifths[i] >> s & 1 : 0;
    block.levels[i] = static_cast<uint8_t>((s % 2 == 0 ? nibbles[i] & 15 : nibbles[i] >> 4) | fifth << 4);
  }
}

// Half a super-block has 64 bytes of nibbles, whose low halves are its blocks 0 and 1 and whose high halves 2 and 3, and 32 bytes
// of which bits 2q and 2q + 1 are the upper two of its block q.
void read_q6_k(const uint8_t* from, int s, FileBlock& block) {
  const int q = s % 4;
  const uint8_t* nibbles = from + s / 4 * 64 + q % 2 * kBlock;
  const uint8_t* upper = from + 128 + s / 4 * 32;
  for (int i = 0; i < kBlock; ++i) {
    block.levels[i] = static_cast<uint8_t>((q < 2 ? nibbles[i] & 15 : nibbles[i] >> 4) | (upper[i] >> 2 * q & 3) << 4);
  }
  std::memcpy(block.factors, from + 192 + 2 * s, 2);
  block.scale = load<uint16_t>(from + 208);
}

// Block b of the row that begins at `row`.
FileBlock read_file_block(TensorType type, const uint8_t* row, int b) {
  FileBlock block = {};
  const TensorTypeInfo& info = *tensor_type_info(type);
  const int blocks = static_cast<int>(info.block_weights) / kBlock;
  const uint8_t* from = row + size_t(b / blocks) * info.block_bytes;
  const int s = b % blocks;
  block.scale = load<uint16_t>(from);  // but for Q6_K
  switch (type) {
    case TensorType::Q4_0: read_nibbles(from + 2, 0, block.levels); break;
    case TensorType::Q5_0: read_nibbles(from + 6, load<uint32_t>(from + 2), block.levels); break;
    case TensorType::Q4_1:
      block.offset = load<uint16_t>(from + 2);
      read_nibbles(from + 4, 0, block.levels);
      break;
    case TensorType::Q5_1:
      block.offset = load<uint16_t>(from + 2);
      read_nibbles(from + 8, load<uint32_t>(from + 4), block.levels);
      break;
    case TensorType::Q8_0: std::memcpy(block.levels, from + 2, kBlock); break;
    case TensorType::Q4_K: read_q4_q5_k(from, false, s, block); break;
    case TensorType::Q5_K: read_q4_q5_k(from, true, s, block); break;
    case TensorType::Q6_K: read_q6_k(from, s, block); break;
    default: break;
  }
  return block;
}

// Four inputs at a time: word k of the levels is inputs 4k … 4k + 3.
void put_levels(int bits, const uint8_t* levels, uint8_t* into, int o) {
  uint32_t words[8];
  std::memcpy(words, levels, sizeof words);
  const auto put = [&](int chunk, uint32_t word) { std::memcpy(into + 64 * chunk + 4 * o, &word, sizeof word); };
  if (bits == 8) {
    for (int k = 0; k < 8; ++k) put(k, words[k]);
    return;
  }
  for (int j = 0; j < 4; ++j) put(j, (words[j] & 0x0f0f0f0fu) | (words[4 + j] & 0x0f0f0f0fu) << 4);
  if (bits == 5) {
    uint32_t fifths = 0;
    for (int k = 0; k < 8; ++k) fifths |= (words[k] >> 4 & 0x01010101u) << k;
    put(4, fifths);
  }
  if (bits == 6) {
    for (int c = 0; c < 2; ++c) {
      uint32_t upper = 0;
      for (int m = 0; m < 4; ++m) upper |= (words[4 * c + m] >> 4 & 0x03030303u) << 2 * m;
      put(4 + c, upper);
    }
  }
}

void put_scales(Scaling scaling, const FileBlock& block, int s, uint8_t* into, int o) {
  std::memcpy(into + 2 * o, &block.scale, 2);
  switch (scaling) {
    case Scaling::Centred: break;
    case Scaling::Offset: std::memcpy(into + 32 + 2 * o, &block.offset, 2); break;
    case Scaling::Factors:
      std::memcpy(into + 32 + 2 * o, &block.offset, 2);
      into[64 + 32 * s + o] = block.factors[0];
      into[64 + 32 * s + 16 + o] = block.factors[1];
      break;
    case Scaling::HalfFactors: std::memcpy(into + 64 + 32 * s + 2 * o, block.factors, 2); break;
  }
}

// Where a panel has block b.
struct BlockPlace {
  size_t levels;
  size_t scales;  // of its record
  int index;      // within the record
};

BlockPlace place_of(BlockFormat format, int b) {
  const int index = b % format.record_blocks();
  const size_t record = b / format.record_blocks() * format.record_bytes();
  return {record + index * format.level_bytes(), record + format.record_blocks() * format.level_bytes(), index};
}

FileBlock read_awq_block(const AwqMatrix& awq, int output, int b) {
  FileBlock block = {};
  const int group = b * kBlock / kAwqGroup;
  block.scale = awq.scale(group, output);
  block.offset = half_of_float(-static_cast<float>(awq.zero(group, output)) * float_of_half(block.scale));
  for (int i = 0; i < kBlock; ++i) block.levels[i] = static_cast<uint8_t>(awq.level(b * kBlock + i, output));
  return block;
}

// `read` gives block b of an output.
template <class Read>
void pack_blocks(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int first, int count, uint8_t* into, Read read) {
  const BlockFormat format = block_format(matrix.type);
  for (int o = 0; o < count; ++o) {
    for (int b = 0; b < matrix.blocks(); ++b) {
      const FileBlock block = read(first + o, b);
      if (!finite_half(block.scale) || !finite_half(block.offset)) not_finite(file, tensor, first + o);
      const BlockPlace place = place_of(format, b);
      put_levels(format.bits, block.levels, into + place.levels, o);
      put_scales(format.scaling, block, place.index, into + place.scales, o);
    }
  }
}

}  // namespace

Matrix describe_matrix(const GgufFile& file, const GgufTensor& tensor) {
  const std::string place = "tensor " + std::string(tensor.name) + ": ";
  constexpr uint64_t kMost = uint64_t{1} << 30;
  if (tensor.dims > 2 || tensor.shape[0] == 0 || tensor.shape[1] == 0 || tensor.shape[0] > kMost || tensor.shape[1] > kMost) {
    file.fail(place + "expected a matrix with dimensions in 1 … 2^30");
  }
  Matrix matrix;
  matrix.type = tensor.type;
  matrix.inputs = static_cast<int>(tensor.shape[0]);
  matrix.outputs = static_cast<int>(tensor.shape[1]);
  matrix.panels = (matrix.outputs + kPanel - 1) / kPanel;
  switch (tensor.type) {
    case TensorType::F32:
    case TensorType::F16:
    case TensorType::BF16:
      matrix.panel_bytes = size_t(matrix.inputs) * kPanel * tensor_type_info(tensor.type)->block_bytes;
      break;
    default: {
      const BlockFormat format = block_format(tensor.type);
      if (format.bits == 0) {
        file.fail(place + "expected type F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K, found " +
                  tensor_type_name(tensor.type));
      }
      matrix.panel_bytes = matrix.blocks() / format.record_blocks() * format.record_bytes();
    }
  }
  matrix.panel_bytes = round_up(matrix.panel_bytes, 64);
  return matrix;
}

Matrix describe_matrix(const AwqMatrix& awq, AwqForm form) {
  Matrix matrix;
  matrix.type = TensorType::Q4_1;
  matrix.inputs = awq.inputs;
  matrix.outputs = awq.outputs;
  matrix.panels = (matrix.outputs + kPanel - 1) / kPanel;
  if (form == AwqForm::AsInFile) matrix.awq = awq;
  else matrix.panel_bytes = matrix.blocks() * block_format(matrix.type).record_bytes();
  return matrix;
}

void pack_panel(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int panel) {
  uint8_t* into = matrix.data + panel * matrix.panel_bytes;  // zero so far, so the padding is
  const int first = panel * kPanel;
  const int count = std::min(kPanel, matrix.outputs - first);
  if (matrix.quantised()) {
    pack_blocks(file, tensor, matrix, first, count, into, [&](int output, int b) {
      return read_file_block(matrix.type, tensor.data + tensor.bytes / matrix.outputs * output, b);
    });
  } else {
    pack_floats(file, tensor, matrix, first, count, into);
  }
}

void pack_panel(const GgufFile& file, const GgufTensor& scales, const AwqMatrix& awq, const Matrix& matrix, int panel) {
  const int first = panel * kPanel;
  pack_blocks(file, scales, matrix, first, std::min(kPanel, matrix.outputs - first), matrix.data + panel * matrix.panel_bytes,
              [&](int output, int b) { return read_awq_block(awq, output, b); });
}

Block read_block(const Matrix& matrix, const uint8_t* panel, int b, int o) {
  const BlockFormat format = block_format(matrix.type);
  const BlockPlace place = place_of(format, b);
  const uint8_t* chunks = panel + place.levels + 4 * o;
  Block block = {{}, {1, 1}, 0.0f, 0.0f};
  for (int i = 0; i < kBlock; ++i) {
    const int k = i / 4;
    const int byte = i % 4;
    if (format.bits == 8) {
      block.levels[i] = static_cast<int8_t>(chunks[64 * k + byte]);
      continue;
    }
    const int pair = chunks[64 * (k % 4) + byte];
    int level = k < 4 ? pair & 15 : pair >> 4;
    if (format.bits == 5) level |= (chunks[256 + byte] >> k & 1) << 4;
    if (format.bits == 6) level |= (chunks[256 + 64 * (k / 4) + byte] >> 2 * (k % 4) & 3) << 4;
    block.levels[i] = static_cast<int16_t>(level - format.centre());
  }
  const uint8_t* scales = panel + place.scales;
  const int s = place.index;
  block.scale = half_at(scales, o);
  if (format.has_offset()) block.offset = half_at(scales + 32, o);
  if (format.scaling == Scaling::Factors) {
    block.scale *= scales[64 + 32 * s + o];
    block.offset *= scales[64 + 32 * s + 16 + o];
  }
  if (format.scaling == Scaling::HalfFactors) {
    for (int h = 0; h < 2; ++h) block.factors[h] = static_cast<int8_t>(scales[64 + 32 * s + 2 * o + h]);
  }
  return block;
}

float read_float(const Matrix& matrix, const uint8_t* panel, int input, int o) {
  const size_t index = size_t(input) * kPanel + o;
  switch (matrix.type) {
    case TensorType::F32: return load<float>(panel + 4 * index);
    case TensorType::BF16: return float_of(uint32_t{load<uint16_t>(panel + 2 * index)} << 16);
    default: return float_of_half(load<uint16_t>(panel + 2 * index));
  }
}

void read_row(const Matrix& matrix, int output, float* into) {
  const uint8_t* panel = matrix.panel(output / kPanel);
  const int o = output % kPanel;
  if (!matrix.quantised()) {
    for (int k = 0; k < matrix.inputs; ++k) into[k] = read_float(matrix, panel, k, o);
    return;
  }
  for (int b = 0; b < matrix.blocks(); ++b, into += kBlock) {
    const Block block = read_block(matrix, panel, b, o);
    for (int i = 0; i < kBlock; ++i) {
      into[i] = std::fma(static_cast<float>(block.levels[i] * block.factors[i / 16]), block.scale, block.offset);
    }
  }
}

}  // namespace penstock
