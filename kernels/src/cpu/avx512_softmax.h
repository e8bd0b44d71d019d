// The softmax of a row over a tile. Only for files compiled for AVX-512.
#pragma once

#include "avx512_math.h"
#include "kernels.h"

namespace penstock::avx512 {

// Scores become weights exp(score - max); those beyond `visible`, whatever they were computed from, become zero up to the end of
// their group of 16.
static inline void weigh(float* scores /* [kTileTokens] */, int visible, float* max_out, float* sum_out) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 greatest = lowest;
  int t = 0;
  for (; t + kGroupTokens <= visible; t += kGroupTokens) greatest = _mm512_max_ps(_mm512_loadu_ps(scores + t), greatest);
  if (t < visible) {
    const __m512 s = _mm512_mask_loadu_ps(lowest, static_cast<__mmask16>((1u << (visible - t)) - 1), scores + t);
    _mm512_storeu_ps(scores + t, s);
    greatest = _mm512_max_ps(s, greatest);
  }
  const __m256 low = _mm512_castps512_ps256(greatest);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(greatest), 1));
  const float max = max8(_mm256_max_ps(low, high));
  const __m512 m = _mm512_set1_ps(max);
  __m512 sum = _mm512_setzero_ps();
  for (t = 0; t < visible; t += kGroupTokens) {
    const __m512 weights = exp_up_to_highest(_mm512_sub_ps(_mm512_loadu_ps(scores + t), m));
    _mm512_storeu_ps(scores + t, weights);
    sum = _mm512_add_ps(sum, weights);
  }
  *max_out = max;
  *sum_out = tree_sum16(sum);
}

// Kernels::merge for R rows, except their totals: the greatest score and the sum of each become those of what came before and of
// one tile, max and sum [R], and the factors are what the totals of both are multiplied with.
template <int R>
struct MergeFactors {
  static_assert(R <= 16);
  alignas(64) float before[16] = {};
  alignas(64) float tile[16] = {};

  MergeFactors(QueryRow* rows, const float* max, const float* sum) {
    for (int r = 0; r < R; ++r) {
      const float greatest = max[r] > rows[r].max ? max[r] : rows[r].max;
      before[r] = rows[r].max - greatest;
      tile[r] = max[r] - greatest;
      rows[r].max = greatest;
    }
    _mm512_store_ps(before, exp_up_to_highest(_mm512_load_ps(before)));
    _mm512_store_ps(tile, exp_up_to_highest(_mm512_load_ps(tile)));
    for (int r = 0; r < R; ++r) rows[r].sum = std::fma(rows[r].sum, before[r], sum[r] * tile[r]);
  }

  // Sixteen dimensions of row r.
  void merge(QueryRow* rows, int r, int d, __m512 total) const {
    float* into = rows[r].total + d;
    _mm512_storeu_ps(into, _mm512_fmadd_ps(_mm512_loadu_ps(into), _mm512_set1_ps(before[r]),
                                           _mm512_mul_ps(total, _mm512_set1_ps(tile[r]))));
  }
};

}  // namespace penstock::avx512
