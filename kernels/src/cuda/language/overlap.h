// Kernels of a stream overlap at their ends: one begins while the last blocks of the one before it run (programmatic dependent launch,
// from compute capability 9.0 on; elsewhere one after the other, and these do nothing).
//
// Every thread of every kernel calls `await_previous`, which returns when all that was put onto the stream before is done and seen.
// Until then it may read what nobody writes, which is weights and its arguments, and nothing else. The shim reports a thread that ends
// without it: the kernel after the next would count on it in vain.
#pragma once

#include "language.h"

namespace penstock::cuda {

__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void await_previous() {
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
  shim::Block::current().thread().awaited = true;
#endif
}

// How a kernel begins that has nothing to do before.
__device__ __forceinline__ void begin_kernel() {
  let_next_begin();
  await_previous();
}

}  // namespace penstock::cuda
