// Consecutive tokens of one sequence, of which a step computes the rows.
#pragma once

#include <cstdint>

namespace penstock {

struct Segment {
  int first_row;
  int rows;
  int position;          // of the first row
  const int32_t* table;  // block numbers; entry i holds positions i * block_tokens …
};

}  // namespace penstock
