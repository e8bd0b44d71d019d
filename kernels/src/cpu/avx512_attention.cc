// AVX-512: attention of some query rows over one tile of keys. Same steps as avx2_attention.cc, in registers twice as wide: the
// sixteen lanes of a sum are one register, as are the keys of a group. Totals are merged straight from registers where all rows of
// a run see the same keys.
#include "avx512_kernels.h"
#include "avx512_softmax.h"
#include "row_runs.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock::avx512 {

namespace {

constexpr int kRows = 6;

// Scores of R rows for G groups of 16 keys from group g on.
template <int R, int G>
void score_groups(const KeyTile& tile, const QueryRow* rows, int head_dim, int g, float* scores /* [R, kTileTokens] */) {
  __m512 sums[R][G];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int i = 0; i < G; ++i)
      sums[r][i] = _mm512_setzero_ps();
  }
  size_t at = 0;
  for (int d = 0; d < head_dim; ++d, at += tile.key_stride) {
    __m512 keys[G];
    UNROLL for (int i = 0; i < G; ++i)
      keys[i] = load_half16(tile.keys[g + i] + at);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512 q = _mm512_set1_ps(rows[r].query[d]);
      UNROLL for (int i = 0; i < G; ++i)
        sums[r][i] = _mm512_fmadd_ps(q, keys[i], sums[r][i]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int i = 0; i < G; ++i)
      _mm512_storeu_ps(scores + r * kTileTokens + (g + i) * kGroupTokens, sums[r][i]);
  }
}

// Few rows take more groups at once, so that enough chains of fma are under way.
template <int R>
void score(const KeyTile& tile, const QueryRow* rows, int head_dim, int tokens, float* scores) {
  constexpr int kGroups = R <= 3 ? 4 : 2;
  const int groups = (tokens + kGroupTokens - 1) / kGroupTokens;
  int g = 0;
  for (; g + kGroups <= groups; g += kGroups) score_groups<R, kGroups>(tile, rows, head_dim, g, scores);
  for (; g < groups; ++g) score_groups<R, 1>(tile, rows, head_dim, g, scores);
}

// Sums of values times weights over keys first … last-1, for 16 * C dimensions of R rows, from `begin` on; `end` takes them.
template <int R, int C, class Begin, class End>
void add_values(const KeyTile& tile, int first, int last, int d, const float* weights, Begin&& begin, End&& end) {
  __m512 sums[R][C];
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c)
      sums[r][c] = begin(r, d + 16 * c);
  }
  for (int t = first; t < last; ++t) {
    __m512 values[C];
    UNROLL for (int c = 0; c < C; ++c)
      values[c] = load_half16(tile.values[t] + d + 16 * c);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512 w = _mm512_set1_ps(weights[r * kTileTokens + t]);
      UNROLL for (int c = 0; c < C; ++c)
        sums[r][c] = _mm512_fmadd_ps(w, values[c], sums[r][c]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    UNROLL for (int c = 0; c < C; ++c)
      end(r, d + 16 * c, sums[r][c]);
  }
}

template <int R, class Begin, class End>
void add_all_values(const KeyTile& tile, int first, int last, const float* weights, int head_dim, Begin&& begin, End&& end) {
  int d = 0;
  for (; d + 64 <= head_dim; d += 64) add_values<R, 4>(tile, first, last, d, weights, begin, end);
  for (; d < head_dim; d += 16) add_values<R, 1>(tile, first, last, d, weights, begin, end);
}

// R rows that all see at least one key of the tile. They come in order of position.
template <int R>
void attend_rows(const KeyTile& tile, QueryRow* rows, int head_dim, float* scratch) {
  float* weights = scratch;                       // [R, kTileTokens]
  float* totals = scratch + kRows * kTileTokens;  // [R, kMostHeadDim]
  const int fewest = rows[0].visible;
  const int most = rows[R - 1].visible;
  score<R>(tile, rows, head_dim, most, weights);
  float max[R], sum[R];
  for (int r = 0; r < R; ++r) weigh(weights + r * kTileTokens, rows[r].visible, &max[r], &sum[r]);
  const MergeFactors<R> factors(rows, max, sum);

  const auto zero = [](int, int) { return _mm512_setzero_ps(); };
  const auto merge = [&](int r, int d, __m512 total) { factors.merge(rows, r, d, total); };
  if (fewest == most) return add_all_values<R>(tile, 0, most, weights, head_dim, zero, merge);
  // As in AVX2, keys that only some rows see are added row by row.
  add_all_values<R>(tile, 0, fewest, weights, head_dim, zero,
                    [&](int r, int d, __m512 total) { _mm512_storeu_ps(totals + r * kMostHeadDim + d, total); });
  for (int r = 0; r < R; ++r) {
    add_all_values<1>(
        tile, fewest, rows[r].visible, weights + r * kTileTokens, head_dim,
        [&](int, int d) { return _mm512_loadu_ps(totals + r * kMostHeadDim + d); },
        [&](int, int d, __m512 total) { merge(r, d, total); });
  }
}

}  // namespace

void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch) {
  if (tile.dtype != KvDtype::F16) return attend_coded(tile, rows, count, head_dim, scratch);
  // Rows come in order of position, so those that see nothing of this tile are the first.
  while (count > 0 && rows[0].visible == 0) {
    ++rows;
    --count;
  }
  in_runs<kRows>(count, [&](auto run, int first) { attend_rows<decltype(run)::value>(tile, rows + first, head_dim, scratch); });
}

}  // namespace penstock::avx512
