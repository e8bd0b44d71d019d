// A weight matrix, packed once at load in the layout that all instruction sets share.
//
// A panel holds 16 outputs; outputs beyond the matrix are zero. For one panel:
//   F32, F16  [inputs, 16]
//   Q4        [inputs / 32] records of 320 bytes: four chunks of 64 bytes, where byte 4*o + i of chunk j holds input 4*j + i of
//             output o in its low and input 16 + 4*j + i in its high nibble; then f16 scale[16], f16 offset[16].
//             Weight = nibble * scale + offset. Q4_1 as it is; Q4_0 with offset = -8 * scale, which f16 holds exactly.
//   Q8        [inputs / 32] records of 512 bytes: byte 64*j + 4*o + i holds input 4*j + i of output o;
//             then f16 scale [inputs / 32, 16]. Weight = byte * scale.
// 64 bytes of a chunk are 16 lanes of four bytes: one AVX-512 register, two AVX2 registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gguf.h"

namespace penstock {

constexpr int kPanel = 16;         // outputs of a panel
constexpr int kBlock = 32;         // inputs of a quantised block
constexpr size_t kQ4Record = 320;  // bytes of one block of a Q4 panel
constexpr size_t kQ8Record = 512;  // bytes of one block of a Q8 panel, scales apart

enum class MatrixFormat { F32, F16, Q4, Q8 };

struct Matrix {
  MatrixFormat format = MatrixFormat::F32;
  int outputs = 0;
  int inputs = 0;
  int panels = 0;
  size_t panel_bytes = 0;
  uint8_t* data = nullptr;  // [panels, panel_bytes]; belongs to the model

  const uint8_t* panel(int index) const { return data + index * panel_bytes; }
  size_t bytes() const { return panels * panel_bytes; }
  int blocks() const { return inputs / kBlock; }
  // Whether its inputs are to be quantised to int8 (see Kernels::quantise).
  bool quantised() const { return format == MatrixFormat::Q4 || format == MatrixFormat::Q8; }
};

// The matrix that a tensor becomes, without its data. Throws where the type is not supported or a row does not fit it.
Matrix describe_matrix(const GgufFile& file, const GgufTensor& tensor);

// Packs one panel into `matrix.data`. Throws on a scale that is not finite, as no result could be.
void pack_panel(const GgufFile& file, const GgufTensor& tensor, const Matrix& matrix, int panel);

// One row as floats, for embeddings.
void read_row(const Matrix& matrix, int output, float* into /* [inputs] */);

}  // namespace penstock
