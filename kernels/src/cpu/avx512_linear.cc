// AVX-512 with VNNI: linear layers.
//
// A panel's 16 outputs are one register. VPDPBUSD multiplies four unsigned with four signed bytes a lane and adds them up
// exactly, so nibbles are unpacked on the way for any number of rows, eight of which share them.
#include "avx2_kernels.h"
#include "avx2_math.h"
#include "avx512_kernels.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock {

namespace avx512 {

namespace {

constexpr int kRows = 8;

// The rows of a tile, by pointers to the first of them.
struct Rows {
  const int8_t* values;
  size_t value_stride;
  const float* scales;
  const float* offsets;
  const int32_t* sums;
  size_t block_stride;
};

inline __m512i broadcast(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm512_set1_epi32(word);
}

inline __m512 load_half16(const uint8_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// R rows x 16 outputs.
template <int R>
void q4_rows(const uint8_t* panel, int blocks, Rows rows, float* out, size_t out_stride) {
  const __m512i low = _mm512_set1_epi8(15);
  const int8_t* values = rows.values;
  __m512 sums[R];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r] = _mm512_setzero_ps();
  for (int b = 0; b < blocks; ++b, panel += kQ4Record, values += kBlock) {
    UNROLL for (int i = 0; i < 5; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(panel) + 4096 + 64 * i, _MM_HINT_T0);
    __m512i dots[R];
    UNROLL for (int r = 0; r < R; ++r)
      dots[r] = _mm512_setzero_si512();
    UNROLL for (int j = 0; j < 4; ++j) {
      const __m512i pairs = _mm512_load_si512(panel + 64 * j);
      const __m512i first = _mm512_and_si512(pairs, low);
      const __m512i second = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
      UNROLL for (int r = 0; r < R; ++r) {
        const int8_t* v = values + r * rows.value_stride + 4 * j;
        dots[r] = _mm512_dpbusd_epi32(dots[r], first, broadcast(v));
        dots[r] = _mm512_dpbusd_epi32(dots[r], second, broadcast(v + 16));
      }
    }
    const __m512 scale = load_half16(panel + 256);
    const __m512 offset = load_half16(panel + 288);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512 s = _mm512_set1_ps(rows.scales[r * rows.block_stride + b]);
      const __m512 o = _mm512_set1_ps(rows.offsets[r * rows.block_stride + b]);
      sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), _mm512_mul_ps(scale, s), sums[r]);
      sums[r] = _mm512_fmadd_ps(offset, o, sums[r]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(out + r * out_stride, sums[r]);
}

// Weights become unsigned by adding 128, which the dot of 128 with the block's values takes back.
template <int R>
void q8_rows(const uint8_t* panel, int blocks, Rows rows, float* out, size_t out_stride) {
  const __m512i flip = _mm512_set1_epi8(-128);
  const uint8_t* scales = panel + blocks * kQ8Record;
  const int8_t* values = rows.values;
  __m512 sums[R];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r] = _mm512_setzero_ps();
  for (int b = 0; b < blocks; ++b, panel += kQ8Record, scales += 2 * kPanel, values += kBlock) {
    UNROLL for (int i = 0; i < 8; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(panel) + 8192 + 64 * i, _MM_HINT_T0);
    __m512i dots[R];
    UNROLL for (int r = 0; r < R; ++r)
      dots[r] = _mm512_set1_epi32(-128 * rows.sums[r * rows.block_stride + b]);
    UNROLL for (int j = 0; j < 8; ++j) {
      const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(panel + 64 * j), flip);
      UNROLL for (int r = 0; r < R; ++r)
        dots[r] = _mm512_dpbusd_epi32(dots[r], w, broadcast(values + r * rows.value_stride + 4 * j));
    }
    const __m512 scale = load_half16(scales);
    UNROLL for (int r = 0; r < R; ++r) {
      const __m512 s = _mm512_set1_ps(rows.scales[r * rows.block_stride + b]);
      sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), _mm512_mul_ps(scale, s), sums[r]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(out + r * out_stride, sums[r]);
}

inline __m512 load_weights(const float* from) { return _mm512_load_ps(from); }
inline __m512 load_weights(const uint16_t* from) { return load_half16(reinterpret_cast<const uint8_t*>(from)); }

// R rows x 16 outputs of an unquantised panel [inputs, 16].
template <int R, class Element>
void float_rows(const Element* panel, int inputs, const float* x, size_t x_stride, float* out, size_t out_stride) {
  __m512 sums[R];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r] = _mm512_setzero_ps();
  for (int k = 0; k < inputs; ++k, panel += kPanel) {
    const __m512 w = load_weights(panel);
    UNROLL for (int r = 0; r < R; ++r)
      sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(x[r * x_stride + k]), w, sums[r]);
  }
  UNROLL for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(out + r * out_stride, sums[r]);
}

