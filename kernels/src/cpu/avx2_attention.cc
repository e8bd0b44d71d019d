// AVX2: attention of some query rows over one tile of keys.
#include "avx2_kernels.h"
#include "avx2_softmax.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock::avx2 {

namespace {

// Query rows whose sums fit into registers beside the keys.
constexpr int kRows = 6;

// scores[r][t] for the groups of 16 keys that any of R rows sees. A score is one chain of fma over the dimensions.
template <int R>
void score(const KeyTile& tile, const QueryRow* rows, int head_dim, int tokens, float* scores /* [R, kTileTokens] */) {
  for (int g = 0; g * kGroupTokens < tokens; ++g) {
    const uint16_t* keys = tile.keys[g];
    __m256 sums[R][2];
    UNROLL for (int r = 0; r < R; ++r)
      sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    for (int d = 0; d < head_dim; ++d, keys += tile.key_stride) {
      const __m256 k0 = load_half8(keys);
      const __m256 k1 = load_half8(keys + 8);
      UNROLL for (int r = 0; r < R; ++r) {
        const __m256 q = _mm256_broadcast_ss(rows[r].query + d);
        sums[r][0] = _mm256_fmadd_ps(q, k0, sums[r][0]);
        sums[r][1] = _mm256_fmadd_ps(q, k1, sums[r][1]);
      }
    }
    UNROLL for (int r = 0; r < R; ++r) {
      _mm256_storeu_ps(scores + r * kTileTokens + g * kGroupTokens, sums[r][0]);
      _mm256_storeu_ps(scores + r * kTileTokens + g * kGroupTokens + 8, sums[r][1]);
    }
  }
}

// totals[r][d] over keys first … last-1, for 16 dimensions of R rows, continuing what is in `totals`.
template <int R>
void add_values(const KeyTile& tile, int first, int last, int d, const float* weights, float* totals, int stride) {
  __m256 sums[R][2];
  UNROLL for (int r = 0; r < R; ++r) {
    sums[r][0] = _mm256_loadu_ps(totals + r * stride + d);
    sums[r][1] = _mm256_loadu_ps(totals + r * stride + d + 8);
  }
  for (int t = first; t < last; ++t) {
    const __m256 v0 = load_half8(tile.values[t] + d);
    const __m256 v1 = load_half8(tile.values[t] + d + 8);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256 w = _mm256_broadcast_ss(weights + r * kTileTokens + t);
      sums[r][0] = _mm256_fmadd_ps(w, v0, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(w, v1, sums[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    _mm256_storeu_ps(totals + r * stride + d, sums[r][0]);
    _mm256_storeu_ps(totals + r * stride + d + 8, sums[r][1]);
  }
}

// R rows that all see at least one key of the tile.
template <int R>
void attend_rows(const KeyTile& tile, QueryRow* rows, int head_dim, float* scratch) {
  const int padded_dim = (head_dim + 15) / 16 * 16;
  float* weights = scratch;                       // [R, kTileTokens]
  float* totals = scratch + kRows * kTileTokens;  // [R, padded_dim]
  int most = rows[0].visible;
  int fewest = most;
  for (int r = 1; r < R; ++r) {
    most = rows[r].visible > most ? rows[r].visible : most;
    fewest = rows[r].visible < fewest ? rows[r].visible : fewest;
  }
  score<R>(tile, rows, head_dim, most, weights);
  float max[R], sum[R];
  for (int r = 0; r < R; ++r) weigh(weights + r * kTileTokens, rows[r].visible, most, &max[r], &sum[r]);

  std::memset(totals, 0, sizeof(float) * R * padded_dim);
  for (int d = 0; d < padded_dim; d += 16) {
    add_values<R>(tile, 0, fewest, d, weights, totals, padded_dim);
    // The last keys of a causal tile are seen by some rows only. Others must not even multiply them by zero: a place that
    // nobody has written may hold infinity.
    for (int r = 0; r < R; ++r) {
      if (rows[r].visible > fewest) {
        add_values<1>(tile, fewest, rows[r].visible, d, weights + r * kTileTokens, totals + r * padded_dim, padded_dim);
      }
    }
  }

  for (int r = 0; r < R; ++r) merge(rows[r], {nullptr, 0, max[r], sum[r], totals + r * padded_dim}, head_dim);
}

}  // namespace

void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch) {
  if (tile.dtype != KvDtype::F16) return attend_coded(tile, rows, count, head_dim, scratch);
  // Rows come in order of position, so those that see nothing of this tile are the first.
  while (count > 0 && rows[0].visible == 0) {
    ++rows;
    --count;
  }
  for (; count >= kRows; count -= kRows, rows += kRows) attend_rows<kRows>(tile, rows, head_dim, scratch);
  switch (count) {
    case 5: return attend_rows<5>(tile, rows, head_dim, scratch);
    case 4: return attend_rows<4>(tile, rows, head_dim, scratch);
    case 3: return attend_rows<3>(tile, rows, head_dim, scratch);
    case 2: return attend_rows<2>(tile, rows, head_dim, scratch);
    case 1: return attend_rows<1>(tile, rows, head_dim, scratch);
    default: return;
  }
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
