// The fixed sequences of fixed_math.h on eight lanes. Only for files compiled for AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../fixed_math.h"

namespace penstock {

// Sixteen lanes: element i of a vector is in lane i mod 16.
struct Lanes {
  __m256 low;
  __m256 high;
};

static inline Lanes zero_lanes() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

static inline float tree_sum16(Lanes lanes) {
  const __m256 a = _mm256_add_ps(lanes.low, lanes.high);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));  // b0 + b2, b1 + b3
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

static inline float max8(__m256 x) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline __m256 load_half8(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Four bytes in every lane.
static inline __m256i broadcast4(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm256_set1_epi32(word);
}

static inline __m256 fixed_exp(__m256 x) {
  using C = ExpConstants;
  const __m256 shift = _mm256_set1_ps(kRoundingShift);
  const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(C::log2e), shift);
  const __m256 n = _mm256_sub_ps(shifted, shift);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(C::ln2_high), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(C::ln2_low), r);
  __m256 p = _mm256_set1_ps(C::p5);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::p4));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::p3));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::p2));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::p1));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(C::p0));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent =
      _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);  // the shift's own bits fall off, as 2^23 divides them
  __m256 y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  y = _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(C::lowest), _CMP_LT_OQ), y);
  y = _mm256_blendv_ps(y, _mm256_set1_ps(std::numeric_limits<float>::infinity()),
                       _mm256_cmp_ps(x, _mm256_set1_ps(C::highest), _CMP_GT_OQ));
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

}  // namespace penstock
