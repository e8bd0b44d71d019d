// AVX-512 with VNNI: attention of some query rows over one tile of codes, by integers, as kv_codes.h says. A tile's codes are
// spread out to 16 bits once for all rows; VPDPWSSD then multiplies two dimensions of a key, or two tokens' values, a lane.
#include "avx2_codes.h"
#include "avx512_kernels.h"
#include "avx512_softmax.h"

#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL4 _Pragma("GCC unroll 4")

namespace penstock::avx512 {

namespace {

using avx2::coded_stride;
using avx2::CodedRow;
using avx2::CodedScratch;
using avx2::kCodedRows;
using avx2::pair_at;

// Adds products of pairs. The empty statement ties the sum to its register: gcc 12 would copy and spill half of a tile's sums.
inline __m512i add_pairs(__m512i sum, __m512i a, __m512i b) {
  sum = _mm512_dpwssd_epi32(sum, a, b);
  asm("" : "+v"(sum));
  return sum;
}

// to[group][pair of dimensions][16 tokens][2]
template <int kBits>
void spread_keys(const KeyTile& tile, int head_dim, int tokens, int16_t* to) {
  const int units = head_dim * kBits / 16;
  const size_t stride = tile.key_stride;
  const __m256i low = _mm256_set1_epi8(15);
  for (int g = 0; g * kGroupTokens < tokens; ++g) {
    const uint16_t* from = tile.keys[g];
    UNROLL4 for (int u = 0; u < units; ++u, from += stride, to += 32) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      if (kBits == 8) {
        _mm512_storeu_si512(to, _mm512_cvtepu8_epi16(codes));
      } else {  // the second half of the dimensions is the upper half of the bytes
        _mm512_storeu_si512(to, _mm512_cvtepu8_epi16(_mm256_and_si256(codes, low)));
        _mm512_storeu_si512(to + units * 32, _mm512_cvtepu8_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), low)));
      }
    }
    if (kBits == 4) to += units * 32;
  }
}

// to[pair of tokens][coded_stride][2]
template <int kBits>
void spread_values(const KeyTile& tile, int head_dim, int tokens, int16_t* to) {
  const int bytes = head_dim * kBits / 8;
  const int stride = 2 * coded_stride(head_dim);
  const __m512i low = _mm512_set1_epi16(15);
  for (int t = 0; t < tokens; t += 2, to += stride) {
    // A tile of an odd number of tokens has the last one twice; its second weight is zero.
    const uint8_t* first = reinterpret_cast<const uint8_t*>(tile.values[t]);
    const uint8_t* second = reinterpret_cast<const uint8_t*>(tile.values[t + 1 < tokens ? t + 1 : t]);
    const auto pairs = [&](int d) {
      const __m512i a = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first + d)));
      const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(second + d)));
      return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
    };
    if (kBits == 8) {
      UNROLL4 for (int d = 0; d < bytes; d += 16) _mm512_storeu_si512(to + 2 * d, pairs(d));
    } else {  // the upper half comes last, over what the lower one has written too much
      UNROLL4 for (int d = 0; d < bytes; d += 16) _mm512_storeu_si512(to + 2 * d, _mm512_and_si512(pairs(d), low));
      UNROLL4 for (int d = 0; d < bytes; d += 16) _mm512_storeu_si512(to + 2 * (bytes + d), _mm512_srli_epi16(pairs(d), 4));
    }
  }
}

// Scores of R rows for G groups of 16 keys from group g on.
template <int R, int G>
void score_groups(const KeyTile& tile, const int16_t* keys, const int16_t* queries, const CodedQuery* steps, int head_dim, int g,
                  float* scores /* [R, kTileTokens] */) {
  __m512i sums[R][G];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int i = 0; i < G; ++i)
      sums[r][i] = _mm512_setzero_si512();
  }
  const int16_t* from = keys + g * kGroupTokens * head_dim;
  for (int d = 0; d < head_dim; d += 2, from += 32) {
    __m512i k[G];
    UNROLL for (int i = 0; i < G; ++i)
      k[i] = _mm512_loadu_si512(from + i * kGroupTokens * head_dim);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512i q = _mm512_set1_epi32(pair_at(queries + r * kMostHeadDim + d));
      UNROLL for (int i = 0; i < G; ++i)
        sums[r][i] = add_pairs(sums[r][i], k[i], q);
    }
  }
  const size_t rows = head_dim * kv_bits(tile.dtype) / 16;
  UNROLL for (int i = 0; i < G; ++i) {
    const uint16_t* scales = tile.keys[g + i] + rows * tile.key_stride;
    const __m512 scale = load_half16(scales);
    const __m512 zero = load_half16(scales + tile.key_stride);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512 s = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][i]), _mm512_mul_ps(scale, _mm512_set1_ps(steps[r].scale)),
                                       _mm512_mul_ps(zero, _mm512_set1_ps(steps[r].sum)));
      _mm512_storeu_ps(scores + r * kTileTokens + (g + i) * kGroupTokens, s);
    }
  }
}

