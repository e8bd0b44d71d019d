// Attention over the paged pool, for single rows (decode) and for chunks of a prompt (prefill), with the same bits.
//
// A context is walked in units of a fixed number of tokens from position 0. What a unit gives a row — the greatest score, the sum
// of exp(score - greatest), and the values weighted by it — depends on nothing but the row and the unit, and units are merged in
// order: so it does not matter whether units are computed by many blocks or one after another by one (Flash-Decoding, Dao et al.
// 2023; FlashAttention-2, Dao 2023). Within a unit scores are chains of mma over the dimensions, values chains of mma over
// the tokens, and weights are summed by quarters of the unit.
//
// Query rows are the heads that share a KV head, token after token: row i is token i / group, head i % group.
#pragma once

#include "../../fixed_math.h"
#include "../kv_view.h"
#include "../language/async_copy.h"
#include "../language/mma.h"
#include "../language/overlap.h"
#include "../prefill_task.h"

namespace penstock::cuda {

constexpr int unit_tokens(int dim) { return dim <= 128 ? 128 : 64; }
constexpr int kPad = 8;  // halves between rows of shared memory, so that they fall into different banks
constexpr float kNone = -3.402823466e38f;  // a score below all others, for which exp gives zero

constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// Keys or values of `tokens` tokens from `first` on, as halves in rows of kDim + kPad; zeros beyond the tokens and the
// dimensions of the model, as what lies in the pool there may be anything. Halves come asynchronously, as one group.
//
// A thread has eight dimensions of every kStep-th token. The entries of the block table that it needs are under way together.
template <int kDim, int kThreads>
__device__ __forceinline__ void load_unit(uint16_t* into, const KvView& kv, int layer, int values, int head,
                                          const int32_t* __restrict__ table, int first, int tokens) {
  constexpr int kLanes = power_of_two(kDim / 8);
  constexpr int kStep = kThreads / kLanes;
  constexpr int kTogether = unit_tokens(kDim) / kStep < 8 ? unit_tokens(kDim) / kStep : 8;
  static_assert(unit_tokens(kDim) % (kStep * kTogether) == 0);
  const int d = threadIdx.x % kLanes * 8;
  const bool has_dims = d < kv.head_dim;
  const size_t token_bytes = kv.token_bytes();
  const size_t block_bytes = kv.layer_block_bytes();
  const uint8_t* base = kv.base + kv.piece(layer, 0, values, head);
  int token = threadIdx.x / kLanes;
  int entry = (first + token) / kv.block_tokens;
  int slot = (first + token) % kv.block_tokens;
  const int entries_on = kStep / kv.block_tokens;
  const int slots_on = kStep % kv.block_tokens;
  for (int part = 0; part < unit_tokens(kDim) / (kStep * kTogether); ++part) {
    int block[kTogether], slots[kTogether];
    const int first_token = token;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      block[j] = has_dims && token < tokens ? table[entry] : -1;
      slots[j] = slot;
      token += kStep;
      entry += entries_on;
      slot += slots_on;
      if (slot >= kv.block_tokens) {
        slot -= kv.block_tokens;
        ++entry;
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (d >= kDim) continue;
      uint16_t* to = into + (first_token + j * kStep) * (kDim + kPad) + d;
      const bool there = block[j] >= 0;
      const uint8_t* piece = base + (there ? block[j] * block_bytes : 0);
      if (kv.bits == 16) {
        copy_async16(to, piece + slots[j] * token_bytes + d * 2, there);
        continue;
      }
      uint4 halves = make_uint4(0, 0, 0, 0);
      if (there) {
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(piece + kv.block_tokens * token_bytes);
        const float scale = half_to_float(scales[slots[j]]);
        const float zero = half_to_float(scales[kv.block_tokens + slots[j]]);
        const int half_dim = kv.head_dim / 2;
        const bool upper = kv.bits == 4 && d >= half_dim;
        const uint2 codes = *reinterpret_cast<const uint2*>(piece + slots[j] * token_bytes + (upper ? d - half_dim : d));
        const auto value = [&](int k) {
          const uint32_t byte = (k < 4 ? codes.x : codes.y) >> 8 * (k % 4) & 255u;
          const uint32_t code = kv.bits == 8 ? byte : upper ? byte >> 4 : byte & 15u;
          return fmaf(scale, static_cast<float>(code), zero);
        };
        halves = make_uint4(half2_of(value(0), value(1)), half2_of(value(2), value(3)), half2_of(value(4), value(5)),
                            half2_of(value(6), value(7)));
      }
      *reinterpret_cast<uint4*>(to) = halves;
    }
  }
  close_copy_group();
}

// Where a lane finds its row of four matrices [8, 8]: of a fragment a of `stride` halves a row, of b from keys, and of b from values.
__device__ __forceinline__ int a_row(int lane, int stride) { return (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8; }
__device__ __forceinline__ int key_row(int lane, int stride) { return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8; }
__device__ __forceinline__ int value_row(int lane, int stride) { return (lane % 8 + lane / 8 % 2 * 8) * stride + lane / 16 * 8; }

// Scores of 16 query rows against Tiles * 8 tokens: sums[n] is the mma of tokens 8n ….
template <int kDim, int kTiles>
__device__ __forceinline__ void score(const uint16_t* queries, const uint16_t* keys, float (&sums)[kTiles][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    load_matrices(a, queries + a_row(lane, kDim + kPad) + 16 * k);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_matrices(b, keys + key_row(lane, kDim + kPad) + 8 * n * (kDim + kPad) + 16 * k);
      mma_m16n8k16(sums[n], a, b[0], b[1]);
      mma_m16n8k16(sums[n + 1], a, b[2], b[3]);
    }
  }
}

// Scales scores and takes out those of tokens that the row does not see; the greatest of a lane's for each of its two rows.
template <int kTiles>
__device__ __forceinline__ void mask_scores(float (&sums)[kTiles][4], int first_token, const int (&visible)[2], float scale,
                                            float (&greatest)[2]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first_token + 8 * n + 2 * t + i % 2;
      // A score that is not a number stays one, and reaches the logits.
      sums[n][i] = token < visible[i / 2] ? sums[n][i] * scale : kNone;
      greatest[i / 2] = sums[n][i] > greatest[i / 2] || sums[n][i] != sums[n][i] ? sums[n][i] : greatest[i / 2];
    }
  }
}

