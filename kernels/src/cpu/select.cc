#include "kernels.h"
#include "processor.h"

namespace penstock {

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

const char* kv_dtype_name(KvDtype dtype) { return dtype == KvDtype::F16 ? "f16" : dtype == KvDtype::Int8 ? "int8" : "int4"; }

}  // namespace penstock
