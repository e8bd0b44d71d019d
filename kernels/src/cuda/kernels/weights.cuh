// What a lane reads of a panel's chunk, and the fragments of mma that it becomes in registers.
#pragma once

#include "../language/half.h"
#include "../matrix_layout.h"

namespace penstock::cuda {

template <WeightKind kind>
struct ChunkOfPanel {
  static constexpr int kNumbers = group_numbers(kind);

  uint4 plane[planes(kind)];
  uint32_t numbers[2];  // of outputs g and g + 8: a half, or two

  // Bytes of a chunk's levels, of the numbers of its groups, and of those of a slice's.
  static constexpr int kLevelBytes = 512 * planes(kind);
  static constexpr int kGroupNumberBytes = kPanelOutputs * kNumbers * 2;
  static constexpr int kNumberBytes = (group_inputs(kind) < kChunkInputs ? kChunkInputs / group_inputs(kind) : 1) * kGroupNumberBytes;
  // Of the groups before a chunk.
  __device__ __forceinline__ static constexpr int number_bytes(int chunk) {
    return group_inputs(kind) <= kChunkInputs ? chunk * kNumberBytes : chunk * kChunkInputs / group_inputs(kind) * kGroupNumberBytes;
  }
  static constexpr int kSliceNumberBytes = number_bytes(kSliceChunks);

  __device__ __forceinline__ static const uint8_t* levels_of(const DeviceMatrix& matrix, int panel, int chunk) {
    return matrix.levels + (size_t(panel) * matrix.chunks + chunk) * kLevelBytes;
  }
  __device__ __forceinline__ static const uint16_t* numbers_of(const DeviceMatrix& matrix, int panel, int chunk) {
    return matrix.scales + size_t(panel) * matrix.groups() * (kPanelOutputs * kNumbers) + number_bytes(chunk) / 2;
  }

  // Of the chunk whose levels and numbers begin here, in the matrix or in shared memory.
  __device__ __forceinline__ void load(const uint8_t* levels, const uint16_t* scales) {
    const int lane = threadIdx.x % 32;
    const uint4* from = reinterpret_cast<const uint4*>(levels);
#pragma unroll
    for (int p = 0; p < planes(kind); ++p) plane[p] = from[p * 32 + lane];
    if constexpr (kNumbers > 0) {
      const int at = lane % 4 * 16 / group_inputs(kind) * kPanelOutputs + lane / 4;
      if constexpr (kNumbers == 1) {
        numbers[0] = scales[at];
        numbers[1] = scales[at + 8];
      } else {
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(scales);
        numbers[0] = pairs[at];
        numbers[1] = pairs[at + 8];
      }
    }
  }

  // The panel's part in step 0 … 3.
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    if constexpr (kind == WeightKind::Half) {
      const uint4 words = plane[step];
      a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = weigh(level_pair(step, i), numbers[i % 2]);
    }
  }

 private:
  __device__ __forceinline__ static uint32_t word_of(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }

  // Two levels as halves. A half of 0x6400 + n is 1024 + n: exact up to 1023.
  __device__ __forceinline__ uint32_t level_pair(int step, int i) const {
    constexpr uint32_t k1024 = 0x64006400u;
    if constexpr (level_bits(kind) == 4) {
      constexpr uint32_t kZero = kind == WeightKind::Nibble ? 0x64086408u : k1024;  // Q4_0's levels are 8 above what they mean
      const uint32_t word = word_of(plane[0], step);
      return half2_sub((word >> 4 * i & 0x000f000fu) | k1024, kZero);
    } else {
      const uint32_t word = word_of(plane[step / 2], step % 2 * 2 + i / 2);
      constexpr uint32_t k1152 = 0x64806480u;
      return half2_sub(permute_bytes(word, k1024, i % 2 == 0 ? 0x5150u : 0x5352u), k1152);
    }
  }

  __device__ __forceinline__ static uint32_t weigh(uint32_t levels, uint32_t numbers) {
    const uint32_t scale = half2_twice(static_cast<uint16_t>(numbers));
    const uint32_t second = half2_twice(static_cast<uint16_t>(numbers >> 16));
    switch (kind) {
      case WeightKind::ByteOffset:
      case WeightKind::NibbleOffset: return half2_fma(levels, scale, second);
      case WeightKind::NibbleZero: return half2_mul(half2_sub(levels, second), scale);
      default: return half2_mul(levels, scale);
    }
  }
};

}  // namespace penstock::cuda
