// AVX2: attention of some query rows over one tile of codes, by integers, as kv_codes.h says. Same steps as
// avx512_coded_attention.cc, in registers half as wide.
#include "avx2_codes.h"
#include "avx2_kernels.h"
#include "avx2_softmax.h"

#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL4 _Pragma("GCC unroll 4")

namespace penstock::avx2 {

namespace {

inline __m256i load(const int16_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store(int16_t* to, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x); }

// Adds products of pairs. The empty statement keeps gcc 12 from moving all products of a tile before all sums, which spills them.
inline __m256i add_pairs(__m256i sum, __m256i a, __m256i b) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
  asm("" : "+x"(sum));
  return sum;
}

// to[group][pair of dimensions][16 tokens][2]
template <int kBits>
void spread_keys(const KeyTile& tile, int head_dim, int tokens, int16_t* to) {
  const int units = head_dim * kBits / 16;
  const size_t stride = tile.key_stride;
  const __m128i low = _mm_set1_epi8(15);
  for (int g = 0; g * kGroupTokens < tokens; ++g) {
    const uint16_t* from = tile.keys[g];
    UNROLL4 for (int u = 0; u < units; ++u, from += stride, to += 32) {
      UNROLL for (int half = 0; half < 2; ++half) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8 * half));
        if (kBits == 8) {
          store(to + 16 * half, _mm256_cvtepu8_epi16(codes));
        } else {  // the second half of the dimensions is the upper half of the bytes
          store(to + 16 * half, _mm256_cvtepu8_epi16(_mm_and_si128(codes, low)));
          store(to + units * 32 + 16 * half, _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(codes, 4), low)));
        }
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
  const __m256i low = _mm256_set1_epi16(15);
  for (int t = 0; t < tokens; t += 2, to += stride) {
    // A tile of an odd number of tokens has the last one twice; its second weight is zero.
    const uint8_t* first = reinterpret_cast<const uint8_t*>(tile.values[t]);
    const uint8_t* second = reinterpret_cast<const uint8_t*>(tile.values[t + 1 < tokens ? t + 1 : t]);
    const auto pairs = [&](int d) {
      const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first + d)));
      const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(second + d)));
      return _mm256_or_si256(a, _mm256_slli_epi32(b, 16));
    };
    if (kBits == 8) {
      UNROLL4 for (int d = 0; d < bytes; d += 8) store(to + 2 * d, pairs(d));
    } else {  // the upper half comes last, over what the lower one has written too much
      UNROLL4 for (int d = 0; d < bytes; d += 8) store(to + 2 * d, _mm256_and_si256(pairs(d), low));
      UNROLL4 for (int d = 0; d < bytes; d += 8) store(to + 2 * (bytes + d), _mm256_srli_epi16(pairs(d), 4));
    }
  }
}

// Scores of R rows for the 16 keys of group g.
template <int R>
void score_group(const KeyTile& tile, const int16_t* keys, const int16_t* queries, const CodedQuery* steps, int head_dim, int g,
                 float* scores /* [R, kTileTokens] */) {
  __m256i sums[R][2];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  const int16_t* from = keys + g * kGroupTokens * head_dim;
  for (int d = 0; d < head_dim; d += 2, from += 32) {
    const __m256i k0 = load(from);
    const __m256i k1 = load(from + 16);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256i q = _mm256_set1_epi32(pair_at(queries + r * kMostHeadDim + d));
      sums[r][0] = add_pairs(sums[r][0], k0, q);
      sums[r][1] = add_pairs(sums[r][1], k1, q);
    }
  }
  const size_t rows = head_dim * kv_bits(tile.dtype) / 16;
  const uint16_t* scales = tile.keys[g] + rows * tile.key_stride;
  UNROLL for (int half = 0; half < 2; ++half) {
    const __m256 scale = load_half8(scales + 8 * half);
    const __m256 zero = load_half8(scales + tile.key_stride + 8 * half);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256 s = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][half]), _mm256_mul_ps(scale, _mm256_set1_ps(steps[r].scale)),
                                       _mm256_mul_ps(zero, _mm256_set1_ps(steps[r].sum)));
      _mm256_storeu_ps(scores + r * kTileTokens + g * kGroupTokens + 8 * half, s);
    }
  }
}

// Weights times the values' scales become integers; those beyond `visible` are zero.
CodedRow weigh_values(const KeyTile& tile, float* weights /* [kTileTokens] */, int visible, int tokens, int16_t* integers) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int padded = (tokens + kGroupTokens - 1) / kGroupTokens * kGroupTokens;
  __m256 offsets[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  __m256i magnitudes = _mm256_setzero_si256();
  for (int t = 0; t < padded; t += 8) {
    const uint16_t* scales = tile.value_scales[t / kGroupTokens] + t % kGroupTokens;
    const __m256 seen = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(visible - t), index));
    const __m256 weight = _mm256_loadu_ps(weights + t);
    __m256& offset = offsets[t / 8 % 2];
    offset = _mm256_blendv_ps(offset, _mm256_fmadd_ps(weight, load_half8(scales + tile.key_stride), offset), seen);
    const __m256 scaled = _mm256_and_ps(_mm256_mul_ps(weight, load_half8(scales)), seen);
    _mm256_storeu_ps(weights + t, scaled);
    magnitudes = _mm256_max_epi32(magnitudes, _mm256_and_si256(_mm256_castps_si256(scaled), _mm256_set1_epi32(0x7fffffff)));
  }
  const Step step = step_of(greatest8(magnitudes), kWeightLevels);
  const __m256 inverse = _mm256_set1_ps(step.inverse);
  for (int t = 0; t < padded; t += 8) {
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(weights + t), inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(integers + t),
                     _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1)));
  }
  return {step.scale, tree_sum16(Lanes{offsets[0], offsets[1]})};
}

// totals[r][d] of all tokens, for 16 dimensions of R rows.
template <int R>
void add_values(const int16_t* values, int stride, int tokens, int d, const int16_t* weights, const CodedRow* coded,
                float* totals /* [R, kMostHeadDim] */) {
  __m256i sums[R][2];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  const int16_t* from = values + 2 * d;
  for (int t = 0; t < tokens; t += 2, from += 2 * stride) {
    const __m256i v0 = load(from);
    const __m256i v1 = load(from + 16);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256i w = _mm256_set1_epi32(pair_at(weights + r * kTileTokens + t));
      sums[r][0] = add_pairs(sums[r][0], v0, w);
      sums[r][1] = add_pairs(sums[r][1], v1, w);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int half = 0; half < 2; ++half)
      _mm256_storeu_ps(totals + r * kMostHeadDim + d + 8 * half,
                       _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][half]), _mm256_set1_ps(coded[r].scale),
                                       _mm256_set1_ps(coded[r].offset)));
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
    const int most = rows[first + R - 1].visible;
    CodedQuery steps[R];
    for (int r = 0; r < R; ++r) steps[r] = to_integers(rows[first + r].query, head_dim, scratch.queries + r * kMostHeadDim);
    for (int g = 0; g * kGroupTokens < most; ++g)
      score_group<R>(tile, scratch.codes, scratch.queries, steps, head_dim, g, scratch.scores);
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
    for (int d = 0; d < head_dim; d += 16) add_values<R>(scratch.codes, stride, most, d, weights, coded + first, scratch.totals);
    for (int r = 0; r < R; ++r)
      merge(rows[first + r], {nullptr, 0, max[first + r], sum[first + r], scratch.totals + r * kMostHeadDim}, head_dim);
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

}  // namespace penstock::avx2
