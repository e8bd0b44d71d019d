// Linear layers: halves times packed weights, sums in floats. Which kernel runs depends on the number of rows; no bit does.
#pragma once

#include "../language/async_copy.h"
#include "../language/mma.h"
#include "../language/overlap.h"
#include "weights.cuh"

namespace penstock::cuda {

constexpr int kTileRows = 8;  // rows of one mma

// Few rows: the weights' bytes are what takes time. A block computes a panel for Tiles * 8 rows; its warps take slices in turn. Each
// warp has a ring of chunks in shared memory, all of which are under way before the first is multiplied. What is done for a chunk is
// written out for each of a slice's, so that all offsets are constants: at four bits a weight, instructions are as scarce as bytes.
constexpr int kFewRowsWarps = 8;
constexpr int few_rows_ring(WeightKind kind) { return level_bits(kind) == 4 ? 8 : level_bits(kind) == 8 ? 4 : 2; }

// A ring, and the numbers of two slices.
template <WeightKind kind>
constexpr int few_rows_ring_bytes() {
  return few_rows_ring(kind) * ChunkOfPanel<kind>::kLevelBytes + 2 * ChunkOfPanel<kind>::kSliceNumberBytes;
}
template <WeightKind kind, int Tiles>
constexpr size_t few_rows_shared_bytes(int slices) {
  return size_t(kFewRowsWarps) * few_rows_ring_bytes<kind>() + size_t(slices) * Tiles * 512;
}

template <WeightKind kind, int Tiles>
__global__ void __launch_bounds__(kFewRowsWarps * 32, Tiles == 1 ? 4 : 3)
    linear_few_rows_kernel(const Products products, const uint16_t* __restrict__ x, size_t x_stride, int rows) {
  using Chunk = ChunkOfPanel<kind>;
  constexpr int kRing = few_rows_ring(kind);
  constexpr int kSliceInputs = kSliceChunks * kChunkInputs;
  let_next_begin();
  PENSTOCK_SHARED(shared);
  int panel = blockIdx.x;
  int which = 0;
  while (panel >= products.product[which].matrix.panels) panel -= products.product[which++].matrix.panels;
  const DeviceMatrix& matrix = products.product[which].matrix;
  const int chunks = matrix.chunks;
  const int slices = matrix.slices();
  const int first_row = blockIdx.y * (Tiles * kTileRows);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  unsigned char* const ring = shared + warp * few_rows_ring_bytes<kind>();  // [kRing] levels
  unsigned char* const numbers_ring = ring + kRing * Chunk::kLevelBytes;    // [2] numbers of a slice
  float4* const partial = reinterpret_cast<float4*>(shared + kFewRowsWarps * few_rows_ring_bytes<kind>());  // [slices, Tiles, lanes]

  int slice = warp;
  const auto chunks_of = [&](int of) { return chunks - of * kSliceChunks < kSliceChunks ? chunks - of * kSliceChunks : kSliceChunks; };
  int left = chunks_of(slice);
  const uint8_t* levels = Chunk::levels_of(matrix, panel, slice * kSliceChunks) + lane * 16;
  const uint8_t* numbers = reinterpret_cast<const uint8_t*>(Chunk::numbers_of(matrix, panel, slice * kSliceChunks)) + lane * 16;
  constexpr int kLevelsOn = kFewRowsWarps * kSliceChunks * Chunk::kLevelBytes;  // to the warp's next slice
  constexpr int kNumbersOn = kFewRowsWarps * Chunk::kSliceNumberBytes;
  const auto begin_levels = [&](int slot, const uint8_t* from) {
#pragma unroll
    for (int plane = 0; plane < planes(kind); ++plane) copy_async16(ring + slot * Chunk::kLevelBytes + plane * 512 + lane * 16, from + plane * 512, true);
  };
  const auto begin_numbers = [&](int parity, const uint8_t* from, int chunks_there) {
#pragma unroll
    for (int at = 0; at < Chunk::kSliceNumberBytes; at += 512) {
      if (at + lane * 16 < Chunk::number_bytes(chunks_there - 1) + Chunk::kNumberBytes)
        copy_async16(numbers_ring + parity * Chunk::kSliceNumberBytes + at + lane * 16, from + at, true);
    }
  };
  if (left > 0) begin_numbers(0, numbers, left);
#pragma unroll
  for (int c = 0; c < kRing; ++c) {
    if (c < left) begin_levels(c, levels + c * Chunk::kLevelBytes);
    close_copy_group();
  }
  await_previous();

  // Where there is no row the last one is read: what comes of it is not written.
  const uint16_t* inputs[Tiles];
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) {
    const int row = first_row + tile * kTileRows + lane / 4;
    inputs[tile] = x + (row < rows ? row : rows - 1) * x_stride + slice * kSliceInputs + lane % 4 * 16;
  }
  uint4 next[Tiles][2];
  const auto load_inputs = [&](int offset) {
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const uint4* from = reinterpret_cast<const uint4*>(inputs[tile] + offset);
      next[tile][0] = from[0];
      next[tile][1] = from[1];
    }
  };
  if (left > 0) load_inputs(0);
  for (int parity = 0; left > 0; parity ^= 1) {
    const int left_next = chunks_of(slice + kFewRowsWarps);
    float sums[Tiles][4] = {};
#pragma unroll
    for (int c = 0; c < kSliceChunks; ++c) {
      if (c >= left) break;
      uint4 now[Tiles][2];
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) now[tile][0] = next[tile][0], now[tile][1] = next[tile][1];
      if (c + 1 < kSliceChunks) {
        if (c + 1 < left) load_inputs((c + 1) * kChunkInputs);
      } else if (left_next > 0) {
        load_inputs(kFewRowsWarps * kSliceInputs);
      }
      await_copies<kRing - 1>();
      __syncwarp();
      Chunk weights;
      weights.load(ring + c % kRing * Chunk::kLevelBytes,
                   reinterpret_cast<const uint16_t*>(numbers_ring + parity * Chunk::kSliceNumberBytes + Chunk::number_bytes(c)));
      __syncwarp();
      if (c == 0 && left_next > 0) begin_numbers(parity ^ 1, numbers + kNumbersOn, left_next);
      if (c + kRing < kSliceChunks) {
        if (c + kRing < left) begin_levels(c % kRing, levels + (c + kRing) * Chunk::kLevelBytes);
      } else if (c + kRing - kSliceChunks < left_next) {
        begin_levels(c % kRing, levels + kLevelsOn + (c + kRing - kSliceChunks) * Chunk::kLevelBytes);
      }
      close_copy_group();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t a[4];
        weights.fragment(step, a);
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const uint4 words = now[tile][step / 2];
          if (step % 2 == 0) {
            mma_m16n8k16(sums[tile], a, words.x, words.y);
          } else {
            mma_m16n8k16(sums[tile], a, words.z, words.w);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      partial[(slice * Tiles + tile) * 32 + lane] = {sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]};
      inputs[tile] += kFewRowsWarps * kSliceInputs;
    }
    slice += kFewRowsWarps;
    left = left_next;
    levels += kLevelsOn;
    numbers += kNumbersOn;
  }
  __syncthreads();

  const float* sums_of = reinterpret_cast<const float*>(partial);  // [slices, Tiles, lanes, 4]
  for (int i = threadIdx.x; i < Tiles * 128; i += kFewRowsWarps * 32) {
    float sum = 0.0f;
    for (int s = 0; s < slices; ++s) sum += sums_of[s * Tiles * 128 + i];
    const int of_lane = i / 4 % 32;
    const int output = panel * kPanelOutputs + of_lane / 4 + i % 4 / 2 * 8;
    const int row = first_row + i / 128 * kTileRows + of_lane % 4 * 2 + i % 2;
    if (row < rows && output < matrix.outputs) products.product[which].out[row * products.product[which].stride + output] = sum;
  }
}