template <class Element>
void float_panel(const uint8_t* panel, int inputs, const LinearInput& input, float* out, size_t out_stride) {
  const Element* w = reinterpret_cast<const Element*>(panel);
  int row = 0;
  for (; row + kRows <= input.rows; row += kRows) {
    float_rows<kRows>(w, inputs, input.x + row * input.x_stride, input.x_stride, out + row * out_stride, out_stride);
  }
  for (; row + 2 <= input.rows; row += 2) {
    float_rows<2>(w, inputs, input.x + row * input.x_stride, input.x_stride, out + row * out_stride, out_stride);
  }
  if (row < input.rows)
    float_rows<1>(w, inputs, input.x + row * input.x_stride, input.x_stride, out + row * out_stride, out_stride);
}

using Tile = void (*)(const uint8_t* panel, int blocks, Rows rows, float* out, size_t out_stride);
constexpr Tile kQ4Rows[kRows + 1] = {nullptr,    q4_rows<1>, q4_rows<2>, q4_rows<3>, q4_rows<4>,
                                     q4_rows<5>, q4_rows<6>, q4_rows<7>, q4_rows<8>};
constexpr Tile kQ8Rows[kRows + 1] = {nullptr,    q8_rows<1>, q8_rows<2>, q8_rows<3>, q8_rows<4>,
                                     q8_rows<5>, q8_rows<6>, q8_rows<7>, q8_rows<8>};

// All rows of the input, eight at a time.
void in_eights(const Tile tiles[kRows + 1], const uint8_t* panel, int blocks, const LinearInput& input, float* out,
               size_t out_stride) {
  for (int row = 0; row < input.rows; row += kRows) {
    const int count = input.rows - row < kRows ? input.rows - row : kRows;
    const size_t block_row = row * input.block_stride;
    const Rows rows = {input.values + row * input.value_stride,
                       input.value_stride,
                       input.scales + block_row,
                       input.offsets + block_row,
                       input.sums + block_row,
                       input.block_stride};
    tiles[count](panel, blocks, rows, out + row * out_stride, out_stride);
  }
}

}  // namespace

void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride, uint8_t*) {
  for (int p = first; p < last; ++p) {
    const uint8_t* panel = matrix.panel(p);
    float* panel_out = out + size_t(p) * kPanel;
    switch (matrix.format) {
      case MatrixFormat::F32: float_panel<float>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case MatrixFormat::F16: float_panel<uint16_t>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case MatrixFormat::Q4: in_eights(kQ4Rows, panel, matrix.blocks(), input, panel_out, out_stride); break;
      case MatrixFormat::Q8: in_eights(kQ8Rows, panel, matrix.blocks(), input, panel_out, out_stride); break;
    }
  }
}

}  // namespace avx512

const Kernels kAvx512Kernels = {InstructionSet::Avx512, avx2::rms_norm, avx2::swiglu,   avx2::rotate,   avx2::to_half,
                                avx2::quantise,         avx2::encode,   avx512::linear, avx512::attend, avx2::merge,
                                avx2::transpose};

}  // namespace penstock
