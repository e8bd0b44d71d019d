// Copies from global to shared memory that go on while a thread computes: cp.async. The shim carries them out when they are waited
// for and not before in one half of the blocks, so that a wait that is missing shows, and at once in the other, so that it shows
// where they begin while others still read what was there.
#pragma once

#include "language.h"

namespace penstock::cuda {

// 16 bytes, both addresses aligned to that; zeros where `there` is false, and `from` is not read then.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool there) {
#if defined(__CUDACC__)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
#else
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (there && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    throw std::runtime_error("cp.async: an address is not aligned to 16 bytes");
  shim::Thread& thread = shim::Block::current().thread();
  thread.copies.push_back({to, there ? from : nullptr, 16, thread.copy_group});
  if (shim::Block::current().copies_early()) thread.copies.back().carry_out();
#endif
}

// What a thread has begun to copy since it last did this becomes a group.
__device__ __forceinline__ void close_copy_group() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ++shim::Block::current().thread().copy_group;
#endif
}

// Waits until at most `Later` groups of this thread are under way. Others see its copies after the next barrier.
template <int Later>
__device__ __forceinline__ void await_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(Later) : "memory");
#else
  shim::Thread& thread = shim::Block::current().thread();
  size_t done = 0;
  for (const shim::PendingCopy& copy : thread.copies) {
    if (copy.group + Later >= thread.copy_group) break;
    if (!shim::Block::current().copies_early()) copy.carry_out();
    ++done;
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
#endif
}

}  // namespace penstock::cuda
