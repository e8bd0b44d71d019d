#include "kernels.h"

#if defined(PENSTOCK_AVX2)
#include <cpuid.h>
#endif

namespace penstock {

namespace {

#if defined(PENSTOCK_AVX2)
bool has_avx2() {
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers; clang's does not know f16c.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#endif

}  // namespace

InstructionSet best_instruction_set() {
#if defined(PENSTOCK_AVX2)
  if (has_avx2()) return InstructionSet::Avx2;
#endif
  return InstructionSet::Reference;
}

const Kernels& select_kernels(InstructionSet ceiling) {
#if defined(PENSTOCK_AVX2)
  if (ceiling >= InstructionSet::Avx2 && has_avx2()) return kAvx2Kernels;
#endif
  (void)ceiling;
  return kReferenceKernels;
}

const char* instruction_set_name(InstructionSet isa) {
  switch (isa) {
    case InstructionSet::Reference: return "reference";
    case InstructionSet::Avx2: return "avx2";
    case InstructionSet::Avx512: return "avx512";
  }
  return "reference";
}

}  // namespace penstock
