// The softmax of a row over a tile. Only for files compiled for AVX2, FMA and F16C.
#pragma once

#include "avx2_math.h"
#include "kernels.h"

namespace penstock::avx2 {

// Scores become weights exp(score - max); those beyond `visible`, whatever they were computed from, become zero up to the end
// of their group of 16.
static inline void weigh(float* scores /* [kTileTokens] */, int visible, float* max_out, float* sum_out) {
  const __m256 lowest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int padded = (visible + kGroupTokens - 1) / kGroupTokens * kGroupTokens;
  __m256 greatest = lowest;
  for (int t = 0; t < padded; t += 8) {
    __m256 s = _mm256_loadu_ps(scores + t);
    if (t + 8 > visible) {
      const __m256 seen = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(visible - t), index));
      s = _mm256_blendv_ps(lowest, s, seen);
      _mm256_storeu_ps(scores + t, s);
    }
    greatest = _mm256_max_ps(s, greatest);
  }
  const float max = max8(greatest);
  const __m256 m = _mm256_set1_ps(max);
  Lanes sum = zero_lanes();
  for (int t = 0; t < padded; t += kGroupTokens) {
    // exp(-infinity) is exactly 0, and adding 0 to a sum of weights changes nothing.
    const __m256 a = fixed_exp(_mm256_sub_ps(_mm256_loadu_ps(scores + t), m));
    const __m256 b = fixed_exp(_mm256_sub_ps(_mm256_loadu_ps(scores + t + 8), m));
    _mm256_storeu_ps(scores + t, a);
    _mm256_storeu_ps(scores + t + 8, b);
    sum.low = _mm256_add_ps(sum.low, a);
    sum.high = _mm256_add_ps(sum.high, b);
  }
  *max_out = max;
  *sum_out = tree_sum16(sum);
}

}  // namespace penstock::avx2
