// Some layers of some blocks.
//
// On the wire, little-endian: [layer][block][K|V][kv head]{[token][units], and of codes scale [token], zero [token]}; the same in
// words in kernels/index.ts.
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock {

struct KvRange {
  const int32_t* blocks;  // [count]
  size_t count;
  int first_layer;
  int layers;
};

}  // namespace penstock
