// Draws a token from a row of logits: the steps, and the bits, of Sampler (sampler.h) for options that leave the logits as they are.
//
// A row is a block's. Where only the likeliest tokens can be drawn, the first kMostCandidates are found by a radix selection, put in
// order (logit descending, id ascending), and weighed; where more of them would have to be seen the host is told.
#pragma once

#include "../../fixed_math.h"
#include "../../philox.h"
#include "../draw_order.h"
#include "../language/overlap.h"

namespace penstock::cuda {

constexpr int kDrawThreads = 1024;
constexpr int kSumIds = 1024;  // ids whose weights are summed in floats, in 16 lanes

inline size_t draw_shared_bytes(int vocabulary) {
  return sizeof(double) * ((vocabulary + kSumIds - 1) / kSumIds) + sizeof(uint64_t) * kMostCandidates +
         sizeof(float) * kMostCandidates + sizeof(uint32_t) * (256 + kDrawThreads / 32 + 2);
}

// Order of floats as order of integers; the two zeros are equal.
__device__ __forceinline__ uint32_t rank_of(float logit) {
  const uint32_t bits = bits_of(logit + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t rank) { return float_of(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank); }

// The greatest over a block's threads, the same for all of them. `scratch` is one, shared.
template <class T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
  __syncthreads();
  if (threadIdx.x == 0) *scratch = 0;
  __syncthreads();
  atomicMax(scratch, value);
  __syncthreads();
  return *scratch;
}

struct DrawMemory {
  double* block_sums;    // [vocabulary / kSumIds]
  uint64_t* candidates;  // [kMostCandidates] rank and the complement of the id: greater is earlier
  float* weights;        // [kMostCandidates], also of the ids of one block
  uint32_t* counts;      // [256]
  uint32_t* words;       // [warps + 2], aligned for two together
};

// Sums of exp((x - greatest) / temperature) over blocks of ids; a warp sums two at a time, sixteen lanes each.
__device__ __forceinline__ void sum_blocks(const float* x, int vocabulary, float greatest, float temperature, double* block_sums) {
  const int blocks = (vocabulary + kSumIds - 1) / kSumIds;
  const int lane = threadIdx.x % 32;
  for (int pair = threadIdx.x / 32; 2 * pair < blocks; pair += kDrawThreads / 32) {
    const int block = 2 * pair + lane / 16;
    float sum = 0.0f;
    for (int i = lane % 16; i < kSumIds; i += 16) {
      const int id = block * kSumIds + i;
      if (id < vocabulary) sum += fixed_exp((x[id] - greatest) / temperature);
    }
    // The tree of tree_sum16.
    for (unsigned distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane % 16 == 0 && block < blocks) block_sums[block] = sum;
  }
  __syncthreads();
}

// In [0, 1), 53 bits.
__device__ __forceinline__ double uniform(const DrawOrder& order) {
  const uint32_t counter[4] = {static_cast<uint32_t>(order.position), static_cast<uint32_t>(order.position >> 32), order.choice, 0};
  const uint32_t key[2] = {static_cast<uint32_t>(order.seed), static_cast<uint32_t>(order.seed >> 32)};
  const Philox random = philox4x32_10(counter, key);
  return (static_cast<double>(random.word[0] >> 5) * 67108864.0 + static_cast<double>(random.word[1] >> 6)) / 9007199254740992.0;
}

// One token of the softmax over all.
__device__ __forceinline__ int32_t draw_from_all(const float* x, int vocabulary, float greatest, const DrawOrder& order, double total,
                                                 const DrawMemory& memory) {
  const double target = uniform(order) * total;
  const int blocks = (vocabulary + kSumIds - 1) / kSumIds;
  double sum = 0.0;
  double start = 0.0;
  int block = -1;
  for (int b = 0; b < blocks; ++b) {
    if (memory.block_sums[b] == 0.0) continue;
    block = b;
    start = sum;
    sum += memory.block_sums[b];
    if (sum > target) break;
  }
  for (int i = threadIdx.x; i < kSumIds; i += kDrawThreads) {
    const int id = block * kSumIds + i;
    memory.weights[i] = id < vocabulary ? fixed_exp((x[id] - greatest) / order.temperature) : 0.0f;
  }
  __syncthreads();
  int32_t token = kNotDrawn;
  sum = start;
  for (int i = 0; i < kSumIds; ++i) {
    if (memory.weights[i] == 0.0f) continue;
    token = block * kSumIds + i;
    sum += memory.weights[i];
    if (sum > target) break;
  }
  return token;
}

// The `count` first candidates, in order, and their weights.
__device__ __forceinline__ void select_candidates(const float* x, int vocabulary, int count, float greatest, float temperature,
                                                  const DrawMemory& memory) {
  // The rank of the last of them, a byte at a time.
  uint32_t prefix = 0;
  uint32_t left = count;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kDrawThreads) memory.counts[i] = 0;
    __syncthreads();
    const uint32_t above = shift == 24 ? 0u : 0xffffffffu << (shift + 8);
    for (int id = threadIdx.x; id < vocabulary; id += kDrawThreads) {
      const uint32_t rank = rank_of(x[id]);
      if ((rank & above) == prefix) atomicAdd(&memory.counts[rank >> shift & 255u], 1u);
    }
    __syncthreads();
    uint32_t byte = 255;
    while (memory.counts[byte] < left) left -= memory.counts[byte--];
    prefix |= byte << shift;
    __syncthreads();
  }
  // All above it, and of its equals the `left` with the lowest ids.
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  uint32_t equals = 0;
  if (threadIdx.x == 0) memory.words[kDrawThreads / 32] = 0;
  for (int first = 0; first < vocabulary; first += kDrawThreads) {
    const int id = first + threadIdx.x;
    const uint32_t rank = id < vocabulary ? rank_of(x[id]) : 0;
    const bool equal = id < vocabulary && rank == prefix;
    const uint32_t votes = __ballot_sync(kAllLanes, equal);
    if (lane == 0) memory.words[warp] = __popc(votes);
    __syncthreads();
    uint32_t before = equals + __popc(votes & ((1u << lane) - 1u));
    for (int w = 0; w < kDrawThreads / 32; ++w) {
      if (w < warp) before += memory.words[w];
      equals += memory.words[w];
    }
    if (id < vocabulary && (rank > prefix || (equal && before < left))) {
      const uint32_t at = atomicAdd(&memory.words[kDrawThreads / 32], 1u);
      memory.candidates[at] = uint64_t{rank} << 32 | (0xffffffffu - static_cast<uint32_t>(id));
    }
    __syncthreads();
  }
  // Bitonic sort (Batcher 1968), greatest first; what is beyond the candidates comes last.
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kDrawThreads) memory.candidates[i] = 0;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {
    for (int distance = width / 2; distance > 0; distance /= 2) {
      for (int i = threadIdx.x; i < size; i += kDrawThreads) {
        const int other = i ^ distance;
        if (other <= i) continue;
        const uint64_t a = memory.candidates[i];
        const uint64_t b = memory.candidates[other];
        if ((i & width) == 0 ? a < b : a > b) {
          memory.candidates[i] = b;
          memory.candidates[other] = a;
        }
      }
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < count; i += kDrawThreads) {
    const float logit = logit_of(static_cast<uint32_t>(memory.candidates[i] >> 32));
    memory.weights[i] = fixed_exp((logit - greatest) / temperature);
  }
  __syncthreads();
}

