// AVX2: linear layers.
//
// A panel's 16 outputs are two registers of eight lanes. A Q4 block's dot of nibbles and int8 fits into 16 bits (8 steps of
// 2 * 15 * 127), so one widening add a block is enough; a Q8 block's does not, and is widened at each step.
//   few rows: nibbles are unpacked on the way, half a panel at a time, so that all sums stay in registers
//   many rows: a panel is unpacked once into scratch and then met by four rows at a time
#include "avx2_kernels.h"
#include "avx2_math.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock::avx2 {

namespace {

// From this many rows on, unpacking a panel first pays.
constexpr int kUnpackRows = 12;
constexpr size_t kUnpackedRecord = 640;  // [32 / 4][16][4] bytes, f32 scale[16], f32 offset[16]

// The rows of a tile, by pointers to the first of them.
struct Rows {
  const int8_t* values;
  size_t value_stride;
  const float* scales;
  const float* offsets;
  size_t block_stride;
};

inline const uint16_t* halves(const uint8_t* bytes) { return reinterpret_cast<const uint16_t*>(bytes); }

inline __m256i load32(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

// R rows x 16 outputs, unpacking nibbles for each use.
template <int R>
void q4_few_rows(const uint8_t* panel, int blocks, Rows rows, float* out, size_t out_stride) {
  const __m256i low = _mm256_set1_epi8(15);
  const __m256i ones = _mm256_set1_epi16(1);
  const char* ahead = reinterpret_cast<const char*>(panel) + 4096;
  for (int half = 0; half < 2; ++half) {
    const uint8_t* record = panel + half * 32;
    const uint8_t* scales = panel + 256 + half * 16;
    const int8_t* values = rows.values;
    __m256 sums[R];
    UNROLL for (int r = 0; r < R; ++r)
      sums[r] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; ++b, record += kQ4Record, scales += kQ4Record, values += kBlock) {
      // Both halves together fetch what lies ahead once.
      _mm_prefetch(ahead, _MM_HINT_T0);
      _mm_prefetch(ahead + 64, _MM_HINT_T0);
      _mm_prefetch(ahead + 128, _MM_HINT_T0);
      ahead += kQ4Record / 2;
      __m256i dots[R];  // 16-bit
      UNROLL for (int j = 0; j < 4; ++j) {
        const __m256i pairs = load32(record + 64 * j);
        const __m256i first = _mm256_and_si256(pairs, low);
        const __m256i second = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
        UNROLL for (int r = 0; r < R; ++r) {
          const int8_t* v = values + r * rows.value_stride + 4 * j;
          const __m256i product = _mm256_maddubs_epi16(first, broadcast4(v));
          dots[r] = j == 0 ? product : _mm256_add_epi16(dots[r], product);
          dots[r] = _mm256_add_epi16(dots[r], _mm256_maddubs_epi16(second, broadcast4(v + 16)));
        }
      }
      const __m256 scale = load_half8(halves(scales));
      const __m256 offset = load_half8(halves(scales + 32));
      UNROLL for (int r = 0; r < R; ++r) {
        const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r], ones));
        const float* s = rows.scales + r * rows.block_stride + b;
        const float* o = rows.offsets + r * rows.block_stride + b;
        sums[r] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale, _mm256_broadcast_ss(s)), sums[r]);
        sums[r] = _mm256_fmadd_ps(offset, _mm256_broadcast_ss(o), sums[r]);
      }
    }
    UNROLL for (int r = 0; r < R; ++r)
      _mm256_storeu_ps(out + r * out_stride + half * 8, sums[r]);
  }
}

void unpack_q4(const uint8_t* panel, int blocks, uint8_t* scratch) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int b = 0; b < blocks; ++b, panel += kQ4Record, scratch += kUnpackedRecord) {
    UNROLL for (int i = 0; i < 8; ++i) {
      const __m256i pairs = load32(panel + 32 * i);
      _mm256_store_si256(reinterpret_cast<__m256i*>(scratch + 32 * i), _mm256_and_si256(pairs, low));
      _mm256_store_si256(reinterpret_cast<__m256i*>(scratch + 256 + 32 * i), _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low));
    }
    float* floats = reinterpret_cast<float*>(scratch + 512);
    UNROLL for (int i = 0; i < 4; ++i)
      _mm256_store_ps(floats + 8 * i, load_half8(halves(panel + 256 + 16 * i)));
  }
}

