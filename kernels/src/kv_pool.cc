#include "kv_pool.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace penstock {

namespace {

// The wire is little-endian; so is every machine this has been built on, but a byte order costs nothing to write down.
inline void store_u16(uint8_t* at, uint16_t value) {
  at[0] = static_cast<uint8_t>(value);
  at[1] = static_cast<uint8_t>(value >> 8);
}

inline uint16_t load_u16(const uint8_t* at) { return static_cast<uint16_t>(at[0] | (at[1] << 8)); }

size_t checked_bytes(size_t layers, size_t blocks, size_t block_stride) {
  constexpr size_t kMost = size_t{1} << 46;  // half of the usual address space
  const size_t per_block = layers * block_stride * sizeof(uint16_t);
  if (blocks > kMost / per_block) {
    throw std::runtime_error("blocks: " + std::to_string(blocks) + " blocks of " + std::to_string(per_block) +
                             " bytes do not fit into the address space");
  }
  return blocks * per_block;
}

}  // namespace

KvPool::KvPool(int layers, int blocks, int kv_heads, int block_tokens, int head_dim)
    : layers_(layers),
      blocks_(blocks),
      kv_heads_(kv_heads),
      block_tokens_(block_tokens),
      head_dim_(head_dim),
      value_stride_(static_cast<int>(round_up(head_dim, 16))),
      value_offset_(round_up(size_t(head_dim) * block_tokens, 32)),
      head_stride_(value_offset_ + round_up(size_t(value_stride_) * block_tokens, 32)),
      block_stride_(kv_heads * head_stride_),
      region_(checked_bytes(layers, blocks, block_stride_), "blocks") {}

void KvPool::export_block(int block, uint8_t* into) const {
  for (int layer = 0; layer < layers_; ++layer) {
    for (int head = 0; head < kv_heads_; ++head) {
      const uint16_t* from = keys(layer, block, head);
      for (int token = 0; token < block_tokens_; ++token) {
        for (int d = 0; d < head_dim_; ++d, into += 2) store_u16(into, from[size_t(d) * block_tokens_ + token]);
      }
    }
    for (int head = 0; head < kv_heads_; ++head) {
      const uint16_t* from = values(layer, block, head);
      for (int token = 0; token < block_tokens_; ++token) {
        for (int d = 0; d < head_dim_; ++d, into += 2) store_u16(into, from[size_t(token) * value_stride_ + d]);
      }
    }
  }
}

void KvPool::import_block(int block, const uint8_t* from) {
  for (int layer = 0; layer < layers_; ++layer) {
    for (int head = 0; head < kv_heads_; ++head) {
      uint16_t* into = keys(layer, block, head);
      for (int token = 0; token < block_tokens_; ++token) {
        for (int d = 0; d < head_dim_; ++d, from += 2) into[size_t(d) * block_tokens_ + token] = load_u16(from);
      }
    }
    for (int head = 0; head < kv_heads_; ++head) {
      uint16_t* into = values(layer, block, head);
      for (int token = 0; token < block_tokens_; ++token) {
        for (int d = 0; d < head_dim_; ++d, from += 2) into[size_t(token) * value_stride_ + d] = load_u16(from);
      }
    }
  }
}

void KvPool::copy_block(int from, int to) {
  if (from == to) return;
  for (int layer = 0; layer < layers_; ++layer) {
    std::memcpy(entry(layer, to, 0), entry(layer, from, 0), block_stride_ * sizeof(uint16_t));
  }
}

}  // namespace penstock
