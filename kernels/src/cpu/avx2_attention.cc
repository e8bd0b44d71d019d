// AVX2: attention of some query rows over one tile of keys.
#include "avx2_kernels.h"
#include "avx2_softmax.h"
#include "row_runs.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock::avx2 {

namespace {

// Query rows whose sums fit into registers beside the keys.
constexpr int kRows = 6;
// Register pairs beside R rows that keep enough chains of fma under way.
constexpr int wide_of(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }

// sums[r][c] += row(r) * column(c). Those of which there are fewer are kept in registers beside the sums.
template <int R, int C, class Row, class Column>
inline void fma_all(Row&& row, Column&& column, __m256 (&sums)[R][C]) {
  if constexpr (R < C) {
    __m256 kept[R];
    UNROLL for (int r = 0; r < R; ++r)
      kept[r] = row(r);
    UNROLL for (int c = 0; c < C; ++c) {
      const __m256 x = column(c);
      UNROLL for (int r = 0; r < R; ++r)
        sums[r][c] = _mm256_fmadd_ps(kept[r], x, sums[r][c]);
    }
  } else {
    __m256 kept[C];
    UNROLL for (int c = 0; c < C; ++c)
      kept[c] = column(c);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256 x = row(r);
      UNROLL for (int c = 0; c < C; ++c)
        sums[r][c] = _mm256_fmadd_ps(x, kept[c], sums[r][c]);
    }
  }
}

// Scores of R rows for G groups of 16 keys from group g on. A score is one chain of fma over the dimensions.
template <int R, int G>
void score_groups(const KeyTile& tile, const QueryRow* rows, int head_dim, int g, float* scores /* [R, kTileTokens] */) {
  __m256 sums[R][2 * G];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int i = 0; i < 2 * G; ++i)
      sums[r][i] = _mm256_setzero_ps();
  size_t at = 0;
  for (int d = 0; d < head_dim; ++d, at += tile.key_stride) {
    fma_all<R, 2 * G>([&](int r) { return _mm256_broadcast_ss(rows[r].query + d); },
                      [&](int i) { return load_half8(tile.keys[g + i / 2] + at + 8 * (i % 2)); }, sums);
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int i = 0; i < 2 * G; ++i)
      _mm256_storeu_ps(scores + r * kTileTokens + g * kGroupTokens + 8 * i, sums[r][i]);
}

template <int R>
void score(const KeyTile& tile, const QueryRow* rows, int head_dim, int tokens, float* scores) {
  constexpr int G = wide_of(R);
  const int groups = (tokens + kGroupTokens - 1) / kGroupTokens;
  int g = 0;
  for (; g + G <= groups; g += G) score_groups<R, G>(tile, rows, head_dim, g, scores);
  for (; g < groups; ++g) score_groups<R, 1>(tile, rows, head_dim, g, scores);
}

// totals[r][d] over keys first … last-1, for 16 * G dimensions of R rows, continuing what is in `totals`.
template <int R, int G>
void add_columns(const KeyTile& tile, int first, int last, int d, const float* weights, float* totals, int stride) {
  __m256 sums[R][2 * G];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int i = 0; i < 2 * G; ++i)
      sums[r][i] = _mm256_loadu_ps(totals + r * stride + d + 8 * i);
  for (int t = first; t < last; ++t) {
    fma_all<R, 2 * G>([&](int r) { return _mm256_broadcast_ss(weights + r * kTileTokens + t); },
                      [&](int i) { return load_half8(tile.values[t] + d + 8 * i); }, sums);
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int i = 0; i < 2 * G; ++i)
      _mm256_storeu_ps(totals + r * stride + d + 8 * i, sums[r][i]);
}

template <int R>
void add_values(const KeyTile& tile, int first, int last, const float* weights, float* totals, int padded_dim) {
  constexpr int G = wide_of(R);
  int d = 0;
  for (; d + 16 * G <= padded_dim; d += 16 * G) add_columns<R, G>(tile, first, last, d, weights, totals, padded_dim);
  for (; d < padded_dim; d += 16) add_columns<R, 1>(tile, first, last, d, weights, totals, padded_dim);
}

// R rows that all see at least one key of the tile.
template <int R>
void attend_rows(const KeyTile& tile, QueryRow* rows, int head_dim, float* scratch) {
  const int padded_dim = (head_dim + 15) / 16 * 16;
  float* weights = scratch;                       // [R, kTileTokens]
  float* totals = scratch + kRows * kTileTokens;  // [R, padded_dim]
  // Rows come in order of position.
  const int fewest = rows[0].visible;
  score<R>(tile, rows, head_dim, rows[R - 1].visible, weights);
  float max[R], sum[R];
  for (int r = 0; r < R; ++r) weigh(weights + r * kTileTokens, rows[r].visible, &max[r], &sum[r]);

  std::memset(totals, 0, sizeof(float) * R * padded_dim);
  add_values<R>(tile, 0, fewest, weights, totals, padded_dim);
  // The last keys of a causal tile are seen by some rows only. Others must not even multiply them by zero: a place that
  // nobody has written may hold infinity.
  for (int r = 0; r < R; ++r) {
    if (rows[r].visible > fewest)
      add_values<1>(tile, fewest, rows[r].visible, weights + r * kTileTokens, totals + r * padded_dim, padded_dim);
  }

  for (int r = 0; r < R; ++r) merge(rows[r], {nullptr, 0, max[r], sum[r], totals + r * padded_dim}, head_dim);
}

}  // namespace

void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch) {
  if (tile.dtype != KvDtype::F16) return attend_coded(tile, rows, count, head_dim, scratch);
  // Those that see nothing of this tile are the first.
  while (count > 0 && rows[0].visible == 0) {
    ++rows;
    --count;
  }
  in_runs<kRows>(count, [&](auto run, int first) { attend_rows<decltype(run)::value>(tile, rows + first, head_dim, scratch); });
}

void merge(QueryRow& row, const QueryRow& tile, int head_dim) {
  const float max = tile.max > row.max ? tile.max : row.max;
  const float old_weight = fixed_exp(row.max - max);
  const float new_weight = fixed_exp(tile.max - max);
  const __m256 o = _mm256_set1_ps(old_weight);
  const __m256 n = _mm256_set1_ps(new_weight);
  for (int d = 0; d < head_dim; d += 8) {  // totals are padded to 16
    const __m256 total = _mm256_mul_ps(_mm256_loadu_ps(tile.total + d), n);
    _mm256_storeu_ps(row.total + d, _mm256_fmadd_ps(_mm256_loadu_ps(row.total + d), o, total));
  }
  row.sum = std::fma(row.sum, old_weight, tile.sum * new_weight);
  row.max = max;
}

}  // namespace penstock::avx2