// R rows x 16 outputs on an unpacked panel.
template <int R>
void q4_many_rows(const uint8_t* unpacked, int blocks, Rows rows, float* out, size_t out_stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int8_t* values = rows.values;
  __m256 sums[R][2];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (int b = 0; b < blocks; ++b, unpacked += kUnpackedRecord, values += kBlock) {
    __m256i dots[R][2];  // 16-bit
    UNROLL for (int k = 0; k < 8; ++k) {
      const __m256i w0 = load32(unpacked + 64 * k);
      const __m256i w1 = load32(unpacked + 64 * k + 32);
      UNROLL for (int r = 0; r < R; ++r) {
        const __m256i v = broadcast4(values + r * rows.value_stride + 4 * k);
        const __m256i p0 = _mm256_maddubs_epi16(w0, v);
        const __m256i p1 = _mm256_maddubs_epi16(w1, v);
        dots[r][0] = k == 0 ? p0 : _mm256_add_epi16(dots[r][0], p0);
        dots[r][1] = k == 0 ? p1 : _mm256_add_epi16(dots[r][1], p1);
      }
    }
    const float* scales = reinterpret_cast<const float*>(unpacked + 512);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256 s = _mm256_broadcast_ss(rows.scales + r * rows.block_stride + b);
      const __m256 o = _mm256_broadcast_ss(rows.offsets + r * rows.block_stride + b);
      UNROLL for (int c = 0; c < 2; ++c) {
        const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[r][c], ones));
        sums[r][c] = _mm256_fmadd_ps(dot, _mm256_mul_ps(_mm256_load_ps(scales + 8 * c), s), sums[r][c]);
        sums[r][c] = _mm256_fmadd_ps(_mm256_load_ps(scales + 16 + 8 * c), o, sums[r][c]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    _mm256_storeu_ps(out + r * out_stride, sums[r][0]);
    _mm256_storeu_ps(out + r * out_stride + 8, sums[r][1]);
  }
}

// Signed times signed through |w| and v * sign(w): at most 2 * 128 * 127, which 16 bits hold.
template <int R>
void q8_rows(const uint8_t* panel, int blocks, Rows rows, float* out, size_t out_stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* record = panel + half * 32;
    const uint8_t* scales = panel + blocks * kQ8Record + half * 16;
    const int8_t* values = rows.values;
    __m256 sums[R];
    UNROLL for (int r = 0; r < R; ++r)
      sums[r] = _mm256_setzero_ps();
    for (int b = 0; b < blocks; ++b, record += kQ8Record, scales += 2 * kPanel, values += kBlock) {
      if (half == 0) {
        UNROLL for (int i = 0; i < 8; ++i)
          _mm_prefetch(reinterpret_cast<const char*>(record) + 8192 + 64 * i, _MM_HINT_T0);
      }
      __m256i dots[R];  // 32-bit
      UNROLL for (int r = 0; r < R; ++r)
        dots[r] = _mm256_setzero_si256();
      UNROLL for (int k = 0; k < 8; ++k) {
        const __m256i w = load32(record + 64 * k);
        const __m256i magnitude = _mm256_abs_epi8(w);
        UNROLL for (int r = 0; r < R; ++r) {
          const __m256i v = _mm256_sign_epi8(broadcast4(values + r * rows.value_stride + 4 * k), w);
          dots[r] = _mm256_add_epi32(dots[r], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, v), ones));
        }
      }
      const __m256 scale = load_half8(halves(scales));
      UNROLL for (int r = 0; r < R; ++r) {
        const __m256 s = _mm256_broadcast_ss(rows.scales + r * rows.block_stride + b);
        sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), _mm256_mul_ps(scale, s), sums[r]);
      }
    }
    UNROLL for (int r = 0; r < R; ++r)
      _mm256_storeu_ps(out + r * out_stride + half * 8, sums[r]);
  }
}