// The same over the four lanes that share a row.
__device__ __forceinline__ float greatest_of_row(float value) {
#pragma unroll
  for (unsigned distance = 1; distance <= 2; distance *= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value || other != other ? other : value;
  }
  return value;
}

// Scores become weights; the sum of the row's weights in these tiles, which are a quarter of a unit.
template <int kTiles>
__device__ __forceinline__ void weigh_scores(float* scores /* [kTiles, 4] */, const float (&greatest)[2], float (&sum)[2]) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[4 * n + i] = fixed_exp(scores[4 * n + i] - greatest[i / 2]);
      sum[i / 2] += scores[4 * n + i];
    }
  }
#pragma unroll
  for (unsigned distance = 1; distance <= 2; distance *= 2) {
    sum[0] += __shfl_xor_sync(kAllLanes, sum[0], distance);
    sum[1] += __shfl_xor_sync(kAllLanes, sum[1], distance);
  }
}

// What a row has gathered so far, less the values.
struct Gathered {
  float greatest = kNone;
  float sum = 0.0f;
};

// Factors with which the values so far and those of the next unit are added.
struct MergeWeights {
  float old_weight;
  float new_weight;
};
__device__ __forceinline__ MergeWeights merge(Gathered& row, float greatest, float sum) {
  const float both = greatest > row.greatest || greatest != greatest ? greatest : row.greatest;
  const MergeWeights weights = {fixed_exp(row.greatest - both), fixed_exp(greatest - both)};
  row.sum = fmaf(row.sum, weights.old_weight, sum * weights.new_weight);
  row.greatest = both;
  return weights;
}

// ---- decode: a unit of a row is computed by a block ----

struct DecodeRows {
  const uint16_t* queries;       // [rows, heads, head_dim] halves, rotated
  const int32_t* rows;           // [decode rows] the row of each
  const int32_t* positions;      // [rows] -1: none, in a graph that has room for more
  const int32_t* table_starts;   // [rows] where a row's block table begins in `tables`
  const int32_t* tables;
  const int32_t* unit_starts;    // [decode rows] the first of a row's units in what follows
  float* totals;                 // [units, heads, head_dim]
  float* states;                 // [units, heads, 2] greatest, sum
  uint16_t* out;                 // [rows, out_stride] halves
  size_t out_stride;
  int heads;
  float scale;
};

constexpr int kDecodeThreads = 128;

template <int kDim>
constexpr size_t decode_shared_bytes() {
  constexpr int kUnit = unit_tokens(kDim);
  return (size_t{16 + 2 * kUnit} * (kDim + kPad) + size_t{16} * (kUnit + kPad)) * sizeof(uint16_t) + 2 * 4 * 16 * sizeof(float);
}

