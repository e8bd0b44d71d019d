#include "kernels.h"

#if defined(PENSTOCK_X86)
#include <cpuid.h>
#endif

namespace penstock {

namespace {

#if defined(PENSTOCK_X86)
bool has_avx2() {
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers; clang's does not know f16c.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace

const Kernels& select_kernels(InstructionSet ceiling) {
#if defined(PENSTOCK_X86)
  if (ceiling >= InstructionSet::Avx512 && has_avx512()) return kAvx512Kernels;
  if (ceiling >= InstructionSet::Avx2 && has_avx2()) return kAvx2Kernels;
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
