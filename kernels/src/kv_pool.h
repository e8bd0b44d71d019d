// The KV cache of one engine: a fixed number of blocks, each holding `block_tokens` tokens of all layers as f16.
//
// Layout [layer][block][kv head]{K [head dim, tokens], V [tokens, head dim padded to 16]}: keys lie token beside token, so
// that a vector register holds one dimension of several keys, and values dimension beside dimension.
#pragma once

#include <cstddef>
#include <cstdint>

#include "region.h"

namespace penstock {

class KvPool {
 public:
  // Memory is reserved here and committed as blocks are first written.
  KvPool(int layers, int blocks, int kv_heads, int block_tokens, int head_dim);

  int blocks() const { return blocks_; }
  int block_tokens() const { return block_tokens_; }
  int value_stride() const { return value_stride_; }

  // [head_dim, block_tokens]
  uint16_t* keys(int layer, int block, int head) const { return entry(layer, block, head); }
  // [block_tokens, value_stride]
  uint16_t* values(int layer, int block, int head) const { return entry(layer, block, head) + value_offset_; }

  // Bytes of a block in the wire layout [layer][K|V][kv head][token][head dim] f16 little-endian.
  size_t block_bytes() const { return size_t{4} * layers_ * kv_heads_ * block_tokens_ * head_dim_; }
  void export_block(int block, uint8_t* into) const;
  void import_block(int block, const uint8_t* from);
  void copy_block(int from, int to);

 private:
  uint16_t* entry(int layer, int block, int head) const {
    return region_.as<uint16_t>() + (static_cast<size_t>(layer) * blocks_ + block) * block_stride_ + head * head_stride_;
  }

  int layers_;
  int blocks_;
  int kv_heads_;
  int block_tokens_;
  int head_dim_;
  int value_stride_;     // head_dim padded to 16
  size_t value_offset_;  // from an entry's keys to its values
  size_t head_stride_;   // from one head's entry to the next
  size_t block_stride_;  // from one block of a layer to the next
  Region region_;
};

}  // namespace penstock
