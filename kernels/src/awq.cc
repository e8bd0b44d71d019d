#include "awq.h"

#include "fixed_math.h"

namespace penstock {

namespace {

constexpr uint16_t kMostScale = 0x6c43;  // 4364: the greatest half whose fifteenfold is one

const GgufTensor& checked(const GgufFile& file, const std::string& name, TensorType type, uint64_t columns, uint64_t rows) {
  const GgufTensor& tensor = file.tensor(name);
  if (tensor.type != type || tensor.dims != 2 || tensor.shape[0] != columns || tensor.shape[1] != rows) {
    file.fail("tensor " + name + ": expected " + tensor_type_name(type) + " [" + std::to_string(columns) + ", " + std::to_string(rows) +
              "], found " + tensor_type_name(tensor.type) + " " + shape_text(tensor));
  }
  return tensor;
}

}  // namespace

bool has_awq(const GgufFile& file, const std::string& name) {
  for (const char* part : {".qweight", ".qzeros", ".scales"}) {
    if (file.find(name + part) != nullptr) return true;
  }
  return false;
}

AwqMatrix read_awq(const GgufFile& file, const std::string& name, int outputs, int inputs) {
  if (outputs % 8 != 0 || inputs % kAwqGroup != 0) {
    file.fail("tensor " + name + ".qweight: expected a multiple of 8 outputs and of " + std::to_string(kAwqGroup) +
              " inputs, found a matrix of " + std::to_string(outputs) + " outputs and " + std::to_string(inputs) + " inputs");
  }
  const uint64_t groups = inputs / kAwqGroup;
  const auto words = [&](const char* part, uint64_t rows) {
    return reinterpret_cast<const uint32_t*>(checked(file, name + part, TensorType::I32, outputs / 8, rows).data);
  };
  const GgufTensor& scales = checked(file, name + ".scales", TensorType::F16, outputs, groups);
  const AwqMatrix matrix = {outputs, inputs, words(".qweight", inputs), words(".qzeros", groups),
                            reinterpret_cast<const uint16_t*>(scales.data)};
  for (uint64_t i = 0; i < groups * outputs; ++i) {
    // A level is up to 15 from its zero, and a weight is a half. Not a number is more than anything.
    if ((matrix.scales[i] & 0x7fffu) > kMostScale) {
      file.fail("tensor " + name + ".scales, row " + std::to_string(i / outputs) + ": expected values up to 4364, found " +
                std::to_string(float_of_half(matrix.scales[i])));
    }
  }
  return matrix;
}

}  // namespace penstock
