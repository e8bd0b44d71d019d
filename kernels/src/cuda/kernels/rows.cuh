// What is done row by row: embedding, norms, rotation and writing of KV, the gate of the feed-forward network. Sums and values are
// floats; what a linear layer or attention reads next is halves.
#pragma once

#include "../../cpu/kv_codes.h"
#include "../../fixed_math.h"
#include "../kv_view.h"
#include "../language/half.h"
#include "../language/overlap.h"
#include "../matrix_layout.h"

namespace penstock::cuda {

// A weight as tensor cores see it; the inverse of the layout, for the few rows of an embedding.
__device__ __forceinline__ float weight_at(const DeviceMatrix& matrix, int output, int input) {
  const int panel = output / kPanelOutputs;
  const int o = output % kPanelOutputs;
  const int chunk = input / kChunkInputs;
  const int lane = o % 8 * 4 + input % kChunkInputs / 16;
  const int step = input % 16 / 4;
  const int i = o / 8 + input % 4 / 2 * 2;
  const int second = input % 2;
  const uint8_t* levels = matrix.levels + (size_t(panel) * matrix.chunks + chunk) * matrix.chunk_bytes();
  const auto word = [&](int plane, int w) { return reinterpret_cast<const uint32_t*>(levels + plane * 512 + lane * 16)[w]; };
  if (matrix.kind == WeightKind::Half) return half_to_float(static_cast<uint16_t>(word(step, i) >> 16 * second));

  const int numbers = group_numbers(matrix.kind);
  const size_t at = ((size_t(panel) * matrix.groups() + input / group_inputs(matrix.kind)) * kPanelOutputs + o) * numbers;
  const float scale = half_to_float(matrix.scales[at]);
  const float other = numbers == 2 ? half_to_float(matrix.scales[at + 1]) : 0.0f;
  const bool nibbles = level_bits(matrix.kind) == 4;
  const uint32_t level = nibbles ? word(0, step) >> (4 * i + 16 * second) & 15u
                                 : word(step / 2, step % 2 * 2 + i / 2) >> (i % 2 * 16 + 8 * second) & 255u;
  const float value = static_cast<float>(level) - (nibbles ? 0.0f : 128.0f);
  float weight;
  switch (matrix.kind) {
    case WeightKind::Nibble: weight = (value - 8.0f) * scale; break;
    case WeightKind::NibbleZero: weight = half_to_float(float_to_half(value - other)) * scale; break;
    default: weight = fmaf(value, scale, other);
  }
  return half_to_float(float_to_half(weight));
}

constexpr int kRowThreads = 256;

// blockIdx.x: row. The row's embedding, and the angles of its position.
__global__ void embed_kernel(const DeviceMatrix matrix, const int32_t* __restrict__ tokens, const int32_t* __restrict__ positions,
                      const double* __restrict__ frequencies, int pairs, float* x, size_t x_stride, float2* angles) {
  begin_kernel();
  const int row = blockIdx.x;
  for (int i = threadIdx.x; i < matrix.inputs; i += kRowThreads) x[row * x_stride + i] = weight_at(matrix, tokens[row], i);
  for (int i = threadIdx.x; i < pairs; i += kRowThreads) {
    const SinCos angle = fixed_sincos(positions[row] * frequencies[i]);
    angles[size_t(row) * pairs + i] = make_float2(angle.cos, angle.sin);
  }
}

constexpr int kNormThreads = 512;
constexpr int kNormTogether = 4;  // elements of a thread that are under way together

// blockIdx.x: row of the output. The residual stream x gains z, where there is one; y is its RMS norm. Where `rows` is there the
// output is of x's rows[blockIdx.x], and x is left as it is: a row may be named twice.
__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(float* x, const float* __restrict__ z, size_t x_stride, const int32_t* __restrict__ rows,
             const float* __restrict__ weight, int length, float epsilon, uint16_t* y, size_t y_stride) {
  begin_kernel();
  PENSTOCK_SHARED(shared);
  const int row = rows == nullptr ? static_cast<int>(blockIdx.x) : rows[blockIdx.x];
  float* from = x + row * x_stride;
  const bool gains = z != nullptr;
  const bool keeps = gains && rows == nullptr;  // what it gains
  const float* gained = gains ? z + row * x_stride : nullptr;
  float value[kNormTogether];
  const auto load = [&](int first, bool gain) {
#pragma unroll
    for (int k = 0; k < kNormTogether; ++k) {
      const int i = first + k * kNormThreads;
      value[k] = i < length ? from[i] : 0.0f;
      if (gain && i < length) value[k] += gained[i];
    }
  };
  float squares = 0.0f;
  for (int first = threadIdx.x; first < length; first += kNormTogether * kNormThreads) {
    load(first, gains);
#pragma unroll
    for (int k = 0; k < kNormTogether; ++k) {
      const int i = first + k * kNormThreads;
      if (keeps && i < length) from[i] = value[k];
      squares = fmaf(value[k], value[k], squares);
    }
  }
  const float mean = block_sum(squares, reinterpret_cast<float*>(shared)) / static_cast<float>(length);
  const float scale = 1.0f / sqrtf(mean + epsilon);
  for (int first = threadIdx.x; first < length; first += kNormTogether * kNormThreads) {
    load(first, gains && !keeps);
#pragma unroll
    for (int k = 0; k < kNormTogether; ++k) {
      const int i = first + k * kNormThreads;
      if (i < length) y[blockIdx.x * y_stride + i] = float_to_half(value[k] * scale * weight[i]);
    }
  }
}

// blockIdx: (row, kRowThreads of its elements). silu(gate) * up.
__global__ void __launch_bounds__(kRowThreads) swiglu_kernel(const float* __restrict__ gate, const float* __restrict__ up, size_t stride,
                                                             int length, uint16_t* y, size_t y_stride) {
  begin_kernel();
  const size_t row = blockIdx.x;
  const int i = blockIdx.y * kRowThreads + threadIdx.x;
  if (i >= length) return;
  const float value = gate[row * stride + i];
  y[row * y_stride + i] = float_to_half(value / (1.0f + fixed_exp(-value)) * up[row * stride + i]);
}

struct RotateAndStore {
  const float* projected;       // [rows, stride] queries, keys and values side by side
  size_t stride;
  size_t key_offset;
  size_t value_offset;
  const float2* angles;         // [rows, rotary / 2] cos, sin
  int rotary;
  int heads;
  const int32_t* positions;     // [rows] -1: nothing is stored
  const int32_t* table_starts;  // [rows]
  const int32_t* tables;
  uint16_t* queries;            // [rows, heads, head_dim]
};

constexpr int kStoreWarps = 4;
constexpr int kMostStoredDim = 256;

// A key or value of a head to codes, by one warp; `values` [head_dim] is shared.
__device__ __forceinline__ void store_codes(const KvView& kv, uint8_t* piece, int slot, const float* values) {
  const int lane = threadIdx.x % 32;
  const int levels = (1 << kv.bits) - 1;
  float least = 3.402823466e38f;
  float most = -least;
  bool finite = true;
  for (int d = lane; d < kv.head_dim; d += 32) {
    least = values[d] < least ? values[d] : least;
    most = values[d] > most ? values[d] : most;
    finite = finite && fabsf(values[d]) <= 3.402823466e38f;
  }
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    const float other_least = __shfl_xor_sync(kAllLanes, least, distance);
    const float other_most = __shfl_xor_sync(kAllLanes, most, distance);
    least = other_least < least ? other_least : least;
    most = other_most > most ? other_most : most;
  }
  finite = __ballot_sync(kAllLanes, finite) == kAllLanes;
  const CodeScale to = code_scale(least, most, finite, levels);
  uint8_t* codes = piece + slot * kv.token_bytes();
  const auto code_of = [&](int d) {
    if (to.scale == kHalfNan) return 0;
    const int code = round_to_int((values[d] - to.offset) * to.inverse);
    return code < 0 ? 0 : code > levels ? levels : code;
  };
  const int bytes = static_cast<int>(kv.token_bytes());
  for (int d = lane; d < bytes; d += 32)
    codes[d] = static_cast<uint8_t>(kv.bits == 8 ? code_of(d) : code_of(d) | code_of(d + bytes) << 4);
  if (lane == 0) {
    uint16_t* scales = reinterpret_cast<uint16_t*>(piece + kv.block_tokens * kv.token_bytes());
    scales[slot] = to.scale;
    scales[kv.block_tokens + slot] = to.zero;
  }
}

