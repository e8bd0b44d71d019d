// Keys and values as codes of 8 or 4 bits: how they are made, where they lie, and what attention makes of them.
//
// A token's key (after its rotation) or value of one head is written as x = zero + scale * code, scale and zero in f16, code in
// 0 … 2^bits - 1. Code d of 8 bits is byte d; of 4 bits, byte d holds the codes of dimension d, low, and of dimension d + head_dim / 2.
//
// Attention reads codes through sums of integers, which are exact in any order. The query becomes integers of 15 bits, so that
// a score is scale * query_scale * (sum of code * integer) + zero * query_scale * (sum of integers); and so do the weights
// exp(score - max) * scale of a tile's values. Against the rounding of the codes themselves that of the integers is nothing.
#pragma once

#include <cstdint>

#include "../fixed_math.h"
#include "kernels.h"

namespace penstock {

// Greatest magnitudes, such that no sum of 32 bits overflows: over the dimensions of a head, and over the tokens of a tile.
constexpr int kQueryLevels = 16383;
constexpr int kWeightLevels = 32767;
static_assert(int64_t{kMostHeadDim} * 255 * kQueryLevels < INT32_MAX);
static_assert(int64_t{kTileTokens} * 255 * kWeightLevels < INT32_MAX);

// value = scale * integer, integer = round(value * inverse).
struct Step {
  float scale;
  float inverse;
};

// For values up to the one with the bits `greatest`; where that is NaN or infinity, so is the scale, and with it all that follows.
static inline Step step_of(uint32_t greatest, int levels) {
  const float max = float_of(greatest);
  if (max < kSmallestBlock) return {0.0f, 0.0f};
  return {max * (1.0f / static_cast<float>(levels)), static_cast<float>(levels) / max};
}

// A query row in integers, and what the keys' zeros are multiplied with.
struct CodedQuery {
  float scale;
  float sum;  // scale * sum of the integers
};

constexpr uint16_t kHalfNan = 0x7e00;

struct CodeScale {
  uint16_t scale;
  uint16_t zero;
  float offset;   // zero as a float
  float inverse;  // 1 / scale, or 0
};

// Codes are made against the scale and zero that are stored, so that they are the nearest to what will be read. Where `x` is not
// finite or f16 cannot hold its scale and zero, the scale is NaN: a step that reads it fails, as it does with f16.
PENSTOCK_BOTH static inline CodeScale code_scale(float least, float most, bool finite, int levels) {
  constexpr float kMost = std::numeric_limits<float>::max();
  const uint16_t zero = half_of_float(least + 0.0f);  // of the two zeros the positive one
  const float offset = float_of_half(zero);
  const float range = most - offset;
  const uint16_t half = range > 0.0f ? half_of_float(range / static_cast<float>(levels)) : uint16_t{0};
  const float scale = float_of_half(half);
  if (!finite || !(std::fabs(offset) <= kMost) || !(scale <= kMost)) return {kHalfNan, 0, 0.0f, 0.0f};
  return {half, zero, offset, scale > 0.0f ? 1.0f / scale : 0.0f};
}

}  // namespace penstock