// blockIdx: (units in turn, KV head and 16 of its queries, decode row)
template <int kDim>
__global__ void __launch_bounds__(kDecodeThreads) attend_decode_kernel(const KvView kv, int layer, const DecodeRows in) {
  constexpr int kUnit = unit_tokens(kDim);
  constexpr int kTiles = kUnit / 4 / 8;  // of a warp, which has a quarter of the tokens
  begin_kernel();
  const int index = blockIdx.z;
  const int row = in.rows[index];
  const int context = in.positions[row] + 1;
  const int group = in.heads / kv.kv_heads;
  const int kv_head = blockIdx.y % kv.kv_heads;
  const int first_query = blockIdx.y / kv.kv_heads * 16;
  const int32_t* table = in.tables + in.table_starts[row];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;

  PENSTOCK_SHARED(shared);
  uint16_t* queries = reinterpret_cast<uint16_t*>(shared);     // [16, kDim + kPad]
  uint16_t* keys = queries + 16 * (kDim + kPad);               // [kUnit, kDim + kPad]
  uint16_t* values = keys + kUnit * (kDim + kPad);             // [kUnit, kDim + kPad]
  uint16_t* weights = values + kUnit * (kDim + kPad);          // [16, kUnit + kPad]
  float* greatests = reinterpret_cast<float*>(weights + 16 * (kUnit + kPad));  // [4, 16]
  float* sums = greatests + 4 * 16;                            // [4, 16]

  // Queries come with the first keys. Of the next unit keys are under way as soon as these are read, and then values.
  for (int i = threadIdx.x; i < 16 * (kDim / 8); i += kDecodeThreads) {
    const int query = first_query + i / (kDim / 8);
    const int d = i % (kDim / 8) * 8;
    const bool there = query < group && d < kv.head_dim;
    copy_async16(queries + i / (kDim / 8) * (kDim + kPad) + d,
                 in.queries + (size_t(row) * in.heads + kv_head * group + (there ? query : 0)) * kv.head_dim + d, there);
  }
  const auto tokens_of = [&](int unit) { return context - unit * kUnit < kUnit ? context - unit * kUnit : kUnit; };
  const auto load = [&](uint16_t* into, int of, int unit) {
    if (unit * kUnit < context) {
      load_unit<kDim, kDecodeThreads>(into, kv, layer, of, kv_head, table, unit * kUnit, tokens_of(unit));
    } else {
      close_copy_group();
    }
  };
  load(keys, 0, blockIdx.x);
  load(values, 1, blockIdx.x);

  for (int unit = blockIdx.x; unit * kUnit < context; unit += gridDim.x) {
    const int tokens = tokens_of(unit);
    const int next = unit + gridDim.x;
    await_copies<1>();
    __syncthreads();

    float scores[kTiles][4] = {};
    score<kDim, kTiles>(queries, keys + warp * (kUnit / 4) * (kDim + kPad), scores);
    float greatest[2] = {kNone, kNone};
    const int visible[2] = {tokens, tokens};
    mask_scores<kTiles>(scores, warp * (kUnit / 4), visible, in.scale, greatest);
    for (int r = 0; r < 2; ++r) {
      greatest[r] = greatest_of_row(greatest[r]);
      if (lane % 4 == 0) greatests[warp * 16 + g + 8 * r] = greatest[r];
    }
    __syncthreads();
    load(keys, 0, next);
    for (int r = 0; r < 2; ++r) {
      for (int w = 0; w < 4; ++w) {
        const float other = greatests[w * 16 + g + 8 * r];
        greatest[r] = other > greatest[r] || other != other ? other : greatest[r];
      }
    }
    float sum[2];
    weigh_scores<kTiles>(scores[0], greatest, sum);
    if (lane % 4 == 0) {
      sums[warp * 16 + g] = sum[0];
      sums[warp * 16 + g + 8] = sum[1];
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      uint16_t* to = weights + g * (kUnit + kPad) + warp * (kUnit / 4) + 8 * n + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = half2_of(scores[n][0], scores[n][1]);
      *reinterpret_cast<uint32_t*>(to + 8 * (kUnit + kPad)) = half2_of(scores[n][2], scores[n][3]);
    }
    await_copies<1>();
    __syncthreads();

    const size_t place = (size_t(in.unit_starts[index]) + unit) * in.heads + kv_head * group;
    if (warp == 0 && lane % 4 == 0) {
      for (int r = 0; r < 2; ++r) {
        const int query = first_query + g + 8 * r;
        const float* quarter = sums + g + 8 * r;
        if (query < group) {
          in.states[(place + query) * 2] = greatest[r];
          in.states[(place + query) * 2 + 1] = ((quarter[0] + quarter[16]) + quarter[32]) + quarter[48];
        }
      }
    }
    for (int n = warp; n < kDim / 16; n += 4) {
      float out[2][4] = {};
#pragma unroll
      for (int k = 0; k < kUnit / 16; ++k) {
        uint32_t a[4], b[4];
        load_matrices(a, weights + a_row(lane, kUnit + kPad) + 16 * k);
        load_matrices_transposed(b, values + value_row(lane, kDim + kPad) + 16 * k * (kDim + kPad) + 16 * n);
        mma_m16n8k16(out[0], a, b[0], b[1]);
        mma_m16n8k16(out[1], a, b[2], b[3]);
      }
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i) {
          const int query = first_query + g + i / 2 * 8;
          const int d = 16 * n + 8 * half + lane % 4 * 2 + i % 2;
          if (query < group && d < kv.head_dim) in.totals[(place + query) * kv.head_dim + d] = out[half][i];
        }
      }
    }
    __syncthreads();  // the values are read
    load(values, 1, next);
  }
  await_copies<0>();
}

