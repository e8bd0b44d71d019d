#include "processor.h"

#if defined(PENSTOCK_X86)
#include <cpuid.h>
#endif

namespace penstock {

// Asked of the processor itself: compilers' own tests differ in the names they know.
Processor::Processor() {
#if defined(PENSTOCK_X86)
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return;
  constexpr unsigned kPclmulqdq = 1u << 1, kFma = 1u << 12, kSse42 = 1u << 20, kOsxsave = 1u << 27, kF16c = 1u << 29;
  pclmulqdq = (ecx & kPclmulqdq) != 0 && (ecx & kSse42) != 0;
  if ((ecx & kOsxsave) == 0 || (ecx & kFma) == 0 || (ecx & kF16c) == 0) return;
  unsigned saved, high;  // XCR0: registers that the operating system saves
  asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return;
  constexpr unsigned kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;  // in ebx
  constexpr unsigned kVpclmulqdq = 1u << 10, kVnni = 1u << 11;                                       // in ecx
  constexpr unsigned kAll = kF | kDq | kBw | kVl;
  avx2 = (saved & 0x06) == 0x06 && (ebx & kAvx2) != 0;
  avx512 = avx2 && (saved & 0xe6) == 0xe6 && (ebx & kAll) == kAll && (ecx & kVnni) != 0;
  vpclmulqdq = avx512 && pclmulqdq && (ecx & kVpclmulqdq) != 0;
#endif
}

const Processor& processor() {
  static const Processor found;
  return found;
}

}  // namespace penstock
