// CRC-32C by carry-less multiplication: four pieces of 128 bits are carried along the message, and the crc32 instruction brings
// what is left of them to 32 bits.
#include <immintrin.h>

#include <cstring>

#include "crc32c.h"

namespace penstock {

namespace {

inline __m128i load(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }

inline __m128i constants(Crc32cFold fold) {
  return _mm_set_epi64x(static_cast<long long>(fold.second), static_cast<long long>(fold.first));
}

// `piece`, moved on to where `next` is.
inline __m128i fold(__m128i piece, __m128i by, __m128i next) {
  return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(piece, by, 0x00), _mm_clmulepi64_si128(piece, by, 0x11)), next);
}

}  // namespace

uint32_t crc32c_pclmulqdq(const uint8_t* bytes, size_t length, uint32_t seed) {
  uint64_t crc = static_cast<uint32_t>(~seed);
  if (length >= 64) {
    constexpr Crc32cFold kFar = crc32c_fold(512), kNear = crc32c_fold(128);
    const __m128i far = constants(kFar);
    const __m128i near = constants(kNear);
    __m128i a = _mm_xor_si128(load(bytes), _mm_cvtsi32_si128(static_cast<int>(crc)));
    __m128i b = load(bytes + 16);
    __m128i c = load(bytes + 32);
    __m128i d = load(bytes + 48);
    for (bytes += 64, length -= 64; length >= 64; bytes += 64, length -= 64) {
      a = fold(a, far, load(bytes));
      b = fold(b, far, load(bytes + 16));
      c = fold(c, far, load(bytes + 32));
      d = fold(d, far, load(bytes + 48));
    }
    d = fold(fold(fold(a, near, b), near, c), near, d);
    for (; length >= 16; bytes += 16, length -= 16) d = fold(d, near, load(bytes));
    crc = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(d)));
    crc = _mm_crc32_u64(crc, static_cast<uint64_t>(_mm_extract_epi64(d, 1)));
  }
  for (; length >= 8; bytes += 8, length -= 8) {
    uint64_t word;
    std::memcpy(&word, bytes, 8);
    crc = _mm_crc32_u64(crc, word);
  }
  uint32_t end = static_cast<uint32_t>(crc);
  for (; length > 0; ++bytes, --length) end = _mm_crc32_u8(end, *bytes);
  return ~end;
}

}  // namespace penstock
