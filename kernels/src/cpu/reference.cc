// The definition of every kernel: plain loops, one operation at a time, in the order that all other paths keep.
//
// A sum over the inputs of a linear layer is one chain of fma in input order. A sum over a vector runs in 16 lanes
// (element i in lane i mod 16) that a fixed tree adds up. Nothing depends on how many rows or panels a call is given.
#include <cmath>
#include <cstring>
#include <limits>

#include "../fixed_math.h"
#include "kernels.h"
#include "kv_codes.h"

namespace penstock {

namespace {

void rms_norm(const float* x, const float* weight, int length, int padded, float epsilon, float* y) {
  float lanes[16] = {};
  for (int i = 0; i < padded; ++i) lanes[i % 16] = std::fma(x[i], x[i], lanes[i % 16]);
  const float mean = tree_sum16(lanes) / static_cast<float>(length);
  const float scale = 1.0f / std::sqrt(mean + epsilon);
  for (int i = 0; i < padded; ++i) y[i] = x[i] * scale * weight[i];
}

void swiglu(const float* gate, const float* up, int padded, float* y) {
  for (int i = 0; i < padded; ++i) y[i] = gate[i] / (1.0f + fixed_exp(-gate[i])) * up[i];
}

void rotate(float* x, const float* cos, const float* sin, int length) {
  for (int i = 0; i < length; i += 2) {
    const float even = std::fma(x[i], cos[i], x[i + 1] * sin[i]);
    const float odd = std::fma(x[i + 1], cos[i + 1], x[i] * sin[i + 1]);
    x[i] = even;
    x[i + 1] = odd;
  }
}

void to_half(const float* x, int length, uint16_t* y) {
  for (int i = 0; i < length; ++i) y[i] = half_of_float(x[i]);
}

void quantise(const float* x, int length, QuantisedRow row) {
  for (int b = 0; b < length / kBlock; ++b, x += kBlock) {
    // Compared as integers, so that a NaN is greatest, becomes the scale and cannot vanish on the way to the logits.
    uint32_t greatest = 0;
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
      if (magnitude > greatest) greatest = magnitude;
    }
    const float max = float_of(greatest);
    // Blocks below kSmallestBlock count as zero: 127 / max would run into infinity.
    const bool zero = max < kSmallestBlock;
    const float scale = zero ? 0.0f : max * (1.0f / 127.0f);
    const float inverse = zero ? 0.0f : 127.0f / max;
    int32_t sum = 0;
    for (int i = 0; i < kBlock; ++i) {
      const int8_t value = static_cast<int8_t>(round_to_int(x[i] * inverse));
      row.values[b * kBlock + i] = value;
      sum += value;
    }
    row.scales[b] = scale;
    row.offsets[b] = scale * static_cast<float>(sum);
    row.sums[b] = sum;
  }
}

void encode(const float* x, int length, int bits, uint8_t* codes, uint16_t* scale, uint16_t* zero) {
  const int levels = (1 << bits) - 1;
  float least = std::numeric_limits<float>::infinity();
  float most = -least;
  bool finite = true;
  for (int d = 0; d < length; ++d) {
    least = x[d] < least ? x[d] : least;
    most = x[d] > most ? x[d] : most;
    finite = finite && std::fabs(x[d]) <= std::numeric_limits<float>::max();
  }
  const CodeScale to = code_scale(least, most, finite, levels);
  *scale = to.scale;
  *zero = to.zero;
  const int bytes = length * bits / 8;
  std::memset(codes, 0, bytes);
  if (to.scale == kHalfNan) return;
  for (int d = 0; d < length; ++d) {
    const int code = round_to_int((x[d] - to.offset) * to.inverse);
    codes[d % bytes] |= static_cast<uint8_t>((code < 0 ? 0 : code > levels ? levels : code) << (d / bytes * bits));
  }
}

// ---- linear layers: 16 outputs of one row ----

inline uint16_t half_at(const uint8_t* bytes, int index) {
  uint16_t half;
  std::memcpy(&half, bytes + 2 * index, sizeof half);
  return half;
}

void panel_f32(const Matrix& matrix, const uint8_t* panel, const float* x, float* out) {
  const float* w = reinterpret_cast<const float*>(panel);  // [inputs, 16]
  for (int k = 0; k < matrix.inputs; ++k) {
    for (int o = 0; o < kPanel; ++o) out[o] = std::fma(x[k], w[size_t(k) * kPanel + o], out[o]);
  }
}

void panel_f16(const Matrix& matrix, const uint8_t* panel, const float* x, float* out) {
  const uint16_t* w = reinterpret_cast<const uint16_t*>(panel);  // [inputs, 16]
  for (int k = 0; k < matrix.inputs; ++k) {
    for (int o = 0; o < kPanel; ++o) out[o] = std::fma(x[k], float_of_half(w[size_t(k) * kPanel + o]), out[o]);
  }
}

void panel_q4(const Matrix& matrix, const uint8_t* panel, const int8_t* values, const float* scales, const float* offsets,
              float* out) {
  for (int b = 0; b < matrix.blocks(); ++b, panel += kQ4Record, values += kBlock) {
    for (int o = 0; o < kPanel; ++o) {
      int32_t dot = 0;
      for (int i = 0; i < 16; ++i) {
        const uint8_t pair = panel[64 * (i / 4) + 4 * o + i % 4];
        dot += (pair & 15) * values[i] + (pair >> 4) * values[16 + i];
      }
      out[o] = std::fma(static_cast<float>(dot), float_of_half(half_at(panel + 256, o)) * scales[b], out[o]);
      out[o] = std::fma(float_of_half(half_at(panel + 288, o)), offsets[b], out[o]);
    }
  }
}

void panel_q8(const Matrix& matrix, const uint8_t* panel, const int8_t* values, const float* scales, float* out) {
  const uint8_t* weight_scales = panel + matrix.blocks() * kQ8Record;
  for (int b = 0; b < matrix.blocks(); ++b, panel += kQ8Record, values += kBlock, weight_scales += 2 * kPanel) {
    for (int o = 0; o < kPanel; ++o) {
      int32_t dot = 0;
      for (int i = 0; i < kBlock; ++i) dot += static_cast<int8_t>(panel[64 * (i / 4) + 4 * o + i % 4]) * values[i];
      out[o] = std::fma(static_cast<float>(dot), float_of_half(half_at(weight_scales, o)) * scales[b], out[o]);
    }
  }
}

void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride, uint8_t*) {
  for (int p = first; p < last; ++p) {
    const uint8_t* panel = matrix.panel(p);
    for (int row = 0; row < input.rows; ++row) {
      float sums[kPanel] = {};
      const float* x = input.x + row * input.x_stride;
      const int8_t* values = input.values + row * input.value_stride;
      const float* scales = input.scales + row * input.block_stride;
      const float* offsets = input.offsets + row * input.block_stride;
      switch (matrix.format) {
        case MatrixFormat::F32: panel_f32(matrix, panel, x, sums); break;
        case MatrixFormat::F16: panel_f16(matrix, panel, x, sums); break;
        case MatrixFormat::Q4: panel_q4(matrix, panel, values, scales, offsets, sums); break;
        case MatrixFormat::Q8: panel_q8(matrix, panel, values, scales, sums); break;
      }
      for (int o = 0; o < kPanel; ++o) out[row * out_stride + size_t(p) * kPanel + o] = sums[o];
    }
  }
}

// ---- attention ----

void merge(QueryRow& row, const QueryRow& tile, int head_dim) {
  const float max = tile.max > row.max ? tile.max : row.max;
  const float old_weight = fixed_exp(row.max - max);
  const float new_weight = fixed_exp(tile.max - max);
  for (int d = 0; d < head_dim; ++d) row.total[d] = std::fma(row.total[d], old_weight, tile.total[d] * new_weight);
  row.sum = std::fma(row.sum, old_weight, tile.sum * new_weight);
  row.max = max;
}

// Scores become weights exp(score - max), which are summed in 16 lanes (position mod 16).
void weigh(float* scores, int visible, float* max_out, float* sum_out) {
  float max = -std::numeric_limits<float>::infinity();
  for (int t = 0; t < visible; ++t) max = scores[t] > max ? scores[t] : max;
  float lanes[16] = {};
  for (int t = 0; t < visible; ++t) {
    scores[t] = fixed_exp(scores[t] - max);
    lanes[t % 16] += scores[t];
  }
  *max_out = max;
  *sum_out = tree_sum16(lanes);
}

// A tile by itself, then merged into what came before. Scores: one chain of fma over the dimensions; values are added up by one
// chain over positions.
void attend_row(const KeyTile& tile, QueryRow& row, int head_dim, float* scores) {
  for (int t = 0; t < row.visible; ++t) {
    const uint16_t* keys = tile.keys[t / kGroupTokens] + t % kGroupTokens;
    float score = 0.0f;
    for (int d = 0; d < head_dim; ++d) score = std::fma(row.query[d], float_of_half(keys[d * tile.key_stride]), score);
    scores[t] = score;
  }
  float max, sum;
  weigh(scores, row.visible, &max, &sum);

  float totals[kMostHeadDim];
  for (int d = 0; d < head_dim; ++d) {
    totals[d] = 0.0f;
    for (int t = 0; t < row.visible; ++t) totals[d] = std::fma(scores[t], float_of_half(tile.values[t][d]), totals[d]);
  }
  merge(row, {nullptr, 0, max, sum, totals}, head_dim);
}

