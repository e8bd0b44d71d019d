// The language of the kernels: CUDA under nvcc, and under a C++ compiler the shim, which runs the same source on the CPU.
//
// Kernels use what the shim knows and nothing else. All shared memory is dynamic, so that it can be poisoned and bounded.
#pragma once

#if defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define PENSTOCK_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

#else

#include "../shim/language.h"

#endif

namespace penstock::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// The sum over a block's threads, the same for all of them: a butterfly within each warp, then the warps in order. `scratch` is
// shared, a float for each warp; it may be used again after the next barrier.
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  for (unsigned distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += scratch[warp];
  return sum;
}

}  // namespace penstock::cuda
