// Matrices of AWQ's W4A16 (Lin et al. 2023) in AutoAWQ's "gemm" layout, as a file has them: three tensors each.
//
//   X.qweight  I32 [outputs / 8, inputs]        eight levels of four bits a word, in the order of kAwqOrder
//   X.qzeros   I32 [outputs / 8, inputs / 128]  zeros, likewise
//   X.scales   F16 [outputs, inputs / 128]      (all fastest first)
//
// weight = (level - zero) * scale, whose zero and scale are those of its output and its group of 128 inputs.
#pragma once

#include <cstdint>
#include <string>

#include "gguf.h"

namespace penstock {

constexpr int kAwqGroup = 128;
constexpr int kAwqOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};  // nibble of output 0 … 7

struct AwqMatrix {
  int outputs;
  int inputs;
  const uint32_t* levels;  // [inputs, outputs / 8]
  const uint32_t* zeros;   // [inputs / 128, outputs / 8]
  const uint16_t* scales;  // [inputs / 128, outputs] halves

  unsigned level(int input, int output) const { return nibble(levels, input, output); }
  unsigned zero(int group, int output) const { return nibble(zeros, group, output); }
  uint16_t scale(int group, int output) const { return scales[size_t(group) * outputs + output]; }

 private:
  unsigned nibble(const uint32_t* rows, int row, int output) const {
    return rows[size_t(row) * (outputs / 8) + output / 8] >> 4 * kAwqOrder[output % 8] & 15u;
  }
};

// Whether the file has any of the three tensors of the matrix `name`.
bool has_awq(const GgufFile& file, const std::string& name);

// The matrix `name`, in the file's mapping. Throws std::runtime_error that names the tensor which is missing, of another type or
// shape, or has a scale whose weights no half holds.
AwqMatrix read_awq(const GgufFile& file, const std::string& name, int outputs, int inputs);

}  // namespace penstock