// Many rows: a block computes 8 panels for 64 rows. Inputs and weights go through shared memory, some chunks ahead of those that are
// multiplied; each weight is read by the only warp that needs it. Where that gives a device too few blocks, blocks share the slices.
constexpr int kManyRowsWarps = 4;
constexpr int kPanelsOfWarp = 2;
constexpr int kManyRows = 64;
constexpr int kInputStride = kChunkInputs + 8;  // halves; 16 bytes more, so that rows fall into different banks
constexpr int kInputBytes = kManyRows * kInputStride * 2;

// Chunks that are in shared memory or on their way.
constexpr int many_rows_stages(WeightKind kind) { return kind == WeightKind::Half ? 3 : 4; }

template <WeightKind kind>
constexpr int many_rows_stage_bytes() {
  return kInputBytes + kManyRowsWarps * kPanelsOfWarp * (ChunkOfPanel<kind>::kLevelBytes + ChunkOfPanel<kind>::kNumberBytes);
}
template <WeightKind kind>
constexpr size_t many_rows_shared_bytes() {
  return size_t(many_rows_stages(kind)) * many_rows_stage_bytes<kind>();
}

constexpr int kPanelsOfBlock = kManyRowsWarps * kPanelsOfWarp;
constexpr int kManyTiles = kManyRows / kTileRows;
// Sums of a slice of a block of up to kManyRows rows: [warps, kPanelsOfWarp, kManyTiles, lanes].
constexpr size_t kPartialOfBlock = size_t{kManyRowsWarps} * kPanelsOfWarp * kManyTiles * 32;

