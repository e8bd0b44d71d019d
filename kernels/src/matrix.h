// A weight matrix, packed once at load in the layout that all instruction sets share.
//
// A panel holds 16 outputs; outputs beyond the matrix are zero. F32, F16 and BF16 are [inputs, 16]. The quantised types divide
// the inputs into blocks of 32, whatever the file's blocks are, and a weight has a level of so many bits. A record is a block, or
// eight of those that share a scale; a panel is read from its beginning to its end.
//
//   panel        | record | record | … |
//   record       | levels of its blocks | scales |
//
//   levels       chunks of 64 bytes; byte 4 * o + i of each belongs to output o, i = 0 … 3
//
//                bit         7 | 6 | 5 | 4 | 3 | 2 | 1 | 0
//     4 bits     chunk j     16 + 4j + i   |     4j + i               j = 0 … 3; the numbers are inputs
//     5 bits     as 4 bits, then the fifth bits of all inputs:
//                chunk 4     28+i|24+i|20+i|16+i|12+i|8+i|4+i|i
//     6 bits     as 4 bits, then the upper two bits, of 16 inputs a chunk:
//                chunk 4 + c 16c+12+i|16c+8+i|16c+4+i|16c+i           c = 0, 1
//     8 bits     chunk k     4k + i, signed                           k = 0 … 7
//
//   scales       f16 but for the factors, which are bytes; of 16 outputs side by side
//
//     Centred      | scale |                                                              Q4_0, Q5_0, Q8_0
//     Offset       | scale | offset |                                                     Q4_1, Q5_1
//     Factors      | scale | offset | 8 x | u8 factor | u8 factor of the offset |         Q4_K, Q5_K
//     HalfFactors  | scale | 32 zeros | 8 x | i8 factors of the first and last 16 inputs | Q6_K
//
//   weight       Centred      (level - centre) * scale
//                Offset       level * scale + offset
//                Factors      level * (factor * scale) + (factor of the offset * offset)
//                HalfFactors  (level - centre) * factor * scale
//
// where the centre is half the number of levels; the levels of 8 bits are signed, so theirs is 0. Every product is exact in a
// float. 64 bytes of a chunk are 16 lanes of four bytes: one AVX-512 register, two AVX2 registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "awq.h"
#include "gguf.h"

namespace penstock {

constexpr int kPanel = 16;  // outputs of a panel
constexpr int kBlock = 32;  // inputs of a block

enum class Scaling { Centred, Offset, Factors, HalfFactors };

struct BlockFormat {
  int bits;  // of a level; 0: the type is not quantised
  Scaling scaling;

  constexpr bool has_offset() const { return scaling == Scaling::Offset || scaling == Scaling::Factors; }
  // What is subtracted from a level without a sign.
  constexpr int centre() const { return has_offset() || bits == 8 ? 0 : 1 << (bits - 1); }

  constexpr int record_blocks() const { return scaling == Scaling::Centred || scaling == Scaling::Offset ? 1 : 8; }
  // Bytes of a panel's levels of one block.
  constexpr size_t level_bytes() const { return size_t{64} * bits; }
  // Bytes of a panel's scales of one record.
  constexpr size_t scale_bytes() const {
    switch (scaling) {
      case Scaling::Centred: return 32;
      case Scaling::Offset: return 64;
      default: return 64 + 8 * 32;
    }
  }
  constexpr size_t record_bytes() const { return record_blocks() * level_bytes() + scale_bytes(); }
};

constexpr BlockFormat block_format(TensorType type) {
  switch (type) {
    case TensorType::Q4_0: return {4, Scaling::Centred};
    case TensorType::Q4_1: return {4, Scaling::Offset};
    case TensorType::Q5_0: return {5, Scaling::Centred};
    case TensorType::Q5_1: return {5, Scaling::Offset};
    case TensorType::Q8_0: return {8, Scaling::Centred};
    case TensorType::Q4_K: return {4, Scaling::Factors};
    case TensorType::Q5_K: return {5, Scaling::Factors};
    case TensorType::Q6_K: return {6, Scaling::HalfFactors};
    default: return {0, Scaling::Centred};
  }
}

// What becomes of AWQ's matrices: Q4_1's packed form, or what they are in the file, for a device that has a form of their own.
enum class AwqForm { Packed, AsInFile };

struct Matrix {
  TensorType type = TensorType::F32;
  int outputs = 0;
  int inputs = 0;
  int panels = 0;
  size_t panel_bytes = 0;
  uint8_t* data = nullptr;  // [panels, panel_bytes]; belongs to the model
  std::optional<AwqMatrix> awq;  // where it is left as the file has it, and not packed

  const uint8_t* panel(int index) const { return data + index * panel_bytes; }
  size_t bytes() const { return panels * panel_bytes; }
  int blocks() const { return inputs / kBlock; }
  // Whether its inputs are to be quantised to int8 (see Kernels::quantise).
  bool quantised() const { return block_format(type).bits != 0; }
};

// The matrix that a tensor becomes, without its data. Throws where the type is not supported.
Matrix describe_matrix(const GgufFile& file, const GgufTensor& tensor);
Matrix describe_matrix(const AwqMatrix& awq, AwqForm form);

// Packs one panel into `matrix.data`. Throws on a scale that is not finite, as no result could be.
void pack_panel(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int panel);
// Of AWQ's, as Q4_1: an offset of -zero * scale, rounded to f16. That moves the weights of a group together, by at most 15 * scale
// / 2^11, a 136th of a level, and by nothing where the zero is a power of two.
void pack_panel(const GgufFile& file, const GgufTensor& scales, const AwqMatrix& awq, const Matrix& matrix, int panel);

// What a block holds of one output: weight i = levels[i] * factors[i / 16] * scale + offset.
struct Block {
  int16_t levels[kBlock];  // less the centre
  int32_t factors[2];      // 1 but for HalfFactors
  float scale;
  float offset;  // 0 where there is none
};
Block read_block(const Matrix& matrix, const uint8_t* panel, int block, int o);

// Weight [input, o] of a panel that is not quantised.
float read_float(const Matrix& matrix, const uint8_t* panel, int input, int o);

// One row as floats, for embeddings.
void read_row(const Matrix& matrix, int output, float* into /* [inputs] */);

}  // namespace penstock
