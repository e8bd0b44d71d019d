// The seam between the model and an instruction set: one table of functions for each.
//
// Every table gives the same bits. What each function computes, and in which order it adds, is defined by the reference
// (reference.cc); the others are compared with it bit for bit in test/kernels. Vectors of floats are padded to a multiple of
// 16 with zeros, and `padded` lengths include that padding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../matrix.h"

namespace penstock {

enum class InstructionSet { Reference, Avx2, Avx512 };

// How keys and values lie in the pool: as f16, or as codes of 8 or 4 bits that kv_codes.h describes.
enum class KvDtype { F16, Int8, Int4 };
inline int kv_bits(KvDtype dtype) { return dtype == KvDtype::F16 ? 16 : dtype == KvDtype::Int8 ? 8 : 4; }

// Rows quantised to int8 in blocks of 32: x = scale * value, value in -127 … 127. Where a block's scale is not finite the rest of
// it may be anything: what is computed from it is refused.
struct QuantisedRow {
  int8_t* values;  // [inputs]
  float* scales;   // [inputs / 32]
  float* offsets;  // [inputs / 32] scale * sum of the block's values: what a weight's offset is multiplied with
  int16_t* sums;   // [inputs / 32, 2] sums of the block's first and last 16 values
};

// The input of a linear layer, in both forms; a matrix uses one (Matrix::quantised).
struct LinearInput {
  int rows;
  const float* x;  // [rows, x_stride]
  size_t x_stride;
  const int8_t* values;  // [rows, value_stride]
  size_t value_stride;
  const float* scales;   // [rows, block_stride]
  const float* offsets;  // [rows, block_stride]
  const int16_t* sums;   // [rows, block_stride, 2]
  size_t block_stride;
};

// Attention walks the context in tiles of this many positions, the first at position 0.
constexpr int kTileTokens = 128;
constexpr int kGroupTokens = 16;
constexpr int kTileGroups = kTileTokens / kGroupTokens;
// Most query rows in one call of `attend`, and most dimensions of a head.
constexpr int kMostQueries = 64;
constexpr int kMostHeadDim = 512;

// K and V of one KV head for up to kTileTokens consecutive positions, wherever their blocks are. Sixteen bits are an f16, or two
// or four codes of neighbouring dimensions; `units` of them are a token's key or value.
struct KeyTile {
  KvDtype dtype;
  // [units, key_stride], the first 16 of a row being this group's; of codes two rows more: f16 scales and zeros
  const uint16_t* keys[kTileGroups];
  size_t key_stride;
  const uint16_t* values[kTileTokens];          // [units], of f16 padded to 16 with zeros
  const uint16_t* value_scales[kTileGroups];  // of codes: f16 [scale | zero, key_stride]
};

// Softmax-weighted sum of values of one query row over the tiles so far.
struct QueryRow {
  const float* query;  // [head_dim], scaled by 1 / sqrt(head_dim)
  int visible;         // positions of this tile the row attends to: 0 … kTileTokens
  float max;           // greatest score so far; starts at -infinity
  float sum;           // of exp(score - max) so far; starts at 0
  float* total;        // [head_dim padded to 16] sum of exp(score - max) * value; starts at 0
};

// Scratch that `attend` needs, in floats: for some rows at once, and for a tile of codes spread out to 16 bits each.
constexpr size_t kAttendScratch =
    size_t{8} * (kTileTokens + kMostHeadDim) + size_t{kMostQueries} * kTileTokens / 2 + size_t{kTileTokens} * kMostHeadDim / 2;

// Sixteen bits of a message, which may begin at any byte.
typedef uint16_t WireUnit __attribute__((aligned(1), may_alias));

struct Kernels {
  InstructionSet isa;

  // y = x / rms(x) * weight over `length` elements.
  void (*rms_norm)(const float* x, const float* weight, int length, int padded, float epsilon, float* y);

  // y = silu(gate) * up.
  void (*swiglu)(const float* gate, const float* up, int padded, float* y);

  // x[i] = x[i] * cos[i] + x[i ^ 1] * sin[i]; sin carries the sign. `length` is even.
  void (*rotate)(float* x, const float* cos, const float* sin, int length);

  void (*to_half)(const float* x, int length, uint16_t* y);

  void (*quantise)(const float* x, int length, QuantisedRow row);

  // A key or a value to codes of 8 or 4 bits, as kv_codes.h says; `codes` holds length * bits / 8 bytes.
  void (*encode)(const float* x, int length, int bits, uint8_t* codes, uint16_t* scale, uint16_t* zero);

  // out[row, 16 * panel + o] = sum over inputs, for panels first … last-1. `scratch` holds linear_scratch(matrix) bytes.
  void (*linear)(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride,
                 uint8_t* scratch);

  // Adds one tile to each row; rows are in order of position. `scratch` holds kAttendScratch floats.
  void (*attend)(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch);

  // Adds what a row gathered over the next tile by itself: attending tile after tile and merging single tiles in the same order
  // give the same bits.
  void (*merge)(QueryRow& row, const QueryRow& tile, int head_dim);

  // to[column, row] = from[row, column]; strides in elements.
  void (*transpose)(const WireUnit* from, size_t from_stride, int rows, int columns, WireUnit* to, size_t to_stride);
};

// Room for one panel with its levels spread out to bytes and its scales to floats.
constexpr size_t kUnpackedBlock = 640;
inline size_t linear_scratch(const Matrix& matrix) { return matrix.quantised() ? matrix.blocks() * kUnpackedBlock : 0; }

extern const Kernels kReferenceKernels;
#if defined(PENSTOCK_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The best this machine can run.
InstructionSet best_instruction_set();
// The best table that is at most `ceiling`.
const Kernels& select_kernels(InstructionSet ceiling);
const char* instruction_set_name(InstructionSet isa);
const char* kv_dtype_name(KvDtype dtype);

}  // namespace penstock
