// AVX-512 with VNNI: linear layers.
//
// A panel's 16 outputs are one register. VPDPBUSD multiplies four unsigned with four signed bytes a lane and adds them up
// exactly, so levels are unpacked on the way for any number of rows, eight of which share them. What a centre adds to a dot is
// the centre times the sum of the block's values, and is taken off by itself.
#include "avx2_kernels.h"
#include "avx512_kernels.h"
#include "avx512_math.h"
#include "row_runs.h"

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
  const int16_t* sums;
  size_t block_stride;
};

// The same two sums in every lane.
inline __m512i broadcast_sums(const int16_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm512_set1_epi32(word);
}

// Adds levels times the four values at `from`, the same in every lane. Written out, as gcc 12 would load them with an instruction
// of their own, and a tile waits for its instructions to be decoded then.
inline __m512i add_dots(__m512i dots, __m512i levels, const int8_t* from) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(dots) : "v"(levels), "m"(*reinterpret_cast<const int32_t*>(from)));
  return dots;
}

inline __m512 load_bytes16(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
}

// Levels of inputs 4k … 4k + 3; see matrix.h. Those of 8 bits become unsigned by adding 128.
template <int kBits>
inline __m512i load_levels(const uint8_t* block, int k) {
  if constexpr (kBits == 8) {
    return _mm512_xor_si512(_mm512_loadu_si512(block + 64 * k), _mm512_set1_epi8(-128));
  } else {
    const __m512i pairs = _mm512_loadu_si512(block + 64 * (k % 4));
    const __m512i low = _mm512_and_si512(k < 4 ? pairs : _mm512_srli_epi16(pairs, 4), _mm512_set1_epi8(15));
    if constexpr (kBits == 4) return low;
    // The upper bits move to where they belong, what comes along is masked.
    const __m512i upper = _mm512_loadu_si512(block + 256 + (kBits == 6 ? 64 * (k / 4) : 0));
    const int left = kBits == 5 ? 4 - k : 4 - 2 * (k % 4);
    const __m512i moved = left >= 0 ? _mm512_slli_epi16(upper, left) : _mm512_srli_epi16(upper, -left);
    return _mm512_ternarylogic_epi64(low, moved, _mm512_set1_epi8(kBits == 5 ? 0x10 : 0x30), 0xf8);  // low | moved & mask
  }
}

// Scales of a block, for 16 outputs.
struct Scales {
  __m512 scale;
  __m512 offset;
  __m512i factors[2];  // of HalfFactors
  __m512i centres;     // what a dot loses for the sums of the block's halves: pairs of 16-bit numbers
};

// Of block `index` of a record whose scales begin at `from`.
template <BlockFormat kFormat>
inline Scales load_scales(const uint8_t* from, int index) {
  Scales s;
  s.scale = load_half16(from);
  if constexpr (kFormat.has_offset()) s.offset = load_half16(from + 32);
  if constexpr (kFormat.scaling == Scaling::Centred) {
    s.centres = _mm512_set1_epi16(-(1 << (kFormat.bits - 1)));
  } else if constexpr (kFormat.scaling == Scaling::Factors) {
    s.scale = _mm512_mul_ps(s.scale, load_bytes16(from + 64 + 32 * index));
    s.offset = _mm512_mul_ps(s.offset, load_bytes16(from + 64 + 32 * index + 16));
  } else if constexpr (kFormat.scaling == Scaling::HalfFactors) {
    const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + 64 + 32 * index));
    const __m512i pairs = _mm512_cvtepi8_epi16(bytes);
    s.factors[0] = _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16);
    s.factors[1] = _mm512_srai_epi32(pairs, 16);
    s.centres = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_slli_epi16(pairs, 5));
  }
  return s;
}