// blockIdx: (head, decode row); a thread for each dimension.
template <int kUnit>
__global__ void merge_units_kernel(int head_dim, const DecodeRows in) {
  begin_kernel();
  const int head = blockIdx.x;
  const int index = blockIdx.y;
  const int row = in.rows[index];
  const int units = (in.positions[row] + kUnit) / kUnit;
  const int d = threadIdx.x;
  if (d >= head_dim || units == 0) return;
  constexpr int kTogether = 8;  // units that are under way together
  Gathered gathered;
  float total = 0.0f;
  const size_t first_place = size_t(in.unit_starts[index]) * in.heads + head;
  for (int first = 0; first < units; first += kTogether) {
    float2 states[kTogether];
    float totals[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (first + k >= units) break;
      const size_t place = first_place + size_t(first + k) * in.heads;
      states[k] = reinterpret_cast<const float2*>(in.states)[place];
      totals[k] = in.totals[place * head_dim + d];
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (first + k >= units) break;
      const MergeWeights weights = merge(gathered, states[k].x, states[k].y);
      total = fmaf(total, weights.old_weight, totals[k] * weights.new_weight);
    }
  }
  in.out[row * in.out_stride + head * head_dim + d] = float_to_half(total * (1.0f / gathered.sum));
}

// ---- prefill: a block has some query rows, and walks their context ----

struct PrefillRows {
  const uint16_t* queries;      // as in DecodeRows
  const int32_t* positions;
  const int32_t* table_starts;
  const int32_t* tables;
  const PrefillTask* tasks;
  uint16_t* out;
  size_t out_stride;
  int heads;
  float scale;
};

constexpr int prefill_warps(int dim) { return dim <= 128 ? 4 : 2; }

template <int kDim>
constexpr size_t prefill_shared_bytes() {
  constexpr int kQueries = 16 * prefill_warps(kDim);
  return size_t{kQueries + unit_tokens(kDim)} * (kDim + kPad) * sizeof(uint16_t) + size_t{kQueries} * kDim * sizeof(float);
}

