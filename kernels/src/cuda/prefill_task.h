// Some query rows of one segment, which a block of attention takes; see kernels/attention.cuh. For the host and for kernels.
#pragma once

#include <cstdint>

namespace penstock::cuda {

struct PrefillTask {
  int32_t first_row;    // of the segment
  int32_t rows;         // of the segment
  int32_t first_query;  // a multiple of prefill_queries: row i is token i / group, head i % group
  int32_t unused;
};

}  // namespace penstock::cuda
