#include "packed_weights.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../fixed_math.h"

namespace penstock::cuda {

namespace {

WeightKind kind_of(TensorType type) {
  switch (type) {
    case TensorType::Q8_0:
    case TensorType::Q5_0: return WeightKind::Byte;
    case TensorType::Q6_K: return WeightKind::ByteHalf;
    case TensorType::Q5_1:
    case TensorType::Q5_K: return WeightKind::ByteOffset;
    case TensorType::Q4_0: return WeightKind::Nibble;
    case TensorType::Q4_1:
    case TensorType::Q4_K: return WeightKind::NibbleOffset;
    default: return WeightKind::Half;
  }
}

DeviceMatrix describe(WeightKind kind, int outputs, int inputs) {
  DeviceMatrix matrix;
  matrix.kind = kind;
  matrix.outputs = outputs;
  matrix.inputs = inputs;
  matrix.panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  matrix.chunks = (inputs + kChunkInputs - 1) / kChunkInputs;
  return matrix;
}

uint16_t checked_half(float value, const char* what) {
  const uint16_t half = half_of_float(value);
  if (!std::isfinite(float_of_half(half))) {
    throw std::runtime_error(std::string(what) + " of " + std::to_string(value) + " is more than the device's halves can hold");
  }
  return half;
}

}  // namespace

DeviceMatrix describe_for_device(const Matrix& matrix) {
  return matrix.awq ? describe_for_device(*matrix.awq) : describe(kind_of(matrix.type), matrix.outputs, matrix.inputs);
}
DeviceMatrix describe_for_device(const AwqMatrix& matrix) { return describe(WeightKind::NibbleZero, matrix.outputs, matrix.inputs); }

size_t panel_level_bytes(const DeviceMatrix& matrix) { return matrix.level_bytes() / matrix.panels; }
size_t panel_scale_bytes(const DeviceMatrix& matrix) { return matrix.scale_bytes() / matrix.panels; }

void PanelWriter::put_level(int o, int input, unsigned level) {
  const int lane = o % 8 * 4 + input % kChunkInputs / 16;
  const int step = input % 16 / 4;
  const int i = o / 8 + input % 4 / 2 * 2;  // which a
  const int second = input % 2;
  uint8_t* chunk = levels_ + input / kChunkInputs * matrix_.chunk_bytes();
  const auto word = [&](int plane, int w) { return chunk + plane * 512 + lane * 16 + w * 4; };
  const auto add = [](uint8_t* at, unsigned bits, int shift) {
    uint32_t old;
    std::memcpy(&old, at, sizeof old);
    old |= bits << shift;
    std::memcpy(at, &old, sizeof old);
  };
  switch (level_bits(matrix_.kind)) {
    case 16: return add(word(step, i), level, 16 * second);
    case 8: return add(word(step / 2, step % 2 * 2 + i / 2), level, i % 2 * 16 + 8 * second);
    default: return add(word(0, step), level, 4 * i + 16 * second);
  }
}

void PanelWriter::put_numbers(int o, int group, uint16_t scale, uint16_t second) {
  const int count = group_numbers(matrix_.kind);
  uint8_t* at = scales_ + (size_t(group) * kPanelOutputs + o) * count * sizeof(uint16_t);
  std::memcpy(at, &scale, sizeof scale);
  if (count == 2) std::memcpy(at + sizeof scale, &second, sizeof second);
}

void repack_panel(const Matrix& matrix, int panel, const DeviceMatrix& to, uint8_t* levels, uint8_t* scales) {
  if (matrix.awq) return repack_panel(*matrix.awq, panel, to, levels, scales);
  PanelWriter writer(to, levels, scales);
  const uint8_t* from = matrix.panel(panel);
  for (int o = 0; o < kPanel && panel * kPanel + o < matrix.outputs; ++o) {
    if (!matrix.quantised()) {
      for (int input = 0; input < matrix.inputs; ++input)
        writer.put_level(o, input, checked_half(read_float(matrix, from, input, o), "a weight"));
      continue;
    }
    // What read_block has taken off, and what the device takes off.
    const int centre = level_bits(to.kind) == 8 ? 128 : to.kind == WeightKind::Nibble ? 8 : 0;
    for (int b = 0; b < matrix.blocks(); ++b) {
      const Block block = read_block(matrix, from, b, o);
      for (int i = 0; i < kBlock; ++i) writer.put_level(o, b * kBlock + i, static_cast<unsigned>(block.levels[i] + centre));
      if (to.kind == WeightKind::ByteHalf) {
        for (int h = 0; h < 2; ++h)
          writer.put_numbers(o, 2 * b + h, checked_half(static_cast<float>(block.factors[h]) * block.scale, "a scale"));
      } else {
        writer.put_numbers(o, b, checked_half(block.scale, "a scale"), checked_half(block.offset, "an offset"));
      }
    }
  }
}

void repack_panel(const AwqMatrix& matrix, int panel, const DeviceMatrix& to, uint8_t* levels, uint8_t* scales) {
  PanelWriter writer(to, levels, scales);
  for (int o = 0; o < kPanelOutputs && panel * kPanelOutputs + o < matrix.outputs; ++o) {
    const int output = panel * kPanelOutputs + o;
    for (int input = 0; input < matrix.inputs; ++input) writer.put_level(o, input, matrix.level(input, output));
    for (int group = 0; group < matrix.inputs / kAwqGroup; ++group) {
      writer.put_numbers(o, group, matrix.scale(group, output), half_of_float(static_cast<float>(matrix.zero(group, output))));
    }
  }
}

}  // namespace penstock::cuda
