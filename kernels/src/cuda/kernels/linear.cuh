// Linear layers: halves times packed weights, sums in floats. Which kernel runs depends on the number of rows; no bit does.
#pragma once

#include "../language/async_copy.h"
#include "../language/mma.h"
#include "weights.cuh"

namespace penstock::cuda {

constexpr int kTileRows = 8;  // rows of one mma

// Few rows: the weights' bytes are what takes time. A block computes a panel for Tiles * 8 rows; its warps take slices in turn.
constexpr int kFewRowsWarps = 8;

template <WeightKind kind, int Tiles>
__global__ void __launch_bounds__(kFewRowsWarps * 32)
    linear_few_rows_kernel(const Products products, const uint16_t* __restrict__ x, size_t x_stride, int rows) {
  PENSTOCK_SHARED(shared);
  float4* partial = reinterpret_cast<float4*>(shared);  // [slices, Tiles, lanes]
  int panel = blockIdx.x;
  int which = 0;
  while (panel >= products.product[which].matrix.panels) panel -= products.product[which++].matrix.panels;
  const DeviceMatrix& matrix = products.product[which].matrix;
  const int first_row = blockIdx.y * (Tiles * kTileRows);
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;

  for (int slice = threadIdx.x / 32; slice < matrix.slices(); slice += kFewRowsWarps) {
    const int first = slice * kSliceChunks;
    const int chunks = matrix.chunks - first < kSliceChunks ? matrix.chunks - first : kSliceChunks;
    // All loads of a slice before its first product, so that enough bytes are under way.
    ChunkOfPanel<kind> weights[kSliceChunks];
#pragma unroll
    for (int c = 0; c < kSliceChunks; ++c) {
      if (c < chunks) weights[c].load(matrix, panel, first + c);
    }
    float sums[Tiles][4] = {};
#pragma unroll
    for (int c = 0; c < kSliceChunks; ++c) {
      if (c < chunks) {
        uint4 input[Tiles][2];
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const int row = first_row + tile * kTileRows + g;
          input[tile][0] = input[tile][1] = make_uint4(0, 0, 0, 0);
          if (row < rows) {
            const uint4* from = reinterpret_cast<const uint4*>(x + row * x_stride + (first + c) * kChunkInputs + 16 * t);
            input[tile][0] = from[0];
            input[tile][1] = from[1];
          }
        }
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          uint32_t a[4];
          weights[c].fragment(step, a);
#pragma unroll
          for (int tile = 0; tile < Tiles; ++tile) {
            const uint4 words = input[tile][step / 2];
            if (step % 2 == 0) {
              mma_m16n8k16(sums[tile], a, words.x, words.y);
            } else {
              mma_m16n8k16(sums[tile], a, words.z, words.w);
            }
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
      partial[(slice * Tiles + tile) * 32 + lane] = {sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]};
  }
  __syncthreads();

  const float* slices = reinterpret_cast<const float*>(shared);  // [slices, Tiles, lanes, 4]
  for (int i = threadIdx.x; i < Tiles * 128; i += kFewRowsWarps * 32) {
    float sum = 0.0f;
    for (int slice = 0; slice < matrix.slices(); ++slice) sum += slices[slice * Tiles * 128 + i];
    const int of_lane = i / 4 % 32;
    const int output = panel * kPanelOutputs + of_lane / 4 + i % 4 / 2 * 8;
    const int row = first_row + i / 128 * kTileRows + of_lane % 4 * 2 + i % 2;
    if (row < rows && output < matrix.outputs) products.product[which].out[row * products.product[which].stride + output] = sum;
  }
}

// Many rows: a block computes 8 panels for 64 rows. Inputs go through shared memory, a chunk while the one before is multiplied;
// weights go from global memory to the registers of the only warp that needs them.
constexpr int kManyRowsWarps = 4;
constexpr int kPanelsOfWarp = 2;
constexpr int kManyRows = 64;
constexpr int kInputStride = kChunkInputs + 8;  // halves; 16 bytes more, so that rows fall into different banks
constexpr size_t kManyRowsShared = size_t{2} * kManyRows * kInputStride * sizeof(uint16_t);

template <WeightKind kind>
__global__ void __launch_bounds__(kManyRowsWarps * 32)
    linear_many_rows_kernel(const Products products, const uint16_t* __restrict__ x, size_t x_stride, int rows) {
  constexpr int kTiles = kManyRows / kTileRows;
  constexpr int kPanelsOfBlock = kManyRowsWarps * kPanelsOfWarp;
  PENSTOCK_SHARED(shared);
  uint16_t* inputs = reinterpret_cast<uint16_t*>(shared);  // [2, kManyRows, kInputStride]
  int block = blockIdx.x;
  int which = 0;
  for (;; ++which) {
    const int blocks = (products.product[which].matrix.panels + kPanelsOfBlock - 1) / kPanelsOfBlock;
    if (block < blocks) break;
    block -= blocks;
  }
  const DeviceMatrix& matrix = products.product[which].matrix;
  const int first_panel = block * kPanelsOfBlock + threadIdx.x / 32 * kPanelsOfWarp;
  const int first_row = blockIdx.y * kManyRows;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;

  const auto begin_inputs = [&](int chunk) {
    uint16_t* into = inputs + chunk % 2 * (kManyRows * kInputStride);
    for (int i = threadIdx.x; i < kManyRows * 8; i += kManyRowsWarps * 32) {
      const int row = first_row + i / 8;
      copy_async16(into + i / 8 * kInputStride + i % 8 * 8, x + row * x_stride + chunk * kChunkInputs + i % 8 * 8, row < rows);
    }
    close_copy_group();
  };

  ChunkOfPanel<kind> weights[kPanelsOfWarp];
  const auto load_weights = [&](int chunk) {
#pragma unroll
    for (int p = 0; p < kPanelsOfWarp; ++p) {
      // Beyond the last panel the last one is read again; what comes of it is not written.
      const int panel = first_panel + p < matrix.panels ? first_panel + p : matrix.panels - 1;
      weights[p].load(matrix, panel, chunk);
    }
  };

  float totals[kPanelsOfWarp][kTiles][4] = {};
  float sums[kPanelsOfWarp][kTiles][4] = {};
  begin_inputs(0);
  load_weights(0);
  for (int chunk = 0; chunk < matrix.chunks; ++chunk) {
    const bool more = chunk + 1 < matrix.chunks;
    if (more) begin_inputs(chunk + 1);
    ChunkOfPanel<kind> now[kPanelsOfWarp];
#pragma unroll
    for (int p = 0; p < kPanelsOfWarp; ++p) now[p] = weights[p];
    if (more) {
      load_weights(chunk + 1);
      await_copies<1>();
    } else {
      await_copies<0>();
    }
    __syncthreads();
    const uint16_t* rows_here = inputs + chunk % 2 * (kManyRows * kInputStride) + g * kInputStride + 16 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // two steps
      uint32_t a[kPanelsOfWarp][2][4];
#pragma unroll
      for (int p = 0; p < kPanelsOfWarp; ++p) {
        now[p].fragment(2 * half, a[p][0]);
        now[p].fragment(2 * half + 1, a[p][1]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 words = *reinterpret_cast<const uint4*>(rows_here + tile * (kTileRows * kInputStride) + 8 * half);
#pragma unroll
        for (int p = 0; p < kPanelsOfWarp; ++p) {
          mma_m16n8k16(sums[p][tile], a[p][0], words.x, words.y);
          mma_m16n8k16(sums[p][tile], a[p][1], words.z, words.w);
        }
      }
    }
    if (chunk % kSliceChunks == kSliceChunks - 1 || !more) {
#pragma unroll
      for (int p = 0; p < kPanelsOfWarp; ++p) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            totals[p][tile][i] += sums[p][tile][i];
            sums[p][tile][i] = 0.0f;
          }
        }
      }
    }
    __syncthreads();  // before the chunk after the next overwrites these inputs
  }

#pragma unroll
  for (int p = 0; p < kPanelsOfWarp; ++p) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int output = (first_panel + p) * kPanelOutputs + g + i / 2 * 8;
        const int row = first_row + tile * kTileRows + 2 * t + i % 2;
        if (row < rows && first_panel + p < matrix.panels && output < matrix.outputs)
          products.product[which].out[row * products.product[which].stride + output] = totals[p][tile][i];
      }
    }
  }
}

}  // namespace penstock::cuda