// Integers of at most `levels` for some values.
Step to_integers(const float* values, int length, int levels, int16_t* integers) {
  uint32_t greatest = 0;  // as in `quantise`, so that a NaN is greatest
  for (int i = 0; i < length; ++i) {
    const uint32_t magnitude = bits_of(values[i]) & 0x7fffffffu;
    if (magnitude > greatest) greatest = magnitude;
  }
  const Step step = step_of(greatest, levels);
  for (int i = 0; i < length; ++i) integers[i] = static_cast<int16_t>(round_to_int(values[i] * step.inverse));
  return step;
}

// Dimension d of a token's codes, which lie in units of 16 bits, `stride` apart.
int code_at(const uint16_t* units, size_t stride, int d, int head_dim, int bits) {
  const int bytes = head_dim * bits / 8;
  const int byte = d % bytes;
  return units[byte / 2 * stride] >> (8 * (byte % 2) + d / bytes * bits) & ((1 << bits) - 1);
}

// The same of codes: see kv_codes.h.
void attend_coded_row(const KeyTile& tile, QueryRow& row, int head_dim, float* scores) {
  const int bits = kv_bits(tile.dtype);
  const size_t units = head_dim * bits / 16;
  int16_t query[kMostHeadDim];
  const Step query_step = to_integers(row.query, head_dim, kQueryLevels, query);
  int32_t query_sum = 0;
  for (int d = 0; d < head_dim; ++d) query_sum += query[d];

  for (int t = 0; t < row.visible; ++t) {
    const uint16_t* keys = tile.keys[t / kGroupTokens] + t % kGroupTokens;
    int32_t dot = 0;
    for (int d = 0; d < head_dim; ++d) dot += query[d] * code_at(keys, tile.key_stride, d, head_dim, bits);
    const float scale = float_of_half(keys[units * tile.key_stride]);
    const float zero = float_of_half(keys[(units + 1) * tile.key_stride]);
    scores[t] =
        std::fma(static_cast<float>(dot), scale * query_step.scale, zero * (query_step.scale * static_cast<float>(query_sum)));
  }
  float max, sum;
  weigh(scores, row.visible, &max, &sum);

  float lanes[16] = {};  // of weight * zero
  for (int t = 0; t < row.visible; ++t) {
    const uint16_t* scales = tile.value_scales[t / kGroupTokens] + t % kGroupTokens;
    lanes[t % 16] = std::fma(scores[t], float_of_half(scales[tile.key_stride]), lanes[t % 16]);
    scores[t] *= float_of_half(scales[0]);
  }
  const float offset = tree_sum16(lanes);
  int16_t weights[kTileTokens];
  const Step step = to_integers(scores, row.visible, kWeightLevels, weights);
  float totals[kMostHeadDim];
  for (int d = 0; d < head_dim; ++d) {
    int32_t total = 0;
    for (int t = 0; t < row.visible; ++t) total += weights[t] * code_at(tile.values[t], 1, d, head_dim, bits);
    totals[d] = std::fma(static_cast<float>(total), step.scale, offset);
  }
  merge(row, {nullptr, 0, max, sum, totals}, head_dim);
}

void attend(const KeyTile& tile, QueryRow* rows, int count, int head_dim, float* scratch) {
  for (int i = 0; i < count; ++i) {
    if (rows[i].visible == 0) continue;
    if (tile.dtype == KvDtype::F16) {
      attend_row(tile, rows[i], head_dim, scratch);
    } else {
      attend_coded_row(tile, rows[i], head_dim, scratch);
    }
  }
}

// ---- transfer ----

void transpose(const WireUnit* from, size_t from_stride, int rows, int columns, WireUnit* to, size_t to_stride) {
  for (int column = 0; column < columns; ++column) {
    for (int row = 0; row < rows; ++row) to[column * to_stride + row] = from[row * from_stride + column];
  }
}

}  // namespace

const Kernels kReferenceKernels = {InstructionSet::Reference, rms_norm, swiglu, rotate, to_half,
                                   quantise,                  encode,   linear, attend, merge,  transpose};

}  // namespace penstock
