// The device's pool of KV blocks: the wire layout (kernels/index.ts), so that a block leaves and comes as it lies.
//
//   [layer][block][K|V][kv head] of: f16 [token][head dim]; or codes [token][head dim], then f16 scales [token], zeros [token]
//
// A byte of int4 holds dimension i (low) and head_dim / 2 + i (high).
#pragma once

#include <cstddef>
#include <cstdint>

namespace penstock::cuda {

struct KvView {
  uint8_t* base = nullptr;
  int bits = 16;
  int layers = 0;
  int blocks = 0;
  int kv_heads = 0;
  int block_tokens = 0;
  int head_dim = 0;

  // Bytes of a token's codes, or halves; of all keys or values of a head in a block; of a layer of a block.
  constexpr size_t token_bytes() const { return size_t(head_dim) * bits / 8; }
  constexpr size_t piece_bytes() const { return block_tokens * (token_bytes() + (bits == 16 ? 0 : 4)); }
  constexpr size_t layer_block_bytes() const { return 2 * kv_heads * piece_bytes(); }
  constexpr size_t bytes() const { return size_t(layers) * blocks * layer_block_bytes(); }
  constexpr size_t piece(int layer, int block, int values, int head) const {
    return (((size_t(layer) * blocks + block) * 2 + values) * kv_heads + head) * piece_bytes();
  }
};

}  // namespace penstock::cuda
