#include "matrix.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "fixed_math.h"
#include "region.h"

namespace penstock {

namespace {

inline uint16_t load_u16(const uint8_t* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

[[noreturn]] void not_finite(const GgufFile& file, const GgufTensor& tensor, int output) {
  file.fail("tensor " + std::string(tensor.name) + ", row " + std::to_string(output) +
            ": expected finite values, found one that is not");
}

// A pointer to row `output` of the tensor.
const uint8_t* row_of(const GgufTensor& tensor, const Matrix& matrix, int output) {
  return tensor.data + tensor.bytes / matrix.outputs * output;
}

template <class Element>
void pack_floats(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int first, int count, uint8_t* into) {
  Element* to = reinterpret_cast<Element*>(into);
  for (int o = 0; o < count; ++o) {
    const uint8_t* from = row_of(tensor, matrix, first + o);
    for (int k = 0; k < matrix.inputs; ++k) {
      Element element;
      std::memcpy(&element, from + k * sizeof element, sizeof element);
      bool finite;
      if constexpr (sizeof element == 2) {
        finite = (element & 0x7c00u) != 0x7c00u;
      } else {
        finite = std::isfinite(element);
      }
      if (!finite) not_finite(file, tensor, first + o);
      to[size_t(k) * kPanel + o] = element;
    }
  }
}

bool finite_half(uint16_t half) { return (half & 0x7c00u) != 0x7c00u; }

void pack_q4(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int first, int count, uint8_t* into) {
  const bool with_offset = tensor.type == TensorType::Q4_1;
  const size_t block_bytes = with_offset ? 20 : 18;
  for (int o = 0; o < count; ++o) {
    const uint8_t* from = row_of(tensor, matrix, first + o);
    for (int b = 0; b < matrix.blocks(); ++b, from += block_bytes) {
      uint8_t* record = into + b * kQ4Record;
      const uint16_t scale = load_u16(from);
      const uint16_t offset = with_offset ? load_u16(from + 2) : half_of_float(-8.0f * float_of_half(scale));
      if (!finite_half(scale) || !finite_half(offset)) not_finite(file, tensor, first + o);
      const uint8_t* nibbles = from + (with_offset ? 4 : 2);
      for (int j = 0; j < 4; ++j) std::memcpy(record + 64 * j + 4 * o, nibbles + 4 * j, 4);
      std::memcpy(record + 256 + 2 * o, &scale, 2);
      std::memcpy(record + 288 + 2 * o, &offset, 2);
    }
  }
}

void pack_q8(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int first, int count, uint8_t* into) {
  uint8_t* scales = into + matrix.blocks() * kQ8Record;
  for (int o = 0; o < count; ++o) {
    const uint8_t* from = row_of(tensor, matrix, first + o);
    for (int b = 0; b < matrix.blocks(); ++b, from += 34) {
      const uint16_t scale = load_u16(from);
      if (!finite_half(scale)) not_finite(file, tensor, first + o);
      for (int j = 0; j < 8; ++j) std::memcpy(into + b * kQ8Record + 64 * j + 4 * o, from + 2 + 4 * j, 4);
      std::memcpy(scales + 2 * (b * kPanel + o), &scale, 2);
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
  matrix.inputs = static_cast<int>(tensor.shape[0]);
  matrix.outputs = static_cast<int>(tensor.shape[1]);
  matrix.panels = (matrix.outputs + kPanel - 1) / kPanel;
  const size_t inputs = tensor.shape[0];
  switch (tensor.type) {
    case TensorType::F32:
      matrix.format = MatrixFormat::F32;
      matrix.panel_bytes = inputs * kPanel * 4;
      break;
    case TensorType::F16:
      matrix.format = MatrixFormat::F16;
      matrix.panel_bytes = inputs * kPanel * 2;
      break;
    case TensorType::Q4_0:
    case TensorType::Q4_1:
      matrix.format = MatrixFormat::Q4;
      matrix.panel_bytes = inputs / kBlock * kQ4Record;
      break;
    case TensorType::Q8_0:
      matrix.format = MatrixFormat::Q8;
      matrix.panel_bytes = inputs / kBlock * (kQ8Record + 2 * kPanel);
      break;
    default: file.fail(place + "expected type F32, F16, Q4_0, Q4_1 or Q8_0, found " + tensor_type_name(tensor.type));
  }
  if (matrix.quantised() && inputs % kBlock != 0) {
    file.fail(place + "expected rows of a multiple of 32 values for type " + tensor_type_name(tensor.type) + ", found " +
              std::to_string(inputs));
  }
  matrix.panel_bytes = round_up(matrix.panel_bytes, 64);
  return matrix;
}

void pack_panel(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int panel) {
  uint8_t* into = matrix.data + panel * matrix.panel_bytes;  // zero so far, so the padding is
  const int first = panel * kPanel;
  const int count = matrix.outputs - first < kPanel ? matrix.outputs - first : kPanel;
  switch (matrix.format) {
    case MatrixFormat::F32: return pack_floats<float>(file, tensor, matrix, first, count, into);
    case MatrixFormat::F16: return pack_floats<uint16_t>(file, tensor, matrix, first, count, into);
    case MatrixFormat::Q4: return pack_q4(file, tensor, matrix, first, count, into);
    case MatrixFormat::Q8: return pack_q8(file, tensor, matrix, first, count, into);
  }
}

void read_row(const Matrix& matrix, int output, float* into) {
  const uint8_t* panel = matrix.panel(output / kPanel);
  const int o = output % kPanel;
  for (int k = 0; k < matrix.inputs; ++k) {
    const int b = k / kBlock;
    const int i = k % kBlock;
    switch (matrix.format) {
      case MatrixFormat::F32: std::memcpy(&into[k], panel + 4 * (size_t(k) * kPanel + o), 4); break;
      case MatrixFormat::F16: into[k] = float_of_half(load_u16(panel + 2 * (size_t(k) * kPanel + o))); break;
      case MatrixFormat::Q4: {
        const uint8_t* record = panel + b * kQ4Record;
        const uint8_t pair = record[64 * (i % 16 / 4) + 4 * o + i % 4];
        const float nibble = static_cast<float>(i < 16 ? pair & 15 : pair >> 4);
        into[k] = std::fma(nibble, float_of_half(load_u16(record + 256 + 2 * o)), float_of_half(load_u16(record + 288 + 2 * o)));
        break;
      }
      case MatrixFormat::Q8: {
        const uint8_t* scales = panel + matrix.blocks() * kQ8Record;
        const float value = static_cast<float>(static_cast<int8_t>(panel[b * kQ8Record + 64 * (i / 4) + 4 * o + i % 4]));
        into[k] = value * float_of_half(load_u16(scales + 2 * (b * kPanel + o)));
        break;
      }
    }
  }
}

}  // namespace penstock