// blockIdx: (task, KV head)
template <int kDim>
__global__ void __launch_bounds__(prefill_warps(kDim) * 32) attend_prefill_kernel(const KvView kv, int layer, const PrefillRows in) {
  constexpr int kWarps = prefill_warps(kDim);
  constexpr int kThreads = kWarps * 32;
  constexpr int kQueries = 16 * kWarps;
  constexpr int kUnit = unit_tokens(kDim);
  constexpr int kTiles = kUnit / 8;
  begin_kernel();
  const PrefillTask task = in.tasks[blockIdx.x];
  const int kv_head = blockIdx.y;
  const int group = in.heads / kv.kv_heads;
  const int position = in.positions[task.first_row];
  const int32_t* table = in.tables + in.table_starts[task.first_row];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;

  PENSTOCK_SHARED(shared);
  uint16_t* queries = reinterpret_cast<uint16_t*>(shared);                  // [kQueries, kDim + kPad]
  uint16_t* tile = queries + kQueries * (kDim + kPad);                      // [kUnit, kDim + kPad] keys, then values
  float* totals = reinterpret_cast<float*>(tile + kUnit * (kDim + kPad));   // [kQueries, kDim]; a warp has rows of its own

  for (int i = threadIdx.x; i < kQueries * (kDim / 8); i += kThreads) {
    const int query = task.first_query + i / (kDim / 8);
    const int token = query / group;
    const int d = i % (kDim / 8) * 8;
    const bool there = token < task.rows && d < kv.head_dim;
    const size_t from = (size_t(task.first_row + token) * in.heads + kv_head * group + query % group) * kv.head_dim + d;
    copy_async16(queries + i / (kDim / 8) * (kDim + kPad) + d, in.queries + (there ? from : 0), there);
  }
  for (int i = threadIdx.x; i < kQueries * kDim; i += kThreads) totals[i] = 0.0f;

  // Positions up to which the lane's rows see, less one; -1 where there is no row.
  int sees[2];
  for (int r = 0; r < 2; ++r) {
    const int token = (task.first_query + 16 * warp + g + 8 * r) / group;
    sees[r] = token < task.rows ? position + token + 1 : 0;
  }
  const int last_query = task.first_query + kQueries - 1;
  const int last_token = last_query / group < task.rows ? last_query / group : task.rows - 1;
  const int context = position + last_token + 1;
  Gathered gathered[2];

  for (int first = 0; first < context; first += kUnit) {
    const int tokens = context - first < kUnit ? context - first : kUnit;
    __syncthreads();  // the values before are read, or the queries written
    load_unit<kDim, kThreads>(tile, kv, layer, 0, kv_head, table, first, tokens);
    await_copies<0>();
    __syncthreads();
    float scores[kTiles][4] = {};
    score<kDim, kTiles>(queries + 16 * warp * (kDim + kPad), tile, scores);
    __syncthreads();
    load_unit<kDim, kThreads>(tile, kv, layer, 1, kv_head, table, first, tokens);

    float greatest[2] = {kNone, kNone};
    const int visible[2] = {sees[0] - first, sees[1] - first};
    mask_scores<kTiles>(scores, 0, visible, in.scale, greatest);
    for (int r = 0; r < 2; ++r) greatest[r] = greatest_of_row(greatest[r]);
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      float part[2];
      weigh_scores<kTiles / 4>(scores[quarter * (kTiles / 4)], greatest, part);
      for (int r = 0; r < 2; ++r) sum[r] = quarter == 0 ? part[r] : sum[r] + part[r];
    }
    uint32_t weights[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      weights[n][0] = half2_of(scores[n][0], scores[n][1]);
      weights[n][1] = half2_of(scores[n][2], scores[n][3]);
    }
    MergeWeights merged[2] = {{1.0f, 0.0f}, {1.0f, 0.0f}};
    for (int r = 0; r < 2; ++r) {
      if (visible[r] > 0) merged[r] = merge(gathered[r], greatest[r], sum[r]);
    }
    await_copies<0>();
    __syncthreads();

    constexpr int kTogether = kDim % 32 == 0 ? 2 : 1;  // of what follows, so that no mma waits for the one before it
#pragma unroll
    for (int n = 0; n < kDim / 16; n += kTogether) {
      float out[2 * kTogether][4] = {};
#pragma unroll
      for (int k = 0; k < kUnit / 16; ++k) {
        const uint32_t a[4] = {weights[2 * k][0], weights[2 * k][1], weights[2 * k + 1][0], weights[2 * k + 1][1]};
#pragma unroll
        for (int m = 0; m < kTogether; ++m) {
          uint32_t b[4];
          load_matrices_transposed(b, tile + value_row(lane, kDim + kPad) + 16 * k * (kDim + kPad) + 16 * (n + m));
          mma_m16n8k16(out[2 * m], a, b[0], b[1]);
          mma_m16n8k16(out[2 * m + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int half = 0; half < 2 * kTogether; ++half) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* total = totals + (16 * warp + g + 8 * r) * kDim + 16 * n + 8 * half + lane % 4 * 2;
          if (visible[r] > 0) {
            for (int i = 0; i < 2; ++i)
              total[i] = fmaf(total[i], merged[r].old_weight, out[half][2 * r + i] * merged[r].new_weight);
          }
        }
      }
    }
  }

  for (int r = 0; r < 2; ++r) {
    const int query = task.first_query + 16 * warp + g + 8 * r;
    if (query / group >= task.rows) continue;
    uint16_t* out = in.out + (task.first_row + query / group) * in.out_stride + (kv_head * group + query % group) * kv.head_dim;
    const float inverse = 1.0f / gathered[r].sum;
    for (int d = lane % 4 * 2; d < kDim; d += 8) {
      const float* total = totals + (16 * warp + g + 8 * r) * kDim + d;
      if (d < kv.head_dim) out[d] = float_to_half(total[0] * inverse);
      if (d + 1 < kv.head_dim) out[d + 1] = float_to_half(total[1] * inverse);
    }
  }
}

}  // namespace penstock::cuda