// R rows x 16 outputs.
template <BlockFormat kFormat, int R>
void tile(const uint8_t* panel, int blocks, const Rows& rows, float* out, size_t out_stride) {
  constexpr bool kCentred = !kFormat.has_offset();
  constexpr bool kHalves = kFormat.scaling == Scaling::HalfFactors;
  constexpr int kBlocks = kFormat.record_blocks();
  constexpr size_t kStep = kFormat.record_bytes() / kBlocks;
  const char* ahead = reinterpret_cast<const char*>(panel) + 16 * kFormat.level_bytes();
  const int8_t* values = rows.values;
  __m512 sums[R];
  UNROLL for (int r = 0; r < R; ++r)
    sums[r] = _mm512_setzero_ps();
  for (int first = 0; first < blocks; first += kBlocks) {
    const uint8_t* scales = panel + kBlocks * kFormat.level_bytes();
    for (int b = first; b < first + kBlocks; ++b, panel += kFormat.level_bytes(), values += kBlock, ahead += kStep) {
      UNROLL for (size_t i = 0; i < kStep; i += 64)
        _mm_prefetch(ahead + i, _MM_HINT_T0);
      const Scales s = load_scales<kFormat>(scales, b - first);
      __m512i dots[R], first_half[R];
      UNROLL for (int r = 0; r < R; ++r) {
        dots[r] = _mm512_setzero_si512();
        if constexpr (kCentred) {
          const __m512i centre = _mm512_madd_epi16(s.centres, broadcast_sums(rows.sums + 2 * (r * rows.block_stride + b)));
          (kHalves ? first_half : dots)[r] = centre;
        }
      }
      UNROLL for (int k = 0; k < 8; ++k) {
        const __m512i levels = load_levels<kFormat.bits>(panel, k);
        UNROLL for (int r = 0; r < R; ++r) {
          dots[r] = add_dots(dots[r], levels, values + r * rows.value_stride + 4 * k);
          if (kHalves && k == 3) {
            first_half[r] = _mm512_add_epi32(first_half[r], _mm512_mullo_epi32(dots[r], s.factors[0]));
            dots[r] = _mm512_setzero_si512();
          }
        }
      }
      UNROLL for (int r = 0; r < R; ++r) {
        if constexpr (kHalves) dots[r] = _mm512_add_epi32(first_half[r], _mm512_mullo_epi32(dots[r], s.factors[1]));
        const __m512 scale = _mm512_mul_ps(s.scale, _mm512_set1_ps(rows.scales[r * rows.block_stride + b]));
        sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), scale, sums[r]);
        if constexpr (kFormat.has_offset()) {
          sums[r] = _mm512_fmadd_ps(s.offset, _mm512_set1_ps(rows.offsets[r * rows.block_stride + b]), sums[r]);
        }
      }
    }
    panel += kFormat.scale_bytes();
  }
  UNROLL for (int r = 0; r < R; ++r)
    _mm512_storeu_ps(out + r * out_stride, sums[r]);
}

// All rows of the input.
template <BlockFormat kFormat>
void quantised_panel(const uint8_t* panel, int blocks, const LinearInput& input, float* out, size_t out_stride) {
  in_runs<kRows>(input.rows, [&](auto run, int first) {
    const size_t block_row = first * input.block_stride;
    const Rows rows = {input.values + first * input.value_stride,
                       input.value_stride,
                       input.scales + block_row,
                       input.offsets + block_row,
                       input.sums + 2 * block_row,
                       input.block_stride};
    tile<kFormat, decltype(run)::value>(panel, blocks, rows, out + first * out_stride, out_stride);
  });
}

struct Bfloat {
  uint16_t bits;
};

inline __m512 load_weights(const float* from) { return _mm512_load_ps(from); }
inline __m512 load_weights(const uint16_t* from) { return load_half16(from); }
inline __m512 load_weights(const Bfloat* from) {
  const __m256i bits = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

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

}  // namespace

void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride, uint8_t*) {
  for (int p = first; p < last; ++p) {
    const uint8_t* panel = matrix.panel(p);
    float* panel_out = out + size_t(p) * kPanel;
    const auto quantised = [&](auto by_format) { by_format(panel, matrix.blocks(), input, panel_out, out_stride); };
    switch (matrix.type) {
      case TensorType::F32: float_panel<float>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case TensorType::F16: float_panel<uint16_t>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case TensorType::BF16: float_panel<Bfloat>(panel, matrix.inputs, input, panel_out, out_stride); break;
      case TensorType::Q4_0: quantised(quantised_panel<block_format(TensorType::Q4_0)>); break;
      case TensorType::Q4_1: quantised(quantised_panel<block_format(TensorType::Q4_1)>); break;
      case TensorType::Q5_0: quantised(quantised_panel<block_format(TensorType::Q5_0)>); break;
      case TensorType::Q5_1: quantised(quantised_panel<block_format(TensorType::Q5_1)>); break;
      case TensorType::Q8_0: quantised(quantised_panel<block_format(TensorType::Q8_0)>); break;
      case TensorType::Q4_K: quantised(quantised_panel<block_format(TensorType::Q4_K)>); break;
      case TensorType::Q5_K: quantised(quantised_panel<block_format(TensorType::Q5_K)>); break;
      case TensorType::Q6_K: quantised(quantised_panel<block_format(TensorType::Q6_K)>); break;
      case TensorType::I32: break;  // no matrix is of it
    }
  }
}

}  // namespace avx512

const Kernels kAvx512Kernels = {InstructionSet::Avx512, avx2::rms_norm, avx512::swiglu, avx2::rotate,   avx2::to_half,
                                avx512::quantise,       avx2::encode,   avx512::linear, avx512::attend, avx2::merge,
                                avx2::transpose};

}  // namespace penstock
