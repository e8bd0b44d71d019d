// Rows in runs whose sums fit into registers together.
#pragma once

#include <type_traits>

namespace penstock {

template <int kRows, class Body>
static inline void last_run(int count, int first, Body& body) {
  if constexpr (kRows > 0) {
    if (count == kRows) return body(std::integral_constant<int, kRows>(), first);
    last_run<kRows - 1>(count, first, body);
  }
}

// Calls `body` with each run of at most `kMost` rows, as a constant that is known when it is compiled, and its first row.
template <int kMost, class Body>
static inline void in_runs(int count, Body&& body) {
  int first = 0;
  for (; count - first >= kMost; first += kMost) body(std::integral_constant<int, kMost>(), first);
  last_run<kMost - 1>(count - first, first, body);
}

}  // namespace penstock
