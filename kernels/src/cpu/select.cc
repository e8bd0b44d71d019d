#include "kernels.h"

#if defined(PENSTOCK_X86)
#include <cpuid.h>
#endif

namespace penstock {

namespace {

#if defined(PENSTOCK_X86)
// Asked of the processor itself: compilers' own tests differ in the names they know.
struct Processor {
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // F, BW, DQ, VL and VNNI

  Processor() {
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return;
    constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;
    if ((ecx & kOsxsave) == 0 || (ecx & kFma) == 0 || (ecx & kF16c) == 0) return;
    unsigned saved, high;  // XCR0: registers that the operating system saves
    asm volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return;
    constexpr unsigned kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31, kVnni = 1u << 11;
    constexpr unsigned kAll = kF | kDq | kBw | kVl;
    avx2 = (saved & 0x06) == 0x06 && (ebx & kAvx2) != 0;
    avx512 = avx2 && (saved & 0xe6) == 0xe6 && (ebx & kAll) == kAll && (ecx & kVnni) != 0;
  }
};

const Processor& processor() {
  static const Processor found;
  return found;
}
#endif

}  // namespace

const Kernels& select_kernels(InstructionSet ceiling) {
#if defined(PENSTOCK_X86)
  if (ceiling >= InstructionSet::Avx512 && processor().avx512) return kAvx512Kernels;
  if (ceiling >= InstructionSet::Avx2 && processor().avx2) return kAvx2Kernels;
#endif
  (void)ceiling;
  return kReferenceKernels;
}

InstructionSet best_instruction_set() { return select_kernels(InstructionSet::Avx512).isa; }

const char* instruction_set_name(InstructionSet isa) {
  switch (isa) {
    case InstructionSet::Reference: return "reference";
    case InstructionSet::Avx2: return "avx2";
    case InstructionSet::Avx512: return "avx512";
  }
  return "reference";
}

}  // namespace penstock
