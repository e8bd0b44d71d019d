// AVX-512: what is done to one row at a time and takes a share of a prompt's time that can be seen.
#include "avx512_kernels.h"
#include "avx512_math.h"

#define UNROLL _Pragma("GCC unroll 2")

namespace penstock::avx512 {

void swiglu(const float* gate, const float* up, int padded, float* y) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int i = 0; i < padded; i += 16) {
    const __m512 g = _mm512_loadu_ps(gate + i);
    const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, fixed_exp(_mm512_xor_ps(g, _mm512_set1_ps(-0.0f)))));
    _mm512_storeu_ps(y + i, _mm512_mul_ps(silu, _mm512_loadu_ps(up + i)));
  }
}

void quantise(const float* x, int length, QuantisedRow row) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int b = 0; b < length / kBlock; ++b, x += kBlock) {
    __m512 v[2];
    UNROLL for (int h = 0; h < 2; ++h)
      v[h] = _mm512_loadu_ps(x + 16 * h);
    const uint32_t greatest = static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(
        _mm512_and_si512(_mm512_castps_si512(v[0]), magnitude), _mm512_and_si512(_mm512_castps_si512(v[1]), magnitude))));
    const float max = float_of(greatest);
    const bool zero = max < kSmallestBlock;
    const float scale = zero ? 0.0f : max * (1.0f / 127.0f);
    const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / max);
    // 16 values of at most 127, unless the block holds a NaN: then they are nothing, and the scale says so.
    int16_t sums[2];
    UNROLL for (int h = 0; h < 2; ++h) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(v[h], inverse));  // to nearest, as the thread's mode says
      sums[h] = static_cast<int16_t>(_mm512_reduce_add_epi32(q));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(row.values + b * kBlock + 16 * h), _mm512_cvtsepi32_epi8(q));
    }
    row.scales[b] = scale;
    row.offsets[b] = scale * static_cast<float>(sums[0] + sums[1]);
    row.sums[2 * b] = sums[0];
    row.sums[2 * b + 1] = sums[1];
  }
}

}  // namespace penstock::avx512
