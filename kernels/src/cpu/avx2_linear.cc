// AVX2: linear layers.
//
// A panel's 16 outputs are two registers of eight lanes. VPMADDUBSW multiplies unsigned levels with signed values and adds pairs
// to 16 bits, which hold as many steps as levels have bits to spare: all 8 of a block where they have four, 4 where five, 2 where
// six. Then they are widened to 32 bits, by which Q6_K is multiplied with its factors too.
//   few rows: levels are unpacked on the way, half a panel at a time, so that all sums stay in registers
//   many rows: a panel is unpacked once into scratch and then met by some rows at a time
#include "avx2_kernels.h"
#include "avx2_math.h"
#include "row_runs.h"

#define UNROLL _Pragma("GCC unroll 16")

namespace penstock::avx2 {

namespace {

// From this many rows on, unpacking a panel first pays.
constexpr int kUnpackRows = 12;

// The rows of a tile, by pointers to the first of them.
struct Rows {
  const int8_t* values;
  size_t value_stride;
  const float* scales;
  const float* offsets;
  const int16_t* sums;
  size_t block_stride;
};

inline __m256i load32(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }

inline __m128i load16(const uint8_t* from) { return _mm_load_si128(reinterpret_cast<const __m128i*>(from)); }

inline __m256 load_half8(const uint8_t* from) { return _mm256_cvtph_ps(load16(from)); }

inline __m256 load_bytes8(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

inline __m256i broadcast_sums(const int16_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof word);
  return _mm256_set1_epi32(word);
}

// Scales of a block, for eight outputs.
struct Scales {
  __m256 scale;
  __m256 offset;
  __m256i factors;  // of HalfFactors: pairs of 16-bit numbers
};

// A panel as it is packed, taken in two parts: outputs 0 … 7 and 8 … 15.
template <BlockFormat kBlocks>
struct Packed {
  static constexpr BlockFormat kFormat = kBlocks;
  static constexpr int kParts = 2;
  static constexpr int kColumns = 1;  // registers side by side in a part
  static constexpr size_t kLevelBytes = kFormat.level_bytes();
  static constexpr size_t kScaleBytes = kFormat.scale_bytes();
  static constexpr size_t kScalePart = 16;  // from part to part

  // Levels of inputs 4k … 4k + 3, signed where they have 8 bits; see matrix.h.
  static __m256i levels(const uint8_t* block, int k, int) {
    if constexpr (kFormat.bits == 8) {
      return load32(block + 64 * k);
    } else {
      const __m256i pairs = load32(block + 64 * (k % 4));
      const __m256i low = _mm256_and_si256(k < 4 ? pairs : _mm256_srli_epi16(pairs, 4), _mm256_set1_epi8(15));
      if constexpr (kFormat.bits == 4) return low;
      // The upper bits move to where they belong, what comes along is masked.
      const __m256i upper = load32(block + 256 + (kFormat.bits == 6 ? 64 * (k / 4) : 0));
      const int left = kFormat.bits == 5 ? 4 - k : 4 - 2 * (k % 4);
      const __m256i moved = left >= 0 ? _mm256_slli_epi16(upper, left) : _mm256_srli_epi16(upper, -left);
      return _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi8(kFormat.bits == 5 ? 0x10 : 0x30)));
    }
  }

  // Of block `index` of a record whose scales of this part begin at `from`.
  static Scales scales(const uint8_t* from, int index, int part, int) {
    Scales s = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_si256()};
    s.scale = load_half8(from);
    if constexpr (kFormat.has_offset()) s.offset = load_half8(from + 32);
    if constexpr (kFormat.scaling == Scaling::Factors) {
      const uint8_t* factors = from + 64 + 32 * index - 8 * part;  // a byte each, where kScalePart counts two
      s.scale = _mm256_mul_ps(s.scale, load_bytes8(factors));
      s.offset = _mm256_mul_ps(s.offset, load_bytes8(factors + 16));
    } else if constexpr (kFormat.scaling == Scaling::HalfFactors) {
      s.factors = _mm256_cvtepi8_epi16(load16(from + 64 + 32 * index));
    }
    return s;
  }
};

// A panel whose records are spread out: the levels of a block [32 / 4][16][4], its scales f32 scale[16], and f32 offset[16] or
// i16 factors[16][2].
template <BlockFormat kBlocks>
struct Unpacked {
  static constexpr BlockFormat kFormat = kBlocks;
  static constexpr int kParts = 1;
  static constexpr int kColumns = 2;
  static constexpr size_t kLevelBytes = kUnpackedBlock - 128;
  static constexpr size_t kScaleBytes = size_t{128} * kFormat.record_blocks();
  static constexpr size_t kScalePart = 0;

  static __m256i levels(const uint8_t* block, int k, int column) { return load32(block + 64 * k + 32 * column); }

