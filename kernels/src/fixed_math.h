// Elementary functions as fixed sequences of IEEE operations.
//
// Every result of the engine has to be the same bit for bit in the scalar reference, in AVX2 and in AVX-512, on every
// machine and with every C library. So nothing here calls libm but `fma` and `sqrt`, which IEEE 754 defines exactly. The SIMD
// forms (cpu/avx2_math.h, cpu/avx512_math.h) run these very steps lane by lane, with the constants below.
//
// Everything is `static inline`: files compiled for different instruction sets must not share one out-of-line copy.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "portable.h"

namespace penstock {

PENSTOCK_BOTH static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

PENSTOCK_BOTH static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Adding and subtracting 1.5 * 2^23 rounds |x| < 2^22 to the nearest integer, and leaves that integer in the low bits.
constexpr float kRoundingShift = 12582912.0f;

// The steps of exp; the polynomial is Cephes' expf (Moshier), relative error about 2^-23.
struct ExpConstants {
  static constexpr float lowest = -87.3f;   // below: exactly 0; e^-87.3 is still a normal float
  static constexpr float highest = 88.37f;  // above: infinity
  static constexpr float log2e = 1.44269504088896341f;
  static constexpr float ln2_high = 0.693359375f;
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float p5 = 1.9875691500e-4f;
  static constexpr float p4 = 1.3981999507e-3f;
  static constexpr float p3 = 8.3334519073e-3f;
  static constexpr float p2 = 4.1665795894e-2f;
  static constexpr float p1 = 1.6666665459e-1f;
  static constexpr float p0 = 5.0000001201e-1f;
};

// e^x. 0 below -87.3, infinity above 88.37, NaN for NaN.
PENSTOCK_BOTH static inline float fixed_exp(float x) {
  using C = ExpConstants;
  if (x != x) return x;
  if (x < C::lowest) return 0.0f;
  if (x > C::highest) return std::numeric_limits<float>::infinity();
  const float shifted = std::fma(x, C::log2e, kRoundingShift);
  const float n = shifted - kRoundingShift;
  float r = std::fma(-n, C::ln2_high, x);
  r = std::fma(-n, C::ln2_low, r);
  float p = C::p5;
  p = std::fma(p, r, C::p4);
  p = std::fma(p, r, C::p3);
  p = std::fma(p, r, C::p2);
  p = std::fma(p, r, C::p1);
  p = std::fma(p, r, C::p0);
  p = std::fma(p, r, 1.0f);
  p = std::fma(p, r, 1.0f);
  // n is in -126 … 127 and p in [0.7, 1.42], so adding n to the exponent neither over- nor underflows into the sign.
  return float_of(bits_of(p) + ((bits_of(shifted) - bits_of(kRoundingShift)) << 23));
}

// Natural logarithm; the polynomial is Cephes' logf. -infinity at 0, NaN below. Subnormal arguments are exact.
static inline float fixed_log(float x) {
  if (!(x >= 0.0f)) return std::numeric_limits<float>::quiet_NaN();
  if (x == 0.0f) return -std::numeric_limits<float>::infinity();
  if (x == std::numeric_limits<float>::infinity()) return x;
  float e = 0.0f;
  if (x < std::numeric_limits<float>::min()) {
    x *= 8388608.0f;  // 2^23
    e = -23.0f;
  }
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const uint32_t bits = bits_of(x) - 0x3f3504f3u;  // 0x3f3504f3: sqrt(1/2)
  e += static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = float_of((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const float f2 = f * f;
  float p = 7.0376836292e-2f;
  p = std::fma(p, f, -1.1514610310e-1f);
  p = std::fma(p, f, 1.1676998740e-1f);
  p = std::fma(p, f, -1.2420140846e-1f);
  p = std::fma(p, f, 1.4249322787e-1f);
  p = std::fma(p, f, -1.6668057665e-1f);
  p = std::fma(p, f, 2.0000714765e-1f);
  p = std::fma(p, f, -2.4999993993e-1f);
  p = std::fma(p, f, 3.3333331174e-1f);
  float y = p * f * f2;
  y = std::fma(e, -2.12194440e-4f, y);
  y = std::fma(-0.5f, f2, y);
  return std::fma(e, 0.693359375f, f + y);
}

// Double forms for the few values per row that the rotary embedding needs; far more exact than the floats they become.
static inline double fixed_exp(double x) {
  const double n = std::fma(x, 1.4426950408889634074, 6755399441055744.0) - 6755399441055744.0;
  double r = std::fma(-n, 6.93147180369123816490e-1, x);
  r = std::fma(-n, 1.90821492927058770002e-10, r);
  double p = 1.0;  // Taylor to r^13 by Horner: |r| <= ln2 / 2, remainder below 2^-56
  for (int k = 13; k >= 1; --k) p = std::fma(p * r, 1.0 / k, 1.0);
  return std::ldexp(p, static_cast<int>(n));
}

static inline double fixed_log(double x) {
  int e;
  double m = std::frexp(x, &e);  // x = m * 2^e, m in [1/2, 1)
  if (m < 0.70710678118654752) {
    m *= 2.0;
    e -= 1;
  }
  // log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.1716
  const double s = (m - 1.0) / (m + 1.0);
  const double s2 = s * s;
  double p = 1.0 / 23.0;
  for (int k = 21; k >= 1; k -= 2) p = std::fma(p, s2, 1.0 / k);
  return std::fma(static_cast<double>(e), 6.93147180559945309417e-1, 2.0 * s * p);
}

struct SinCos {
  float sin;
  float cos;
};

// sin and cos of an angle below about 10^8, reduced in double by multiples of pi/2 in three parts.
PENSTOCK_BOTH static inline SinCos fixed_sincos(double angle) {
  const double n = std::fma(angle, 6.36619772367581382433e-1, 6755399441055744.0) - 6755399441055744.0;
  double r = std::fma(-n, 1.57079632679489655800e+0, angle);
  r = std::fma(-n, 6.12323399573676603587e-17, r);
  const double r2 = r * r;
  double s = -1.0 / 1307674368000.0;  // Taylor: sin to r^15, cos to r^16, |r| <= pi/4
  s = std::fma(s, r2, 1.0 / 6227020800.0);
  s = std::fma(s, r2, -1.0 / 39916800.0);
  s = std::fma(s, r2, 1.0 / 362880.0);
  s = std::fma(s, r2, -1.0 / 5040.0);
  s = std::fma(s, r2, 1.0 / 120.0);
  s = std::fma(s, r2, -1.0 / 6.0);
  s = std::fma(s * r2, r, r);
  double c = 1.0 / 20922789888000.0;
  c = std::fma(c, r2, -1.0 / 87178291200.0);
  c = std::fma(c, r2, 1.0 / 479001600.0);
  c = std::fma(c, r2, -1.0 / 3628800.0);
  c = std::fma(c, r2, 1.0 / 40320.0);
  c = std::fma(c, r2, -1.0 / 720.0);
  c = std::fma(c, r2, 1.0 / 24.0);
  c = std::fma(c, r2, -1.0 / 2.0);
  c = std::fma(c, r2, 1.0);
  switch (static_cast<int64_t>(n) & 3) {
    case 0: return {static_cast<float>(s), static_cast<float>(c)};
    case 1: return {static_cast<float>(c), static_cast<float>(-s)};
    case 2: return {static_cast<float>(-s), static_cast<float>(-c)};
    default: return {static_cast<float>(-c), static_cast<float>(s)};
  }
}

static inline float fixed_sin(double angle) { return fixed_sincos(angle).sin; }
static inline float fixed_cos(double angle) { return fixed_sincos(angle).cos; }

// Sixteen partial sums (element i of a vector goes to lane i mod 16) become one, always in this tree.
static inline float tree_sum16(const float lanes[16]) {
  float a[8], b[4];
  for (int i = 0; i < 8; ++i) a[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) b[i] = a[i] + a[i + 4];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// To nearest, ties to even, for |x| < 2^22; NaN and infinity give some integer, without a trap.
PENSTOCK_BOTH static inline int32_t round_to_int(float x) {
  return static_cast<int32_t>(bits_of(x + kRoundingShift) - bits_of(kRoundingShift));
}

// Activations of a block whose greatest magnitude is below this are quantised to zero.
constexpr float kSmallestBlock = 1e-30f;

// IEEE half to single, exact.
PENSTOCK_BOTH static inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u));
  if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return float_of(sign | bits_of(magnitude));
}

// Single to half, to nearest, ties to even; overflow gives infinity: what VCVTPS2PH does.
PENSTOCK_BOTH static inline uint16_t half_of_float(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // at least 65536
  if (magnitude >= 0x38800000u) {  // normal half; the carry of the rounding runs into the exponent as it should
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
  }
  // Subnormal half: adding 0.5 aligns the unit in the last place of the float with 2^-24 and rounds there.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  return static_cast<uint16_t>(sign | subnormal);
}

}  // namespace penstock
