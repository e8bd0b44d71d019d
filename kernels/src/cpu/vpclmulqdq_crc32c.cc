// CRC-32C by carry-less multiplication on registers of 512 bits: sixteen pieces of 128 bits are carried along the message.
#include <immintrin.h>

#include "crc32c.h"

namespace penstock {

namespace {

inline __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }

// The same for each piece of a register.
inline __m512i constants(Crc32cFold fold) {
  return _mm512_broadcast_i32x4(_mm_set_epi64x(static_cast<long long>(fold.second), static_cast<long long>(fold.first)));
}

inline __m512i fold(__m512i pieces, __m512i by, __m512i next) {
  constexpr int kXor3 = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(pieces, by, 0x00), _mm512_clmulepi64_epi128(pieces, by, 0x11), next,
                                   kXor3);
}

}  // namespace

uint32_t crc32c_vpclmulqdq(const uint8_t* bytes, size_t length, uint32_t seed) {
  if (length < 256) return crc32c_pclmulqdq(bytes, length, seed);
  constexpr Crc32cFold kFar = crc32c_fold(2048), kNear = crc32c_fold(512);
  const __m512i far = constants(kFar);
  const __m512i near = constants(kNear);
  __m512i a = _mm512_xor_si512(load(bytes), _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(~seed))));
  __m512i b = load(bytes + 64);
  __m512i c = load(bytes + 128);
  __m512i d = load(bytes + 192);
  for (bytes += 256, length -= 256; length >= 256; bytes += 256, length -= 256) {
    a = fold(a, far, load(bytes));
    b = fold(b, far, load(bytes + 64));
    c = fold(c, far, load(bytes + 128));
    d = fold(d, far, load(bytes + 192));
  }
  d = fold(fold(fold(a, near, b), near, c), near, d);
  for (; length >= 64; bytes += 64, length -= 64) d = fold(d, near, load(bytes));
  // What is left has the remainder of all that was read: a message of 64 bytes that begins anew.
  alignas(64) uint8_t left[64];
  _mm512_store_si512(left, d);
  return crc32c_pclmulqdq(bytes, length, crc32c_pclmulqdq(left, sizeof left, ~0u));
}

}  // namespace penstock
