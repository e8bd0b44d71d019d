// The fixed sequences of fixed_math.h on sixteen lanes. Only for files compiled for AVX-512.
#pragma once

#include "avx2_math.h"

namespace penstock::avx512 {

static inline __m512 load_half16(const void* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

static inline float tree_sum16(__m512 lanes) {
  return penstock::tree_sum16(
      {_mm512_castps512_ps256(lanes), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1))});
}

// e^x for arguments up to `highest`, NaN included.
static inline __m512 exp_up_to_highest(__m512 x) {
  using C = ExpConstants;
  const __m512 shift = _mm512_set1_ps(kRoundingShift);
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(C::log2e), shift), shift);
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
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(C::lowest), _CMP_NLT_UQ), p, n);  // p * 2^n
}

static inline __m512 fixed_exp(__m512 x) {
  const __mmask16 beyond = _mm512_cmp_ps_mask(x, _mm512_set1_ps(ExpConstants::highest), _CMP_GT_OQ);
  return _mm512_mask_mov_ps(exp_up_to_highest(x), beyond, _mm512_set1_ps(std::numeric_limits<float>::infinity()));
}

}  // namespace penstock::avx512