  static Scales scales(const uint8_t* from, int index, int, int column) {
    from += 128 * index + 32 * column;
    Scales s = {_mm256_load_ps(reinterpret_cast<const float*>(from)), _mm256_setzero_ps(), _mm256_setzero_si256()};
    if constexpr (kFormat.has_offset()) s.offset = _mm256_load_ps(reinterpret_cast<const float*>(from + 64));
    if constexpr (kFormat.scaling == Scaling::HalfFactors) s.factors = load32(from + 64);
    return s;
  }
};

template <BlockFormat kFormat>
void unpack(const uint8_t* panel, int blocks, uint8_t* scratch) {
  using From = Packed<kFormat>;
  using To = Unpacked<kFormat>;
  constexpr int kBlocks = kFormat.record_blocks();
  for (int first = 0; first < blocks; first += kBlocks) {
    const uint8_t* scales = panel + kBlocks * From::kLevelBytes;
    uint8_t* to_scales = scratch + kBlocks * To::kLevelBytes;
    for (int i = 0; i < kBlocks; ++i, panel += From::kLevelBytes, scratch += To::kLevelBytes, to_scales += 128) {
      for (int part = 0; part < 2; ++part) {
        UNROLL for (int k = 0; k < 8; ++k) {
          const __m256i levels = From::levels(panel + 32 * part, k, 0);
          _mm256_store_si256(reinterpret_cast<__m256i*>(scratch + 64 * k + 32 * part), levels);
        }
        const Scales s = From::scales(scales + From::kScalePart * part, i, part, 0);
        uint8_t* to = to_scales + 32 * part;
        _mm256_store_ps(reinterpret_cast<float*>(to), s.scale);
        if constexpr (kFormat.has_offset()) _mm256_store_ps(reinterpret_cast<float*>(to + 64), s.offset);
        if constexpr (kFormat.scaling == Scaling::HalfFactors) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64), s.factors);
        }
      }
    }
    panel += From::kScaleBytes;
    scratch += To::kScaleBytes;
  }
}

// Four pairs added up. Signed levels go through |level| and value * sign(level), of which 16 bits hold one step.
template <int kBits>
inline __m256i multiply(__m256i levels, __m256i values) {
  if constexpr (kBits == 8) return _mm256_maddubs_epi16(_mm256_abs_epi8(levels), _mm256_sign_epi8(values, levels));
  return _mm256_maddubs_epi16(levels, values);
}

// The factor of a half of the block, twice, from pairs of both.
inline __m256i factor_of_half(__m256i pairs, int half) {
  return half == 0 ? _mm256_or_si256(_mm256_slli_epi32(pairs, 16), _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff)))
                   : _mm256_or_si256(_mm256_srli_epi32(pairs, 16), _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff << 16)));
}