// The product that a block computes a part of, and which part.
struct BlockOfMany {
  int which;
  int block;
};
__device__ __forceinline__ BlockOfMany block_of_many(const Products& products, int block) {
  for (int which = 0;; ++which) {
    const int blocks = (products.product[which].matrix.panels + kPanelsOfBlock - 1) / kPanelsOfBlock;
    if (block < blocks) return {which, block};
    block -= blocks;
  }
}

__device__ __forceinline__ void put_sums(const Product& product, int panel, int first_row, int rows, const float (&sums)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int output = panel * kPanelOutputs + lane / 4 + i / 2 * 8;
    const int row = first_row + lane % 4 * 2 + i % 2;
    if (row < rows && panel < product.matrix.panels && output < product.matrix.outputs) product.out[row * product.stride + output] = sums[i];
  }
}

// blockIdx: (8 panels, 64 rows, some slices). Where `slices_each` is not 0 a block has so many slices, and leaves the sums of each in
// `partial` [slices, blocks, kPartialOfBlock] for add_slices_kernel; there are no more rows than one block's then.
template <WeightKind kind>
__global__ void __launch_bounds__(kManyRowsWarps * 32)
    linear_many_rows_kernel(const Products products, const uint16_t* __restrict__ x, size_t x_stride, int rows, int slices_each, float4* partial) {
  using Chunk = ChunkOfPanel<kind>;
  constexpr int kStages = many_rows_stages(kind);
  let_next_begin();
  PENSTOCK_SHARED(shared);
  const auto [which, block] = block_of_many(products, blockIdx.x);
  const Product& product = products.product[which];
  const DeviceMatrix& matrix = product.matrix;
  const int begin = blockIdx.z * slices_each * kSliceChunks;
  const int end = slices_each > 0 && begin + slices_each * kSliceChunks < matrix.chunks ? begin + slices_each * kSliceChunks : matrix.chunks;
  const int warp = threadIdx.x / 32;
  const int first_panel = block * kPanelsOfBlock + warp * kPanelsOfWarp;
  const int first_row = blockIdx.y * kManyRows;
  const int lane = threadIdx.x % 32;

  // A stage: inputs [kManyRows, kInputStride], levels and numbers of the block's panels.
  const auto stage = [&](int chunk) { return shared + chunk % kStages * many_rows_stage_bytes<kind>(); };
  const int levels_at = kInputBytes + warp * kPanelsOfWarp * Chunk::kLevelBytes;
  const int numbers_at = kInputBytes + kPanelsOfBlock * Chunk::kLevelBytes + warp * kPanelsOfWarp * Chunk::kNumberBytes;
  // A thread copies the same part of a chunk of every kRowsTogether-th row.
  constexpr int kRowsTogether = kManyRowsWarps * 32 / 8;
  const int copied_row = first_row + threadIdx.x / 8;
  const uint16_t* const inputs = x + copied_row * x_stride + threadIdx.x % 8 * 8;
  const int copied_to = (threadIdx.x / 8 * kInputStride + threadIdx.x % 8 * 8) * 2;
  const auto begin_inputs = [&](int chunk) {
    unsigned char* into = stage(chunk) + copied_to;
    const uint16_t* from = inputs + chunk * kChunkInputs;
#pragma unroll
    for (int k = 0; k < kManyRows / kRowsTogether; ++k)
      copy_async16(into + k * kRowsTogether * kInputStride * 2, from + k * kRowsTogether * x_stride, copied_row + k * kRowsTogether < rows);
  };
  const uint8_t* levels[kPanelsOfWarp];
  const uint8_t* numbers[kPanelsOfWarp];
#pragma unroll
  for (int p = 0; p < kPanelsOfWarp; ++p) {
    // Beyond the last panel the last one is read again; what comes of it is not written.
    const int panel = first_panel + p < matrix.panels ? first_panel + p : matrix.panels - 1;
    levels[p] = Chunk::levels_of(matrix, panel, 0) + lane * 16;
    numbers[p] = reinterpret_cast<const uint8_t*>(Chunk::numbers_of(matrix, panel, 0)) + lane * 16;
  }
  const auto begin_weights = [&](int chunk) {
    unsigned char* into = stage(chunk) + lane * 16;
#pragma unroll
    for (int p = 0; p < kPanelsOfWarp; ++p) {
#pragma unroll
      for (int plane = 0; plane < planes(kind); ++plane)
        copy_async16(into + levels_at + p * Chunk::kLevelBytes + plane * 512, levels[p] + chunk * Chunk::kLevelBytes + plane * 512, true);
      if (lane < Chunk::kNumberBytes / 16)
        copy_async16(into + numbers_at + p * Chunk::kNumberBytes, numbers[p] + Chunk::number_bytes(chunk), true);
    }
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) begin_weights(begin + i);
  }
  await_previous();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (begin + i < end) begin_inputs(begin + i);
    close_copy_group();
  }

  float totals[kPanelsOfWarp][kManyTiles][4] = {};
  float sums[kPanelsOfWarp][kManyTiles][4] = {};
  for (int chunk = begin; chunk < end; ++chunk) {
    await_copies<kStages - 2>();
    __syncthreads();  // this chunk is there for all, and all are done with the one before, whose place the next to come takes
    if (chunk + kStages - 1 < end) {
      begin_weights(chunk + kStages - 1);
      begin_inputs(chunk + kStages - 1);
    }
    close_copy_group();
    Chunk weights[kPanelsOfWarp];
#pragma unroll
    for (int p = 0; p < kPanelsOfWarp; ++p)
      weights[p].load(stage(chunk) + levels_at + p * Chunk::kLevelBytes,
                      reinterpret_cast<const uint16_t*>(stage(chunk) + numbers_at + p * Chunk::kNumberBytes));
    const uint16_t* rows_here = reinterpret_cast<const uint16_t*>(stage(chunk)) + lane / 4 * kInputStride + lane % 4 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two steps
      uint32_t a[kPanelsOfWarp][2][4];
#pragma unroll
      for (int p = 0; p < kPanelsOfWarp; ++p) {
        weights[p].fragment(2 * half, a[p][0]);
        weights[p].fragment(2 * half + 1, a[p][1]);
      }
      constexpr int kTogether = 4;  // tiles, so that no mma waits for the one before it
#pragma unroll
      for (int first = 0; first < kManyTiles; first += kTogether) {
        uint4 words[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          words[i] = *reinterpret_cast<const uint4*>(rows_here + (first + i) * (kTileRows * kInputStride) + 8 * half);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
#pragma unroll
          for (int p = 0; p < kPanelsOfWarp; ++p) mma_m16n8k16(sums[p][first + i], a[p][0], words[i].x, words[i].y);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
#pragma unroll
          for (int p = 0; p < kPanelsOfWarp; ++p) mma_m16n8k16(sums[p][first + i], a[p][1], words[i].z, words[i].w);
        }
      }
    }
    if (chunk % kSliceChunks == kSliceChunks - 1 || chunk == end - 1) {
      float4* const leaves = slices_each == 0 ? nullptr
                                              : partial + (size_t(chunk / kSliceChunks) * gridDim.x + blockIdx.x) * kPartialOfBlock +
                                                    warp * (kPanelsOfWarp * kManyTiles * 32) + lane;
#pragma unroll
      for (int p = 0; p < kPanelsOfWarp; ++p) {
#pragma unroll
        for (int tile = 0; tile < kManyTiles; ++tile) {
          if (leaves != nullptr && tile * kTileRows < rows)
            leaves[(p * kManyTiles + tile) * 32] = {sums[p][tile][0], sums[p][tile][1], sums[p][tile][2], sums[p][tile][3]};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            totals[p][tile][i] += sums[p][tile][i];
            sums[p][tile][i] = 0.0f;
          }
        }
      }
    }
  }

  if (slices_each > 0) return;
