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

  __device__ __forceinline__ void load(const DeviceMatrix& matrix, int panel, int chunk) {
    const int lane = threadIdx.x % 32;
    const uint4* from = reinterpret_cast<const uint4*>(matrix.levels + (size_t(panel) * matrix.chunks + chunk) * matrix.chunk_bytes());
#pragma unroll
    for (int p = 0; p < planes(kind); ++p) plane[p] = from[p * 32 + lane];
    if constexpr (kNumbers > 0) {
      const int input = chunk * kChunkInputs + lane % 4 * 16;
      const size_t at = (size_t(panel) * matrix.groups() + input / group_inputs(kind)) * kPanelOutputs + lane / 4;
      if constexpr (kNumbers == 1) {
        numbers[0] = matrix.scales[at];
        numbers[1] = matrix.scales[at + 8];
      } else {
        const uint32_t* pairs = reinterpret_cast<const uint32_t*>(matrix.scales);
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

  // Two levels as halves, as they are stored. A half of 0x6400 + n is 1024 + n: exact up to 1023.
  __device__ __forceinline__ uint32_t level_pair(int step, int i) const {
    constexpr uint32_t k1024 = 0x64006400u;
    if constexpr (level_bits(kind) == 4) {
      const uint32_t word = word_of(plane[0], step);
      return half2_sub((word >> 4 * i & 0x000f000fu) | k1024, k1024);
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
      case WeightKind::Nibble: return half2_mul(half2_sub(levels, 0x48004800u /* 8 */), scale);
      default: return half2_mul(levels, scale);
    }
  }
};

}  // namespace penstock::cuda
