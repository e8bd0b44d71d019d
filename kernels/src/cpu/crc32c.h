// CRC-32C (Castagnoli), the checksum of iSCSI (RFC 3720, appendix B.4): of bytes on the wire.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace penstock {

// The CRC of `bytes` that follow what `seed` is the CRC of; 0 for the first. crc(b, crc(a, 0)) == crc(a and b, 0).
using Crc32c = uint32_t (*)(const uint8_t* bytes, size_t length, uint32_t seed);

// Tables, eight bytes at a time.
uint32_t crc32c_reference(const uint8_t* bytes, size_t length, uint32_t seed);
#if defined(PENSTOCK_X86)
uint32_t crc32c_pclmulqdq(const uint8_t* bytes, size_t length, uint32_t seed);
uint32_t crc32c_vpclmulqdq(const uint8_t* bytes, size_t length, uint32_t seed);
#endif

// The fastest of this machine that fits under the ceiling.
Crc32c select_crc32c(InstructionSet ceiling);

// 0x1EDC6F41 with its bits turned round, as everything here: the lowest bit is the highest power of x.
constexpr uint32_t kCrc32cPolynomial = 0x82f63b78;

// x^exponent modulo the polynomial.
constexpr uint32_t crc32c_power(int exponent) {
  uint32_t power = 0x80000000;
  for (int i = 0; i < exponent; ++i) power = (power >> 1) ^ ((power & 1) != 0 ? kCrc32cPolynomial : 0);
  return power;
}

// What the two halves of a 128-bit piece of a message are multiplied with, so that it may be added to the piece `bits` further
// on without changing the remainder ("Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009).
// The half that comes first is worth x^64 more. A power has 32 bits in a half of 64, and a product of turned-round numbers
// is short of one x: together they are worth x^33.
struct Crc32cFold {
  uint64_t first;
  uint64_t second;
};
constexpr Crc32cFold crc32c_fold(int bits) { return {crc32c_power(bits + 64 - 33), crc32c_power(bits - 33)}; }

}  // namespace penstock