// R rows x 16 outputs.
template <class Weights, int R>
void tile(const uint8_t* panel, int blocks, const Rows& from, float* out, size_t out_stride) {
  const Rows rows = from;
  constexpr BlockFormat kFormat = Weights::kFormat;
  constexpr int C = Weights::kColumns;
  constexpr int kSteps = kFormat.bits == 8 ? 1 : 128 >> kFormat.bits;  // that 16 bits hold
  constexpr bool kHalves = kFormat.scaling == Scaling::HalfFactors;
  constexpr int kBlocks = kFormat.record_blocks();
  constexpr size_t kAhead = kFormat.record_bytes() / kBlocks / Weights::kParts;
  const char* ahead = reinterpret_cast<const char*>(panel) + 16 * kFormat.level_bytes();
  for (int part = 0; part < Weights::kParts; ++part) {
    const uint8_t* block = panel + 32 * part;
    const int8_t* values = rows.values;
    __m256 sums[R][C];
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int c = 0; c < C; ++c)
        sums[r][c] = _mm256_setzero_ps();
    for (int first = 0; first < blocks; first += kBlocks, block += Weights::kScaleBytes) {
      const uint8_t* scales = block - 32 * part + kBlocks * Weights::kLevelBytes + Weights::kScalePart * part;
      for (int b = first; b < first + kBlocks; ++b, block += Weights::kLevelBytes, values += kBlock) {
        if constexpr (Weights::kParts == 2) {
          // Both parts of a panel together fetch what lies ahead once; what is unpacked is near.
          UNROLL for (size_t i = 0; i < kAhead; i += 64)
            _mm_prefetch(ahead + i, _MM_HINT_T0);
          ahead += kAhead;
        }
        Scales s[C];
        UNROLL for (int c = 0; c < C; ++c)
          s[c] = Weights::scales(scales, b - first, part, c);
        __m256i narrow[R][C], dots[R][C];
        UNROLL for (int step = 0; step < 8; ++step) {
          // The low and high halves of the same nibbles one after the other, but for a block with two factors.
          const int k = kHalves || kFormat.bits == 8 ? step : step / 2 + step % 2 * 4;
          __m256i levels[C], widening[C];
          UNROLL for (int c = 0; c < C; ++c) {
            levels[c] = Weights::levels(block, k, c);
            widening[c] = kHalves ? factor_of_half(s[c].factors, k / 4) : _mm256_set1_epi16(1);
          }
          UNROLL for (int r = 0; r < R; ++r) {
            const __m256i v = broadcast4(values + r * rows.value_stride + 4 * k);
            UNROLL for (int c = 0; c < C; ++c) {
              const __m256i product = multiply<kFormat.bits>(levels[c], v);
              narrow[r][c] = step % kSteps == 0 ? product : _mm256_add_epi16(narrow[r][c], product);
              if (step % kSteps == kSteps - 1) {
                const __m256i wide = _mm256_madd_epi16(narrow[r][c], widening[c]);
                dots[r][c] = step < kSteps ? wide : _mm256_add_epi32(dots[r][c], wide);
              }
            }
          }
        }
        UNROLL for (int c = 0; c < C; ++c) {
          __m256i centres = _mm256_set1_epi16(static_cast<int16_t>(-kFormat.centre()));
          if constexpr (kHalves) centres = _mm256_mullo_epi16(centres, s[c].factors);
          UNROLL for (int r = 0; r < R; ++r) {
            if constexpr (kFormat.centre() != 0) {
              const __m256i block_sums = broadcast_sums(rows.sums + 2 * (r * rows.block_stride + b));
              dots[r][c] = _mm256_add_epi32(dots[r][c], _mm256_madd_epi16(centres, block_sums));
            }
            const __m256 scale = _mm256_mul_ps(s[c].scale, _mm256_broadcast_ss(rows.scales + r * rows.block_stride + b));
            sums[r][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][c]), scale, sums[r][c]);
            if constexpr (kFormat.has_offset()) {
              const __m256 offset = _mm256_broadcast_ss(rows.offsets + r * rows.block_stride + b);
              sums[r][c] = _mm256_fmadd_ps(s[c].offset, offset, sums[r][c]);
            }
          }
        }
      }
    }
    UNROLL for (int r = 0; r < R; ++r)
      UNROLL for (int c = 0; c < C; ++c)
        _mm256_storeu_ps(out + r * out_stride + 8 * (part + c), sums[r][c]);
  }
}

// All rows of the input, four at a time; each four fetch their share of what is `ahead`.
template <class Weights>
void in_fours(const uint8_t* panel, int blocks, const LinearInput& input, float* out, size_t out_stride, const uint8_t* ahead,
              size_t ahead_bytes) {
  const size_t share = ahead_bytes * 4 / input.rows;
  in_runs<4>(input.rows, [&](auto run, int row) {
    for (size_t i = 0; i < share; i += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T1);
    ahead += share;
    const size_t block_row = row * input.block_stride;
    const Rows rows = {input.values + row * input.value_stride,
                       input.value_stride,
                       input.scales + block_row,
                       input.offsets + block_row,
                       input.sums + 2 * block_row,
                       input.block_stride};
    tile<Weights, decltype(run)::value>(panel, blocks, rows, out + row * out_stride, out_stride);
  });
}

template <BlockFormat kFormat>
void quantised_panel(const uint8_t* panel, int blocks, const LinearInput& input, float* out, size_t out_stride, uint8_t* scratch) {
  if constexpr (kFormat.bits != 8) {  // which are bytes already
    if (input.rows >= kUnpackRows) {
      unpack<kFormat>(panel, blocks, scratch);
      // The next panel comes from memory while this one is multiplied.
      const size_t bytes = blocks / kFormat.record_blocks() * kFormat.record_bytes();
      return in_fours<Unpacked<kFormat>>(scratch, blocks, input, out, out_stride, panel + bytes, bytes);
    }
  }
  in_fours<Packed<kFormat>>(panel, blocks, input, out, out_stride, nullptr, 0);
}

struct Bfloat {
  uint16_t bits;
};

inline __m256 load_weights(const float* from) { return _mm256_load_ps(from); }
inline __m256 load_weights(const uint16_t* from) { return load_half8(reinterpret_cast<const uint8_t*>(from)); }
inline __m256 load_weights(const Bfloat* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(reinterpret_cast<const uint8_t*>(from))), 16));
}

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

}  // namespace

void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride,
            uint8_t* scratch) {
  for (int p = first; p < last; ++p) {
    const uint8_t* panel = matrix.panel(p);
    float* panel_out = out + size_t(p) * kPanel;
    const auto quantised = [&](auto by_format) { by_format(panel, matrix.blocks(), input, panel_out, out_stride, scratch); };
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

}  // namespace penstock::avx2
