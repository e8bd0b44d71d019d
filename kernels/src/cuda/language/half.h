// Halves as bits: one in a uint16_t, two in a uint32_t, the first in the lower half.
#pragma once

#include "language.h"

#if !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace penstock::cuda {

#if defined(__CUDACC__)

__device__ __forceinline__ __half2 half2_of_bits(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
__device__ __forceinline__ uint32_t bits_of_half2(__half2 value) { return *reinterpret_cast<const uint32_t*>(&value); }

__device__ __forceinline__ float half_to_float(uint16_t half) { return __half2float(__ushort_as_half(half)); }
__device__ __forceinline__ uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ uint32_t half2_of(float first, float second) { return bits_of_half2(__floats2half2_rn(first, second)); }
__device__ __forceinline__ uint32_t half2_sub(uint32_t a, uint32_t b) {
  return bits_of_half2(__hsub2(half2_of_bits(a), half2_of_bits(b)));
}
__device__ __forceinline__ uint32_t half2_mul(uint32_t a, uint32_t b) {
  return bits_of_half2(__hmul2_rn(half2_of_bits(a), half2_of_bits(b)));
}
__device__ __forceinline__ uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return bits_of_half2(__hfma2(half2_of_bits(a), half2_of_bits(b), half2_of_bits(c)));
}
// Bytes of (a, b), numbered 0 … 7 from a's lowest; nibble i of `selector` chooses byte i of the result.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

#else

inline float half_to_float(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t float_to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline uint32_t half2_of(float first, float second) { return float_to_half(first) | uint32_t{float_to_half(second)} << 16; }

template <class Operation>
inline uint32_t for_both(uint32_t a, uint32_t b, uint32_t c, Operation operation) {
  const auto of = [](uint32_t bits, int i) { return half_to_float(static_cast<uint16_t>(bits >> 16 * i)); };
  return half2_of(operation(of(a, 0), of(b, 0), of(c, 0)), operation(of(a, 1), of(b, 1), of(c, 1)));
}
inline uint32_t half2_sub(uint32_t a, uint32_t b) {
  return for_both(a, b, 0, [](float x, float y, float) { return x - y; });
}
inline uint32_t half2_mul(uint32_t a, uint32_t b) {
  return for_both(a, b, 0, [](float x, float y, float) { return x * y; });
}
// The product is exact in a float; that the sum is rounded to a float before it is rounded to a half may, for one sum in
// thousands, give the other of two halves that are as near.
inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  return for_both(a, b, c, [](float x, float y, float z) { return std::fma(x, y, z); });
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

#endif

__device__ __forceinline__ uint32_t half2_twice(uint16_t half) { return half | uint32_t{half} << 16; }

}  // namespace penstock::cuda