// How many of the candidates top-k and top-p leave; -1 where that cannot be said. By one thread.
__device__ __forceinline__ int count_kept(int count, int vocabulary, float greatest, const DrawOrder& order, double total,
                                          const DrawMemory& memory) {
  const float* weights = memory.weights;
  const bool all = count == vocabulary;
  if (order.top_k > 0 && order.top_k < vocabulary) {
    if (order.top_p < 1.0f) {
      double of_these = 0.0;
      for (int i = 0; i < count; ++i) of_these += weights[i];
      total = order.top_p * of_these;
    }
    double sum = 0.0;
    for (int i = 0; i < count; ++i) {
      if (weights[i] == 0.0f) return i;
      sum += weights[i];
      if (order.top_p < 1.0f && sum >= total) return i + 1;
    }
    return count;
  }
  if (order.top_p < 1.0f) {
    const double wanted = order.top_p * total;
    const float least = greatest - 90.0f * order.temperature;
    double sum = 0.0;
    for (int i = 0; i < count; ++i) {
      if (!(logit_of(static_cast<uint32_t>(memory.candidates[i] >> 32)) >= least)) return i;
      sum += weights[i];
      if (sum >= wanted) return i + 1;
    }
    return all ? count : -1;
  }
  // Only min-p: weights next to each other may be a rounding out of order.
  return all || weights[count - 1] < 0.999f * order.min_p ? count : -1;
}