// Weights times the values' scales become integers; those beyond `visible` are zero.
CodedRow weigh_values(const KeyTile& tile, float* weights /* [kTileTokens] */, int visible, int tokens, int16_t* integers) {
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 offset = _mm512_setzero_ps();
  __m512i magnitudes = _mm512_setzero_si512();
  for (int t = 0; t < tokens; t += kGroupTokens) {
    const uint16_t* scales = tile.value_scales[t / kGroupTokens];
    const __mmask16 seen = _mm512_cmpgt_epi32_mask(_mm512_set1_epi32(visible - t), index);
    const __m512 weight = _mm512_loadu_ps(weights + t);
    offset = _mm512_mask3_fmadd_ps(weight, load_half16(scales + tile.key_stride), offset, seen);
    const __m512 scaled = _mm512_maskz_mul_ps(seen, weight, load_half16(scales));
    _mm512_storeu_ps(weights + t, scaled);
    magnitudes = _mm512_max_epi32(magnitudes, _mm512_and_si512(_mm512_castps_si512(scaled), _mm512_set1_epi32(0x7fffffff)));
  }
  const Step step = step_of(static_cast<uint32_t>(_mm512_reduce_max_epi32(magnitudes)), kWeightLevels);
  const __m512 inverse = _mm512_set1_ps(step.inverse);
  for (int t = 0; t < tokens; t += kGroupTokens) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(weights + t), inverse));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers + t), _mm512_cvtsepi32_epi16(rounded));
  }
  return {step.scale, tree_sum16(offset)};
}

// totals[r][d] of all tokens, for 16 * C dimensions of R rows.
template <int R, int C>
void add_values(const int16_t* values, int stride, int tokens, int d, const int16_t* weights, const CodedRow* coded,
                float* totals /* [R, kMostHeadDim] */) {
  __m512i sums[R][C];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c)
      sums[r][c] = _mm512_setzero_si512();
  }
  const int16_t* from = values + 2 * d;
  for (int t = 0; t < tokens; t += 2, from += 2 * stride) {
    __m512i v[C];
    UNROLL for (int c = 0; c < C; ++c)
      v[c] = _mm512_loadu_si512(from + 32 * c);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512i w = _mm512_set1_epi32(pair_at(weights + r * kTileTokens + t));
      UNROLL for (int c = 0; c < C; ++c)
        sums[r][c] = add_pairs(sums[r][c], v[c], w);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c)
      _mm512_storeu_ps(totals + r * kMostHeadDim + d + 16 * c,
                       _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][c]), _mm512_set1_ps(coded[r].scale),
                                       _mm512_set1_ps(coded[r].offset)));
  }
}

template <int kBits>
void attend_bits(const KeyTile& tile, QueryRow* rows, int count, int head_dim, const CodedScratch& scratch) {
  const int tokens = rows[count - 1].visible;  // rows come in order of position
  CodedRow coded[kMostQueries];
  float max[kMostQueries], sum[kMostQueries];
  spread_keys<kBits>(tile, head_dim, tokens, scratch.codes);
  in_runs<kCodedRows>(count, [&](auto run, int first) {
    constexpr int R = decltype(run)::value;
    constexpr int kGroups = R <= 3 ? 4 : 2;  // few rows take more, so that enough chains are under way
    const int most = rows[first + R - 1].visible;
    CodedQuery steps[R];
    for (int r = 0; r < R; ++r) steps[r] = avx2::to_integers(rows[first + r].query, head_dim, scratch.queries + r * kMostHeadDim);
    const int groups = (most + kGroupTokens - 1) / kGroupTokens;
    int g = 0;
    for (; g + kGroups <= groups; g += kGroups)
      score_groups<R, kGroups>(tile, scratch.codes, scratch.queries, steps, head_dim, g, scratch.scores);
    for (; g < groups; ++g) score_groups<R, 1>(tile, scratch.codes, scratch.queries, steps, head_dim, g, scratch.scores);
    for (int r = 0; r < R; ++r) {
      float* scores = scratch.scores + r * kTileTokens;
      weigh(scores, rows[first + r].visible, &max[first + r], &sum[first + r]);
      coded[first + r] = weigh_values(tile, scores, rows[first + r].visible, most, scratch.weights + (first + r) * kTileTokens);
    }
  });

  const int stride = coded_stride(head_dim);
  spread_values<kBits>(tile, head_dim, tokens, scratch.codes);
  in_runs<kCodedRows>(count, [&](auto run, int first) {
    constexpr int R = decltype(run)::value;
    const int most = rows[first + R - 1].visible;
    const int16_t* weights = scratch.weights + first * kTileTokens;
    int d = 0;
    for (; d + 64 <= head_dim; d += 64)
      add_values<R, 4>(scratch.codes, stride, most, d, weights, coded + first, scratch.totals);
    for (; d < head_dim; d += 16) add_values<R, 1>(scratch.codes, stride, most, d, weights, coded + first, scratch.totals);
    const MergeFactors<R> factors(rows + first, max + first, sum + first);
    for (int r = 0; r < R; ++r) {
      for (d = 0; d < head_dim; d += 16) factors.merge(rows + first, r, d, _mm512_loadu_ps(scratch.totals + r * kMostHeadDim + d));
    }
  });
}

}  // namespace

void attend_coded(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch) {
  // Rows come in order of position, so those that see nothing of this tile are the first.
  while (count > 0 && rows[0].visible == 0) {
    ++rows;
    --count;
  }
  if (count == 0) return;
  if (tile.dtype == KvDtype::Int8) {
    attend_bits<8>(tile, rows, count, head_dim, CodedScratch(scratch));
  } else {
    attend_bits<4>(tile, rows, count, head_dim, CodedScratch(scratch));
  }
}

}  // namespace penstock::avx512