#pragma unroll
  for (int p = 0; p < kPanelsOfWarp; ++p) {
#pragma unroll
    for (int tile = 0; tile < kManyTiles; ++tile) put_sums(product, first_panel + p, first_row + tile * kTileRows, rows, totals[p][tile]);
  }
}

// blockIdx: (8 panels, 8 rows of one of a warp's panels). Adds what the blocks of slices have left, in order.
__global__ void __launch_bounds__(kManyRowsWarps * 32) add_slices_kernel(const Products products, int rows, const float4* partial) {
  begin_kernel();
  const auto [which, block] = block_of_many(products, blockIdx.x);
  const Product& product = products.product[which];
  const int p = blockIdx.y % kPanelsOfWarp;
  const int tile = blockIdx.y / kPanelsOfWarp;
  const int warp = threadIdx.x / 32;
  const float4* from = partial + blockIdx.x * kPartialOfBlock + ((warp * kPanelsOfWarp + p) * kManyTiles + tile) * 32 + threadIdx.x % 32;
  float sums[4] = {};
#pragma unroll 4
  for (int slice = 0; slice < product.matrix.slices(); ++slice) {
    const float4 more = from[slice * (gridDim.x * kPartialOfBlock)];
    sums[0] += more.x, sums[1] += more.y, sums[2] += more.z, sums[3] += more.w;
  }
  put_sums(product, (block * kManyRowsWarps + warp) * kPanelsOfWarp + p, tile * kTileRows, rows, sums);
}

}  // namespace penstock::cuda
