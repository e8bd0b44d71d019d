// AVX2: what is done to one row at a time.
#include "avx2_kernels.h"
#include "avx2_math.h"
#include "kv_codes.h"

namespace penstock {

namespace avx2 {

void rms_norm(const float* x, const float* weight, int length, int padded, float epsilon, float* y) {
  Lanes sum = zero_lanes();
  for (int i = 0; i < padded; i += 16) {
    const __m256 a = _mm256_loadu_ps(x + i);
    const __m256 b = _mm256_loadu_ps(x + i + 8);
    sum.low = _mm256_fmadd_ps(a, a, sum.low);
    sum.high = _mm256_fmadd_ps(b, b, sum.high);
  }
  const float mean = tree_sum16(sum) / static_cast<float>(length);
  const __m256 scale = _mm256_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int i = 0; i < padded; i += 8) {
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), scale), _mm256_loadu_ps(weight + i)));
  }
}

void swiglu(const float* gate, const float* up, int padded, float* y) {
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int i = 0; i < padded; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, fixed_exp(_mm256_xor_ps(g, sign))));
    _mm256_storeu_ps(y + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
  }
}

void rotate(float* x, const float* cos, const float* sin, int length) {
  int i = 0;
  for (; i + 8 <= length; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    const __m256 swapped = _mm256_permute_ps(v, 0xb1);  // neighbours change places
    _mm256_storeu_ps(x + i, _mm256_fmadd_ps(v, _mm256_loadu_ps(cos + i), _mm256_mul_ps(swapped, _mm256_loadu_ps(sin + i))));
  }
  for (; i < length; i += 2) {
    const float even = std::fma(x[i], cos[i], x[i + 1] * sin[i]);
    const float odd = std::fma(x[i + 1], cos[i + 1], x[i] * sin[i + 1]);
    x[i] = even;
    x[i + 1] = odd;
  }
}

void to_half(const float* x, int length, uint16_t* y) {
  int i = 0;
  for (; i + 8 <= length; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < length; ++i) y[i] = half_of_float(x[i]);
}

void quantise(const float* x, int length, QuantisedRow row) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // what the packs interleave, back in order
  for (int b = 0; b < length / kBlock; ++b, x += kBlock) {
    __m256 v[4];
    __m256i greatest = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(x + 8 * i);
      greatest = _mm256_max_epi32(greatest, _mm256_and_si256(_mm256_castps_si256(v[i]), magnitude));
    }
    __m128i g = _mm_max_epi32(_mm256_castsi256_si128(greatest), _mm256_extracti128_si256(greatest, 1));
    g = _mm_max_epi32(g, _mm_shuffle_epi32(g, 0x4e));
    g = _mm_max_epi32(g, _mm_shuffle_epi32(g, 0xb1));
    const float max = _mm_cvtss_f32(_mm_castsi128_ps(g));
    const bool zero = max < kSmallestBlock;
    const float scale = zero ? 0.0f : max * (1.0f / 127.0f);
    const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / max);
    __m256i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));  // to nearest, as the thread's mode says
    const __m256i pairs = _mm256_hadd_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    s = _mm_hadd_epi32(s, s);
    // 16 values of at most 127, unless the block holds a NaN: then they are nothing, and the scale says so.
    const int16_t sums[2] = {static_cast<int16_t>(_mm_cvtsi128_si32(s)), static_cast<int16_t>(_mm_extract_epi32(s, 1))};
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.values + b * kBlock), _mm256_permutevar8x32_epi32(bytes, order));
    row.scales[b] = scale;
    row.offsets[b] = scale * static_cast<float>(sums[0] + sums[1]);
    row.sums[2 * b] = sums[0];
    row.sums[2 * b + 1] = sums[1];
  }
}

void encode(const float* x, int length, int bits, uint8_t* codes, uint16_t* scale, uint16_t* zero) {
  if (length % 16 != 0) return kReferenceKernels.encode(x, length, bits, codes, scale, zero);
  const float infinity = std::numeric_limits<float>::infinity();
  __m256 least = _mm256_set1_ps(infinity);
  __m256 most = _mm256_set1_ps(-infinity);
  __m256 finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int d = 0; d < length; d += 8) {
    const __m256 v = _mm256_loadu_ps(x + d);
    least = _mm256_min_ps(v, least);
    most = _mm256_max_ps(v, most);
    finite = _mm256_and_ps(finite, _mm256_cmp_ps(_mm256_and_ps(v, magnitude), _mm256_set1_ps(infinity), _CMP_LT_OQ));
  }
  const float min = -max8(_mm256_xor_ps(least, _mm256_set1_ps(-0.0f)));
  const int levels = (1 << bits) - 1;
  const CodeScale to = code_scale(min, max8(most), _mm256_movemask_ps(finite) == 0xff, levels);
  *scale = to.scale;
  *zero = to.zero;
  if (to.scale == kHalfNan) {
    std::memset(codes, 0, length * bits / 8);
    return;
  }
  const __m256 offset = _mm256_set1_ps(to.offset);
  const __m256 inverse = _mm256_set1_ps(to.inverse);
  const auto code8 = [&](int d) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + d), offset), inverse));
    return _mm256_min_epi32(_mm256_max_epi32(rounded, _mm256_setzero_si256()), _mm256_set1_epi32(levels));
  };
  const int bytes = length * bits / 8;
  for (int d = 0; d < bytes; d += 8) {
    __m256i code = code8(d);
    if (bits == 4) code = _mm256_or_si256(code, _mm256_slli_epi32(code8(d + bytes), 4));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + d), _mm_packus_epi16(halves, halves));
  }
}

}  // namespace avx2

const Kernels kAvx2Kernels = {InstructionSet::Avx2, avx2::rms_norm, avx2::swiglu, avx2::rotate, avx2::to_half,
                              avx2::quantise,       avx2::encode,   avx2::linear, avx2::attend, avx2::merge,
                              avx2::transpose};

}  // namespace penstock
