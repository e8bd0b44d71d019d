// The softmax of a row over a tile. Only for files compiled for AVX-512.
#pragma once

#include "avx2_math.h"
#include "kernels.h"

namespace penstock::avx512 {

static inline __m512 load_half16(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

static inline float tree_sum16(__m512 lanes) {
  return penstock::tree_sum16(
      {_mm512_castps512_ps256(lanes), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1))});
}

// The steps of fixed_exp for arguments up to 0, NaN included.
static inline __m512 exp_of_negative(__m512 x) {
  using C = ExpConstants;
  const __m512 shift = _mm512_set1_ps(kRoundingShift);
  const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(C::log2e), shift);
  const __m512 n = _mm512_sub_ps(shifted, shift);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(C::ln2_high), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(C::ln2_low), r);
  __m512 p = _mm512_set1_ps(C::p5);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::p4));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::p3));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::p2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::p1));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(C::p0));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  const __m512 y = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
  const __m512 kept = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(C::lowest), _CMP_NLT_UQ), y);
  return _mm512_mask_mov_ps(kept, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

// Scores become weights exp(score - max); those beyond `visible`, whatever they were computed from, become zero.
static inline void weigh(float* scores /* [kTileTokens] */, int visible, int tokens, float* max_out, float* sum_out) {
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 greatest = lowest;
  for (int t = 0; t < tokens; t += kGroupTokens) {
    const __mmask16 seen = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(visible - t), index);
    const __m512 s = _mm512_mask_mov_ps(lowest, seen, _mm512_loadu_ps(scores + t));
    _mm512_storeu_ps(scores + t, s);
    greatest = _mm512_max_ps(s, greatest);
  }
  const __m256 low = _mm512_castps512_ps256(greatest);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(greatest), 1));
  const float max = max8(_mm256_max_ps(low, high));
  const __m512 m = _mm512_set1_ps(max);
  __m512 sum = _mm512_setzero_ps();
  for (int t = 0; t < tokens; t += kGroupTokens) {
    const __m512 weights = exp_of_negative(_mm512_sub_ps(_mm512_loadu_ps(scores + t), m));
    _mm512_storeu_ps(scores + t, weights);
    sum = _mm512_add_ps(sum, weights);
  }
  *max_out = max;
  *sum_out = tree_sum16(sum);
}

}  // namespace penstock::avx512
