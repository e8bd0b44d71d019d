#include "crc32c.h"

#include <array>

#include "processor.h"

namespace penstock {

namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// [distance][byte] what a byte adds that has so many more behind it in its eight.
constexpr Tables make_tables() {
  Tables tables = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? kCrc32cPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (int distance = 1; distance < 8; ++distance) {
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t crc = tables[distance - 1][byte];
      tables[distance][byte] = (crc >> 8) ^ tables[0][crc & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

uint32_t crc32c_reference(const uint8_t* bytes, size_t length, uint32_t seed) {
  uint32_t crc = ~seed;
  for (; length >= 8; bytes += 8, length -= 8) {
    uint32_t next = 0;
    for (int i = 0; i < 4; ++i) next ^= kTables[7 - i][bytes[i] ^ ((crc >> (8 * i)) & 0xff)];
    for (int i = 4; i < 8; ++i) next ^= kTables[7 - i][bytes[i]];
    crc = next;
  }
  for (; length > 0; ++bytes, --length) crc = (crc >> 8) ^ kTables[0][(crc ^ *bytes) & 0xff];
  return ~crc;
}

Crc32c select_crc32c(InstructionSet ceiling) {
#if defined(PENSTOCK_X86)
  if (ceiling >= InstructionSet::Avx512 && processor().vpclmulqdq) return crc32c_vpclmulqdq;
  if (ceiling >= InstructionSet::Avx2 && processor().pclmulqdq) return crc32c_pclmulqdq;
#endif
  (void)ceiling;
  return crc32c_reference;
}

}  // namespace penstock