__device__ __forceinline__ int32_t draw_from_some(int count, int vocabulary, float greatest, const DrawOrder& order, double total,
                                                  const DrawMemory& memory) {
  const int most = count_kept(count, vocabulary, greatest, order, total, memory);
  if (most < 0) return kTooMany;
  const bool min_p_only = (order.top_k <= 0 || order.top_k >= vocabulary) && order.top_p >= 1.0f;
  const auto token = [&](int i) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(memory.candidates[i])); };
  // Where only min-p chooses, a weight below it is passed over; elsewhere it ends the candidates.
  double kept = 0.0;
  int end = 0;
  for (; end < most; ++end) {
    if (end > 0 && !(memory.weights[end] >= order.min_p)) {
      if (!min_p_only) break;
      continue;
    }
    kept += memory.weights[end];
  }
  const double target = uniform(order) * kept;
  double sum = 0.0;
  int last = 0;
  for (int i = 0; i < end; ++i) {
    if (i > 0 && !(memory.weights[i] >= order.min_p)) continue;
    last = i;
    sum += memory.weights[i];
    if (sum > target) break;
  }
  return token(last);
}

// blockIdx.x: order.
__global__ void __launch_bounds__(kDrawThreads)
    draw_tokens_kernel(const float* __restrict__ logits, size_t stride, int vocabulary, const DrawOrder* __restrict__ orders, int32_t* tokens) {
  begin_kernel();
  PENSTOCK_SHARED(shared);
  DrawMemory memory;
  memory.block_sums = reinterpret_cast<double*>(shared);
  memory.candidates = reinterpret_cast<uint64_t*>(memory.block_sums + (vocabulary + kSumIds - 1) / kSumIds);
  memory.weights = reinterpret_cast<float*>(memory.candidates + kMostCandidates);
  memory.counts = reinterpret_cast<uint32_t*>(memory.weights + kMostCandidates);
  memory.words = memory.counts + 256;
  const DrawOrder order = orders[blockIdx.x];
  const float* x = logits + order.row * stride;

  // The first of all candidates: of equals the one with the lowest id.
  unsigned long long first = 0;
  uint32_t magnitude = 0;
#pragma unroll 4
  for (int id = threadIdx.x; id < vocabulary; id += kDrawThreads) {
    const float logit = x[id];
    const unsigned long long here = static_cast<unsigned long long>(rank_of(logit)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
    const uint32_t bits = bits_of(logit) & 0x7fffffffu;
    first = here > first ? here : first;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  first = block_max(first, reinterpret_cast<unsigned long long*>(memory.words));
  const bool finite = block_max(magnitude, memory.words) < 0x7f800000u;
  int32_t token = kNotDrawn;
  if (!finite) {
    token = kNotFinite;
  } else if (order.wanted != 0) {
    const float greatest = logit_of(static_cast<uint32_t>(first >> 32));
    if (order.temperature < kGreedyBelow) {
      token = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(first));
    } else {
      const bool chooses_k = order.top_k > 0 && order.top_k < vocabulary;
      double total = 0.0;
      if (!chooses_k) {
        sum_blocks(x, vocabulary, greatest, order.temperature, memory.block_sums);
        for (int b = 0; b < (vocabulary + kSumIds - 1) / kSumIds; ++b) total += memory.block_sums[b];
      }
      if (!chooses_k && order.top_p >= 1.0f && order.min_p <= 0.0f) {
        token = draw_from_all(x, vocabulary, greatest, order, total, memory);
      } else if (chooses_k && order.top_k > kMostCandidates) {
        token = kTooMany;
      } else {
        const int count = chooses_k ? order.top_k : vocabulary < kMostCandidates ? vocabulary : kMostCandidates;
        select_candidates(x, vocabulary, count, greatest, order.temperature, memory);
        if (threadIdx.x == 0) token = draw_from_some(count, vocabulary, greatest, order, total, memory);
      }
    }
  }
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

}  // namespace penstock::cuda
