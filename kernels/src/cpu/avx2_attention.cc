// AVX2: attention of some query rows over one tile of keys.
#include "avx2_kernels.h"
#include "avx2_softmax.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock::avx2 {

namespace {

// Query rows whose sums fit into registers beside the keys.
constexpr int kRows = 6;
// Values that all rows meet before the next ones: those of 64 dimensions fill a quarter of a first-level cache.
constexpr int kChunkTokens = 64;

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

// Of groups first … last-1.
template <int R>
void score(const KeyTile& tile, const QueryRow* rows, int head_dim, int first, int last, float* scores) {
  constexpr int G = wide_of(R);
  for (; first + G <= last; first += G) score_groups<R, G>(tile, rows, head_dim, first, scores);
  for (; first < last; ++first) score_groups<R, 1>(tile, rows, head_dim, first, scores);
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

using Score = void (*)(const KeyTile& tile, const QueryRow* rows, int head_dim, int first, int last, float* scores);
constexpr Score kScore[kRows] = {score<1>, score<2>, score<3>, score<4>, score<5>, score<6>};
using AddValues = void (*)(const KeyTile& tile, int first, int last, const float* weights, float* totals, int padded_dim);
constexpr AddValues kAddValues[kRows] = {add_values<1>, add_values<2>, add_values<3>,
                                         add_values<4>, add_values<5>, add_values<6>};

static_assert(kAttendScratch >= size_t{kMostQueries} * (kTileTokens + kMostHeadDim));

int smaller(int a, int b) { return a < b ? a : b; }

}  // namespace

// Keys and values are taken in pieces that stay in the first-level cache while all rows meet them, some rows at a time.
void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch) {
  if (tile.dtype != KvDtype::F16) return attend_coded(tile, rows, count, head_dim, scratch);
  // Rows come in order of position, so those that see nothing of this tile are the first, and the last sees most.
  while (count > 0 && rows[0].visible == 0) {
    ++rows;
    --count;
  }
  if (count == 0) return;
  const int padded_dim = (head_dim + 15) / 16 * 16;
  const int most = rows[count - 1].visible;
  float* weights = scratch;                       // [count, kTileTokens]
  float* totals = scratch + count * kTileTokens;  // [count, padded_dim]

  constexpr int kKeyGroups = 4;
  for (int g = 0; g * kGroupTokens < most; g += kKeyGroups) {
    for (int i = 0; i < count; i += kRows) {
      const int batch = smaller(kRows, count - i);
      const int groups = (rows[i + batch - 1].visible + kGroupTokens - 1) / kGroupTokens;
      kScore[batch - 1](tile, rows + i, head_dim, g, smaller(g + kKeyGroups, groups), weights + i * kTileTokens);
    }
  }

  float max[kMostQueries], sum[kMostQueries];
  for (int i = 0; i < count; ++i) weigh(weights + i * kTileTokens, rows[i].visible, rows[i].visible, &max[i], &sum[i]);

  std::memset(totals, 0, sizeof(float) * count * padded_dim);
  for (int first = 0; first < most; first += kChunkTokens) {
    const int last = smaller(first + kChunkTokens, most);
    for (int i = 0; i < count; i += kRows) {
      const int batch = smaller(kRows, count - i);
      const int common = smaller(last, rows[i].visible);
      if (first < common)
        kAddValues[batch - 1](tile, first, common, weights + i * kTileTokens, totals + i * padded_dim, padded_dim);
      // The last keys of a causal tile are seen by some rows only. Others must not even multiply them by zero: a place that
      // nobody has written may hold infinity.
      const int from = common > first ? common : first;
      for (int r = i; r < i + batch; ++r) {
        const int to = smaller(last, rows[r].visible);
        if (from < to) add_values<1>(tile, from, to, weights + r * kTileTokens, totals + r * padded_dim, padded_dim);
      }
    }
  }

  for (int i = 0; i < count; ++i) merge(rows[i], {nullptr, 0, max[i], sum[i], totals + i * padded_dim}, head_dim);
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
