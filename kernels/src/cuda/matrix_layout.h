// A weight matrix in device memory, in the order in which tensor cores take it. For the host and for kernels.
//
// 16 outputs are a panel, 64 inputs a chunk, and 8 chunks a slice: a sum over the inputs is one chain of mma over each slice, and
// the slices are added in order, whatever the number of rows and whichever kernel does it. Outputs and inputs are padded with zeros.
//
//   levels  [panel][chunk][plane][lane] 16 bytes; one plane of 4 bits, two of 8, four of halves
//   scales  [panel][group][16 outputs] a half, or two where the format has a second number
//
// A chunk is four steps of mma over 16 inputs each. Which inputs those are is free as long as weights and rows agree: lane
// (g, t) = (lane / 4, lane % 4) has inputs 16t … 16t + 15 of the chunk, four of them a step, so that it reads a row in two loads
// and needs one scale for a chunk. In step s, with j = 16t + 4s, its part of the panel is
//
//   a0 = (g, j … j+1)   a1 = (g+8, j … j+1)   a2 = (g, j+2 … j+3)   a3 = (g+8, j+2 … j+3)
//
//   4 bits   word s of the plane: a_i in bits 4i … (first) and 16 + 4i … (second)
//   8 bits   words 2(s%2) and 2(s%2)+1 of plane s/2: bytes a0, a1 and a2, a3; 128 above what they mean
//   halves   the words of plane s: a0, a1, a2, a3
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock::cuda {

constexpr int kPanelOutputs = 16;
constexpr int kChunkInputs = 64;
constexpr int kSliceChunks = 8;

enum class WeightKind : int {
  Half,        // weight
  Byte,        // (level - 128) * scale, groups of 32: Q8_0, Q5_0
  ByteHalf,    // the same in groups of 16: Q6_K
  ByteOffset,  // (level - 128) * scale + offset, groups of 32: Q5_1, Q5_K
  Nibble,      // (level - 8) * scale, groups of 32: Q4_0
  NibbleOffset,  // level * scale + offset, groups of 32: Q4_1, Q4_K
  NibbleZero,    // (level - zero) * scale, groups of 128: AWQ
};
constexpr int kWeightKinds = 7;

constexpr int level_bits(WeightKind kind) { return kind == WeightKind::Half ? 16 : kind < WeightKind::Nibble ? 8 : 4; }
constexpr int planes(WeightKind kind) { return level_bits(kind) / 4; }
constexpr int group_inputs(WeightKind kind) {
  return kind == WeightKind::ByteHalf ? 16 : kind == WeightKind::NibbleZero ? 128 : 32;
}
// Numbers of a group: none, a scale, or a scale and an offset or zero.
constexpr int group_numbers(WeightKind kind) {
  switch (kind) {
    case WeightKind::Half: return 0;
    case WeightKind::ByteOffset:
    case WeightKind::NibbleOffset:
    case WeightKind::NibbleZero: return 2;
    default: return 1;
  }
}

struct DeviceMatrix {
  WeightKind kind = WeightKind::Half;
  int outputs = 0;
  int inputs = 0;
  int panels = 0;
  int chunks = 0;
  const uint8_t* levels = nullptr;
  const uint16_t* scales = nullptr;

  constexpr int groups() const { return group_inputs(kind) > kChunkInputs ? (chunks + 1) / 2 : chunks * (kChunkInputs / group_inputs(kind)); }
  constexpr size_t chunk_bytes() const { return size_t{512} * planes(kind); }
  constexpr size_t level_bytes() const { return size_t(panels) * chunks * chunk_bytes(); }
  constexpr size_t scale_bytes() const { return size_t(panels) * groups() * kPanelOutputs * group_numbers(kind) * sizeof(uint16_t); }
  constexpr int slices() const { return (chunks + kSliceChunks - 1) / kSliceChunks; }
  // What a row of inputs is padded to.
  constexpr size_t input_stride() const { return size_t(chunks) * kChunkInputs; }
};

// Matrices that share their input and their kind.
constexpr int kMostProducts = 3;
struct Product {
  DeviceMatrix matrix;
  float* out;  // [rows, stride]
  size_t stride;
};
struct Products {
  Product product[kMostProducts];
  int count;
};

}  // namespace penstock::cuda
