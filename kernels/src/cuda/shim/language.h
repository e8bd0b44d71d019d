// What CUDA kernels are written in, for a C++ compiler: the names of CUDA that Penstock's kernels use, on top of block.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__

// Dynamic shared memory, aligned for 16-byte accesses.
#define PENSTOCK_SHARED(name) unsigned char* const name = ::penstock::shim::Block::current().shared()

#define threadIdx (::penstock::shim::Block::current().thread().index)
#define blockIdx (::penstock::shim::Block::current().index())
#define blockDim (::penstock::shim::Block::current().threads())
#define gridDim (::penstock::shim::Block::current().grid())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads() { ::penstock::shim::Block::current().barrier(); }

inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  int nothing = 0;
  ::penstock::shim::Block::current().meet(mask, &nothing, [](void* const*, uint32_t) {}, "__syncwarp");
}

namespace penstock::shim {

template <class T>
struct Shuffle {
  T value;
  unsigned source;
  T result;
};

template <class T>
T shuffle(uint32_t mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T>);
  Shuffle<T> mine = {value, source, value};
  Block::current().meet(
      mask, &mine,
      [](void* const* lanes, uint32_t members) {
        for (unsigned i = 0; i < kWarpLanes; ++i) {
          if ((members >> i & 1) == 0) continue;
          auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
          if ((members >> lane->source & 1) == 0) throw std::runtime_error("a shuffle reads a lane that is not in its mask");
          lane->result = static_cast<const Shuffle<T>*>(lanes[lane->source])->value;
        }
      },
      "a shuffle");
  return mine.result;
}

inline unsigned lane() { return Block::current().thread().lane; }

}  // namespace penstock::shim

template <class T>
inline T __shfl_sync(uint32_t mask, T value, unsigned source) {
  return ::penstock::shim::shuffle(mask, value, source & 31u);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, unsigned distance) {
  return ::penstock::shim::shuffle(mask, value, ::penstock::shim::lane() ^ distance);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned distance) {
  const unsigned lane = ::penstock::shim::lane();
  return ::penstock::shim::shuffle(mask, value, lane >= distance ? lane - distance : lane);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  struct Vote {
    bool yes;
    uint32_t result;
  } mine = {predicate, 0};
  ::penstock::shim::Block::current().meet(
      mask, &mine,
      [](void* const* lanes, uint32_t members) {
        uint32_t votes = 0;
        for (unsigned i = 0; i < 32; ++i) {
          if ((members >> i & 1) != 0 && static_cast<Vote*>(lanes[i])->yes) votes |= 1u << i;
        }
        for (unsigned i = 0; i < 32; ++i) {
          if ((members >> i & 1) != 0) static_cast<Vote*>(lanes[i])->result = votes;
        }
      },
      "__ballot_sync");
  return mine.result;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

// Of integers only: the order of floats added by atomics would be anybody's.
template <class T>
inline T atomicAdd(T* at, T value) {
  static_assert(std::is_integral_v<T>);
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
template <class T>
inline T atomicMax(T* at, T value) {
  static_assert(std::is_unsigned_v<T>);
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }
