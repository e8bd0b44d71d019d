// AVX-512: what is done to one row at a time and takes a share of a prompt's time that can be seen.
#include "avx2_kernels.h"
#include "avx512_kernels.h"
#include "avx512_math.h"

#define UNROLL _Pragma("GCC unroll 4")

namespace penstock::avx512 {

void swiglu(const float* gate, const float* up, int padded, float* y) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int i = 0; i < padded; i += 16) {
    const __m512 g = _mm512_loadu_ps(gate + i);
    const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, fixed_exp(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f)))));
    _mm512_storeu_ps(y + i, _mm512_mul_ps(silu, _mm512_loadu_ps(up + i)));
  }
}

namespace {

// Blocks that are quantised together.
constexpr int kTogether = 4;

// Sixteen integers of each half of two blocks become bytes, in order.
struct Bytes {
  __m512i values;
  __m128i sums;  // of each half
};
inline Bytes to_bytes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  // Every quarter of the register has four values of each half.
  const __m512i mixed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), mixed);
  const __m256i eights = _mm256_add_epi32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1));
  return {_mm512_permutexvar_epi32(order, mixed),
          _mm_add_epi32(_mm256_castsi256_si128(eights), _mm256_extracti128_si256(eights, 1))};
}

// The greatest of each of four vectors, as integers.
inline __m128i greatest_of(const __m512i (&m)[kTogether]) {
  const __m512i a = _mm512_max_epi32(_mm512_unpacklo_epi32(m[0], m[1]), _mm512_unpackhi_epi32(m[0], m[1]));
  const __m512i b = _mm512_max_epi32(_mm512_unpacklo_epi32(m[2], m[3]), _mm512_unpackhi_epi32(m[2], m[3]));
  const __m512i c = _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i d = _mm256_max_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
  return _mm_max_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1));
}

}  // namespace

void quantise(const float* x, int length, QuantisedRow row) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  int b = 0;
  for (; b + kTogether <= length / kBlock; b += kTogether) {
    __m512 v[kTogether][2];
    __m512i magnitudes[kTogether];
    UNROLL for (int i = 0; i < kTogether; ++i) {
      UNROLL for (int h = 0; h < 2; ++h)
        v[i][h] = _mm512_loadu_ps(x + (b + i) * kBlock + 16 * h);
      magnitudes[i] = _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(v[i][0]), magnitude),
                                       _mm512_and_si512(_mm512_castps_si512(v[i][1]), magnitude));
    }
    const __m128 max = _mm_castsi128_ps(greatest_of(magnitudes));
    const __mmask8 some = _mm_cmp_ps_mask(max, _mm_set1_ps(kSmallestBlock), _CMP_NLT_UQ);
    const __m128 scales = _mm_maskz_mul_ps(some, max, _mm_set1_ps(1.0f / 127.0f));
    const __m512 inverses = _mm512_castps128_ps512(_mm_maskz_div_ps(some, _mm_set1_ps(127.0f), max));
    __m512i q[kTogether][2];
    UNROLL for (int i = 0; i < kTogether; ++i) {
      const __m512 inverse = _mm512_permutexvar_ps(_mm512_set1_epi32(i), inverses);
      UNROLL for (int h = 0; h < 2; ++h)
        q[i][h] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i][h], inverse));  // to nearest, as the thread's mode says
    }
    const Bytes first = to_bytes(q[0][0], q[0][1], q[1][0], q[1][1]);
    const Bytes second = to_bytes(q[2][0], q[2][1], q[3][0], q[3][1]);
    _mm512_storeu_si512(row.values + b * kBlock, first.values);
    _mm512_storeu_si512(row.values + (b + 2) * kBlock, second.values);
    const __m128 sums = _mm_cvtepi32_ps(_mm_hadd_epi32(first.sums, second.sums));
    _mm_storeu_ps(row.scales + b, scales);
    _mm_storeu_ps(row.offsets + b, _mm_mul_ps(scales, sums));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row.sums + 2 * b), _mm_packs_epi32(first.sums, second.sums));
  }
  avx2::quantise(x + b * kBlock, length - b * kBlock,
                 {row.values + b * kBlock, row.scales + b, row.offsets + b, row.sums + 2 * b});
}

}  // namespace penstock::avx512
