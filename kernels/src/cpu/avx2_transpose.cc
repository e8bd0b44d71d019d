// AVX2: rows of 16-bit numbers to columns and back.
#include "avx2_kernels.h"
#include "avx2_math.h"

namespace penstock::avx2 {

namespace {

constexpr int kTile = 8;  // columns of a tile, and half of its rows

inline __m128i load(const WireUnit* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

// Eight columns of 16 rows, or of 8. Rows r and r + 8 share a register, a half each: no step has to cross the halves, and a column
// leaves as one register.
template <bool kSixteen>
inline void transpose_tile(const WireUnit* from, size_t from_stride, WireUnit* to, size_t to_stride) {
  __m256i rows[kTile];
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    rows[i] = _mm256_castsi128_si256(load(from + i * from_stride));
    if (kSixteen) rows[i] = _mm256_inserti128_si256(rows[i], load(from + (i + kTile) * from_stride), 1);
  }
  __m256i pairs[kTile];  // [2 * pair of rows + half]: columns 0 … 3 or 4 … 7, two rows of each side by side
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 2) {
    pairs[i] = _mm256_unpacklo_epi16(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi16(rows[i], rows[i + 1]);
  }
  __m256i fours[kTile];  // [4 * four of rows + pair of columns]
#pragma GCC unroll 4
  for (int i = 0; i < kTile; i += 4) {
    fours[i] = _mm256_unpacklo_epi32(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm256_unpackhi_epi32(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm256_unpacklo_epi32(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm256_unpackhi_epi32(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    const __m256i low = fours[i / 2];
    const __m256i high = fours[4 + i / 2];
    const __m256i column = i % 2 == 0 ? _mm256_unpacklo_epi64(low, high) : _mm256_unpackhi_epi64(low, high);
    if (kSixteen) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * to_stride), column);
    } else {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_stride), _mm256_castsi256_si128(column));
    }
  }
}

}  // namespace

void transpose(const WireUnit* from, size_t from_stride, int rows, int columns, WireUnit* to, size_t to_stride) {
  int row = 0;
  for (int step; row + kTile <= rows; row += step) {
    const bool sixteen = row + 2 * kTile <= rows;
    step = sixteen ? 2 * kTile : kTile;
    const WireUnit* band = from + row * from_stride;  // [step, columns]
    int column = 0;
    for (; column + kTile <= columns; column += kTile) {
      if (sixteen) {
        transpose_tile<true>(band + column, from_stride, to + column * to_stride + row, to_stride);
      } else {
        transpose_tile<false>(band + column, from_stride, to + column * to_stride + row, to_stride);
      }
    }
    kReferenceKernels.transpose(band + column, from_stride, step, columns - column, to + column * to_stride + row, to_stride);
  }
  kReferenceKernels.transpose(from + row * from_stride, from_stride, rows - row, columns, to + row, to_stride);
}

}  // namespace penstock::avx2