// blockIdx: (row, kStoreWarps of its heads). Rotates queries and keys, and writes keys and values to the row's place in the pool. A
// warp takes a head: of the queries, then of the keys, then of the values.
__global__ void __launch_bounds__(kStoreWarps * 32) rotate_and_store_kernel(const KvView kv, int layer, const RotateAndStore in) {
  begin_kernel();
  PENSTOCK_SHARED(shared);
  const int row = blockIdx.x;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int position = in.positions[row];
  float* values = reinterpret_cast<float*>(shared) + warp * kMostStoredDim;
  const int block = position < 0 ? 0 : in.tables[in.table_starts[row] + position / kv.block_tokens];
  const int slot = position % kv.block_tokens;

  const int item = blockIdx.y * kStoreWarps + warp;
  if (item >= in.heads + 2 * kv.kv_heads) return;
  const bool query = item < in.heads;
  const bool value = item >= in.heads + kv.kv_heads;
  const int head = query ? item : value ? item - in.heads - kv.kv_heads : item - in.heads;
  const float* from = in.projected + row * in.stride + (query ? 0 : value ? in.value_offset : in.key_offset) + head * kv.head_dim;
  for (int d = 2 * lane; d < kv.head_dim; d += 64) {
    float even = from[d];
    float odd = from[d + 1];
    if (!value && d < in.rotary) {
      const float2 angle = in.angles[(size_t(row) * in.rotary + d) / 2];
      const float x = even;
      even = fmaf(x, angle.x, odd * -angle.y);
      odd = fmaf(odd, angle.x, x * angle.y);
    }
    values[d] = even;
    values[d + 1] = odd;
  }
  __syncwarp();
  if (query) {
    uint16_t* into = in.queries + (size_t(row) * in.heads + head) * kv.head_dim;
    for (int d = lane; d < kv.head_dim; d += 32) into[d] = float_to_half(values[d]);
  } else if (position >= 0) {
    uint8_t* piece = kv.base + kv.piece(layer, block, value ? 1 : 0, head);
    if (kv.bits == 16) {
      uint16_t* into = reinterpret_cast<uint16_t*>(piece) + slot * kv.head_dim;
      for (int d = lane; d < kv.head_dim; d += 32) into[d] = float_to_half(values[d]);
    } else {
      store_codes(kv, piece, slot, values);
    }
  }
}

