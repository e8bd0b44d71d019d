// What both vector forms of attention over codes share: a query in integers, and the scratch. Only for files compiled for
// AVX2, FMA and F16C.
#pragma once

#include "avx2_math.h"
#include "kv_codes.h"
#include "row_runs.h"

namespace penstock::avx2 {

// Query rows whose sums fit into registers together.
constexpr int kCodedRows = 6;

// What a row's sum of codes stands for: scale * sum + offset.
struct CodedRow {
  float scale;   // of the integer weights
  float offset;  // sum of weight * the values' zero
};

// The scratch of one call.
struct CodedScratch {
  float* scores;     // [kCodedRows, kTileTokens]
  float* totals;     // [kCodedRows, kMostHeadDim]
  int16_t* weights;  // [kMostQueries, kTileTokens]
  int16_t* queries;  // [kCodedRows, kMostHeadDim], in place of the totals while there are none
  int16_t* codes;    // keys [group][pair of dimensions][token][2], then values [pair of tokens][dimension][2]

  explicit CodedScratch(float* scratch)
      : scores(scratch),
        totals(scratch + kCodedRows * kTileTokens),
        weights(reinterpret_cast<int16_t*>(totals + kCodedRows * kMostHeadDim)),
        queries(reinterpret_cast<int16_t*>(totals)),
        codes(weights + kMostQueries * kTileTokens) {}
};

// Dimensions of a value as `codes` holds it: whole registers of either half of a value of 4 bits.
static inline int coded_stride(int head_dim) { return (head_dim + 31) / 32 * 32; }

// A pair of integers in every lane.
static inline int32_t pair_at(const int16_t* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof pair);
  return pair;
}

static inline uint32_t greatest8(__m256i magnitudes) {
  __m128i g = _mm_max_epi32(_mm256_castsi256_si128(magnitudes), _mm256_extracti128_si256(magnitudes, 1));
  g = _mm_max_epi32(g, _mm_shuffle_epi32(g, 0x4e));
  g = _mm_max_epi32(g, _mm_shuffle_epi32(g, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(g));
}

static inline CodedQuery to_integers(const float* query, int head_dim, int16_t* integers) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i magnitudes = _mm256_setzero_si256();
  int d = 0;
  for (; d + 8 <= head_dim; d += 8)
    magnitudes = _mm256_max_epi32(magnitudes, _mm256_and_si256(_mm256_castps_si256(_mm256_loadu_ps(query + d)), magnitude));
  uint32_t greatest = greatest8(magnitudes);
  for (; d < head_dim; ++d) {
    const uint32_t bits = bits_of(query[d]) & 0x7fffffffu;
    greatest = bits > greatest ? bits : greatest;
  }
  const Step step = step_of(greatest, kQueryLevels);

  const __m256 inverse = _mm256_set1_ps(step.inverse);
  __m256i sums = _mm256_setzero_si256();
  for (d = 0; d + 8 <= head_dim; d += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(query + d), inverse));
    sums = _mm256_add_epi32(sums, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + d),
                     _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  int32_t sum = _mm_cvtsi128_si32(s);
  for (; d < head_dim; ++d) {
    integers[d] = static_cast<int16_t>(round_to_int(query[d] * step.inverse));
    sum += integers[d];
  }
  return {step.scale, step.scale * static_cast<float>(sum)};
}

}  // namespace penstock::avx2