inline __m256 load_weights(const float* from) { return _mm256_load_ps(from); }
inline __m256 load_weights(const uint16_t* from) { return load_half8(from); }

// R rows x 16 outputs of an unquantised panel [inputs, 16].
template <int R, class Element>
void float_rows(const Element* panel, int inputs, const float* x, size_t x_stride, float* out, size_t out_stride) {
  __m256 sums[R][2];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (int k = 0; k < inputs; ++k, panel += kPanel) {
    const __m256 w0 = load_weights(panel);
    const __m256 w1 = load_weights(panel + 8);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m256 v = _mm256_broadcast_ss(x + r * x_stride + k);
      sums[r][0] = _mm256_fmadd_ps(v, w0, sums[r][0]);
      sums[r][1] = _mm256_fmadd_ps(v, w1, sums[r][1]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    _mm256_storeu_ps(out + r * out_stride, sums[r][0]);
    _mm256_storeu_ps(out + r * out_stride + 8, sums[r][1]);
  }
}

template <class Element>
void float_panel(const uint8_t* panel, int inputs, const LinearInput& input, float* out, size_t out_stride) {
  const Element* w = reinterpret_cast<const Element*>(panel);
  int row = 0;
  for (; row + 6 <= input.rows; row += 6) {
    float_rows<6>(w, inputs, input.x + row * input.x_stride, input.x_stride, out + row * out_stride, out_stride);
  }
  for (; row + 2 <= input.rows; row += 2) {
    float_rows<2>(w, inputs, input.x + row * input.x_stride, input.x_stride, out + row * out_stride, out_stride);
  }
  if (row < input.rows)
    float_rows<1>(w, inputs, input.x + row * input.x_stride, input.x_stride, out + row * out_stride, out_stride);
}

using Tile = void (*)(const uint8_t* panel, int blocks, Rows rows, float* out, size_t out_stride);

// All rows of the input, four at a time.
void in_fours(const Tile tiles[5], const uint8_t* panel, int blocks, const LinearInput& input, float* out, size_t out_stride) {
  for (int row = 0; row < input.rows; row += 4) {
    const int count = input.rows - row < 4 ? input.rows - row : 4;
    const Rows rows = {input.values + row * input.value_stride, input.value_stride, input.scales + row * input.block_stride,
                       input.offsets + row * input.block_stride, input.block_stride};
    tiles[count](panel, blocks, rows, out + row * out_stride, out_stride);
  }
}

constexpr Tile kQ4FewRows[5] = {nullptr, q4_few_rows<1>, q4_few_rows<2>, q4_few_rows<3>, q4_few_rows<4>};
constexpr Tile kQ4ManyRows[5] = {nullptr, q4_many_rows<1>, q4_many_rows<2>, q4_many_rows<3>, q4_many_rows<4>};
constexpr Tile kQ8Rows[5] = {nullptr, q8_rows<1>, q8_rows<2>, q8_rows<3>, q8_rows<4>};

}  // namespace

void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride,
            uint8_t* scratch) {
  for (int p = first; p < last; ++p) {
    const uint8_t* panel = matrix.panel(p);
    float* panel_out = out + size_t(p) * kPanel;
    switch (matrix.format) {
      case MatrixFormat::F32: float_panel<float>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case MatrixFormat::F16: float_panel<uint16_t>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case MatrixFormat::Q4:
        if (input.rows < kUnpackRows) {
          in_fours(kQ4FewRows, panel, matrix.blocks(), input, panel_out, out_stride);
        } else {
          unpack_q4(panel, matrix.blocks(), scratch);
          in_fours(kQ4ManyRows, scratch, matrix.blocks(), input, panel_out, out_stride);
        }
        break;
      case MatrixFormat::Q8: in_fours(kQ8Rows, panel, matrix.blocks(), input, panel_out, out_stride); break;
    }
  }
}

}  // namespace penstock::avx2