// ---- blocks that leave and come ----

// blockIdx.x: one layer of one block, counted [layer][block] from `first`. `packed` has these side by side.
template <bool kOut>
__global__ void move_blocks_kernel(const KvView kv, const int32_t* __restrict__ blocks, int count, int first_layer, int first, uint4* packed) {
  begin_kernel();
  const int piece = first + blockIdx.x;
  const size_t words = kv.layer_block_bytes() / sizeof(uint4);
  uint4* pool = reinterpret_cast<uint4*>(kv.base + kv.piece(first_layer + piece / count, blocks[piece % count], 0, 0));
  uint4* side = packed + blockIdx.x * words;
  for (size_t i = threadIdx.x; i < words; i += kRowThreads) {
    if (kOut) {
      side[i] = pool[i];
    } else {
      pool[i] = side[i];
    }
  }
}

// blockIdx.x: one layer of one block, counted [layer][block].
__global__ void copy_blocks_kernel(const KvView from, const KvView to, const int32_t* __restrict__ sources, const int32_t* __restrict__ goals,
                                   int count, int first_layer) {
  begin_kernel();
  const int layer = first_layer + blockIdx.x / count;
  const int place = blockIdx.x % count;
  const uint4* source = reinterpret_cast<const uint4*>(from.base + from.piece(layer, sources[place], 0, 0));
  uint4* goal = reinterpret_cast<uint4*>(to.base + to.piece(layer, goals[place], 0, 0));
  for (size_t i = threadIdx.x; i < to.layer_block_bytes() / sizeof(uint4); i += kRowThreads) goal[i] = source[i];
}

}  // namespace penstock::cuda
