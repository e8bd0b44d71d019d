// The definition of every kernel: plain loops, one operation at a time, in the order that all other paths keep.
//
// A sum over the inputs of a linear layer is one chain of fma in input order. A sum over a vector runs in 16 lanes
// (element i in lane i mod 16) that a fixed tree adds up. Nothing depends on how many rows or panels a call is given.
#include <algorithm>
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
    int32_t sums[2] = {0, 0};
    for (int i = 0; i < kBlock; ++i) {
      const int8_t value = static_cast<int8_t>(round_to_int(x[i] * inverse));
      row.values[b * kBlock + i] = value;
      sums[i / 16] += value;
    }
    row.scales[b] = scale;
    row.offsets[b] = scale * static_cast<float>(sums[0] + sums[1]);
    for (int h = 0; h < 2; ++h) row.sums[2 * b + h] = static_cast<int16_t>(sums[h]);
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

// ---- linear layers ----

// Rows that share what is read of the weights; no more than a matter of speed.
constexpr int kRows = 32;

// One output of some rows. Blocks in order: the exact dot times both scales is added, then the offset times what the block's
// values add up to.
void quantised_output(const Matrix& matrix, const uint8_t* panel, int o, const LinearInput& input, int first, int rows,
                      float* sums /* [rows] */) {
  const bool has_offset = block_format(matrix.type).has_offset();
  for (int b = 0; b < matrix.blocks(); ++b) {
    const Block block = read_block(matrix, panel, b, o);
    for (int r = 0; r < rows; ++r) {
      const int8_t* values = input.values + (first + r) * input.value_stride + b * kBlock;
      int32_t dots[2] = {0, 0};
      for (int i = 0; i < 16; ++i) dots[0] += block.levels[i] * values[i];
      for (int i = 16; i < kBlock; ++i) dots[1] += block.levels[i] * values[i];
      // At most 2 * 128 * 16 * 32 * 127 for Q6_K: below 2^24, so exact as a float.
      const float dot = static_cast<float>(block.factors[0] * dots[0] + block.factors[1] * dots[1]);
      const size_t at = (first + r) * input.block_stride + b;
      sums[r] = std::fma(dot, block.scale * input.scales[at], sums[r]);
      if (has_offset) sums[r] = std::fma(block.offset, input.offsets[at], sums[r]);
    }
  }
}

void float_output(const Matrix& matrix, const uint8_t* panel, int o, const LinearInput& input, int first, int rows,
                  float* sums /* [rows] */) {
  for (int k = 0; k < matrix.inputs; ++k) {
    const float weight = read_float(matrix, panel, k, o);
    for (int r = 0; r < rows; ++r) sums[r] = std::fma(input.x[(first + r) * input.x_stride + k], weight, sums[r]);
  }
}

void linear(const Matrix& matrix, int first, int last, const LinearInput& input, float* out, size_t out_stride, uint8_t*) {
  for (int output = first * kPanel; output < last * kPanel; ++output) {
    for (int row = 0; row < input.rows; row += kRows) {
      const int rows = std::min(kRows, input.rows - row);
      float sums[kRows] = {};
      const auto add_up = matrix.quantised() ? quantised_output : float_output;
      add_up(matrix, matrix.panel(output / kPanel), output % kPanel, input, row, rows, sums);
      for (int r = 0; r < rows; ++r) out[(row + r) * out_stride + output] = sums[r];
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
