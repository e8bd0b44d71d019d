#include "kv_pool.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <string>

namespace penstock {

namespace {

static_assert(std::endian::native == std::endian::little, "the wire is little-endian, and is copied as it lies");

// Bytes that are copied before the CRC runs over them, or the other way round: they are still in the first-level cache then,
// which holds 32 KiB, and many enough that the CRC is at its speed.
constexpr size_t kTogetherBytes = 12 << 10;

// Vector registers may read beyond the last value.
constexpr size_t kSlackBytes = 64;

int checked_units(KvDtype dtype, int head_dim) {
  const int bits = kv_bits(dtype);
  if (head_dim * bits % 16 != 0) {
    throw std::runtime_error(std::string("kv.dtype: ") + kv_dtype_name(dtype) + " takes heads of a multiple of " +
                             std::to_string(16 / bits) + " dimensions, and this model's have " + std::to_string(head_dim) +
                             "; f16 takes any");
  }
  return head_dim * bits / 16;
}

size_t checked_bytes(size_t layers, size_t blocks, size_t block_stride) {
  constexpr size_t kMost = size_t{1} << 46;  // half of the usual address space
  const size_t per_block = layers * block_stride * sizeof(uint16_t);
  if (blocks > kMost / per_block) {
    throw std::runtime_error("blocks: " + std::to_string(blocks) + " blocks of " + std::to_string(per_block) +
                             " bytes do not fit into the address space");
  }
  return blocks * per_block + kSlackBytes;
}

}  // namespace

KvPool::KvPool(const Kernels& kernels, KvDtype dtype, int layers, int blocks, int kv_heads, int block_tokens, int head_dim)
    : kernels_(kernels),
      crc32c_(select_crc32c(kernels.isa)),
      dtype_(dtype),
      layers_(layers),
      blocks_(blocks),
      kv_heads_(kv_heads),
      block_tokens_(block_tokens),
      head_dim_(head_dim),
      units_(checked_units(dtype, head_dim)),
      scales_(dtype == KvDtype::F16 ? 0 : 2),
      value_stride_(dtype == KvDtype::F16 ? static_cast<int>(round_up(head_dim, 16)) : units_),
      value_offset_(size_t(key_rows()) * block_tokens),
      head_stride_(value_offset_ + size_t(value_stride_ + scales_) * block_tokens),
      block_stride_(kv_heads * head_stride_),
      region_(checked_bytes(layers, blocks, block_stride_), "blocks") {}

void KvPool::write(int layer, int block, int head, int slot, const float* key, const float* value) {
  uint16_t* key_units = keys(layer, block, head) + slot;
  uint16_t* value_units = values(layer, block, head) + size_t(slot) * value_stride_;
  uint16_t units[kMostHeadDim];
  if (dtype_ == KvDtype::F16) {
    kernels_.to_half(key, head_dim_, units);
    kernels_.to_half(value, head_dim_, value_units);
  } else {
    const int bits = kv_bits(dtype_);
    uint16_t* scales = value_scales(layer, block, head) + slot;
    kernels_.encode(key, head_dim_, bits, reinterpret_cast<uint8_t*>(units), key_units + size_t(units_) * block_tokens_,
                    key_units + size_t(units_ + 1) * block_tokens_);
    kernels_.encode(value, head_dim_, bits, reinterpret_cast<uint8_t*>(value_units), scales, scales + block_tokens_);
  }
  for (int i = 0; i < units_; ++i) key_units[size_t(i) * block_tokens_] = units[i];
}

size_t KvPool::pieces_together() const { return std::max(size_t{1}, kTogetherBytes / piece_bytes()); }

KvPool::Piece KvPool::piece(const KvRange& range, size_t index) const {
  const int head = static_cast<int>(index % kv_heads_);
  const size_t half = index / kv_heads_;
  const size_t place = half / 2;  // [layer][block]
  return {range.first_layer + static_cast<int>(place / range.count), range.blocks[place % range.count], head, half % 2 != 0};
}

void KvPool::export_piece(const Piece& piece, uint8_t* into) const {
  if (!piece.values) {
    const uint16_t* from = keys(piece.layer, piece.block, piece.head);
    kernels_.transpose(from, block_tokens_, units_, block_tokens_, reinterpret_cast<WireUnit*>(into), units_);
    std::memcpy(into + codes_bytes(), from + size_t(units_) * block_tokens_, scales_bytes());
    return;
  }
  const uint16_t* from = values(piece.layer, piece.block, piece.head);
  if (value_stride_ == units_) {
    std::memcpy(into, from, piece_bytes());
  } else {
    const size_t row = sizeof(uint16_t) * units_;
    for (int token = 0; token < block_tokens_; ++token) std::memcpy(into + token * row, from + token * value_stride_, row);
  }
}

void KvPool::import_piece(const Piece& piece, const uint8_t* from) {
  if (!piece.values) {
    uint16_t* into = keys(piece.layer, piece.block, piece.head);
    kernels_.transpose(reinterpret_cast<const WireUnit*>(from), units_, block_tokens_, units_, into, block_tokens_);
    std::memcpy(into + size_t(units_) * block_tokens_, from + codes_bytes(), scales_bytes());
    return;
  }
  uint16_t* into = values(piece.layer, piece.block, piece.head);
  if (value_stride_ == units_) {
    std::memcpy(into, from, piece_bytes());
  } else {
    const size_t row = sizeof(uint16_t) * units_;
    for (int token = 0; token < block_tokens_; ++token) std::memcpy(into + token * value_stride_, from + token * row, row);
  }
}

uint32_t KvPool::export_layers(const KvRange& range, uint8_t* into, uint32_t seed) const {
  const size_t count = pieces(range);
  for (size_t first = 0; first < count; first += pieces_together()) {
    const size_t end = std::min(first + pieces_together(), count);
    for (size_t i = first; i < end; ++i) export_piece(piece(range, i), into + i * piece_bytes());
    seed = crc32c_(into + first * piece_bytes(), (end - first) * piece_bytes(), seed);
  }
  return seed;
}

uint32_t KvPool::import_layers(const KvRange& range, const uint8_t* from, uint32_t seed) {
  const size_t count = pieces(range);
  for (size_t first = 0; first < count; first += pieces_together()) {
    const size_t end = std::min(first + pieces_together(), count);
    seed = crc32c_(from + first * piece_bytes(), (end - first) * piece_bytes(), seed);
    for (size_t i = first; i < end; ++i) import_piece(piece(range, i), from + i * piece_bytes());
  }
  return seed;
}

void KvPool::copy_layers(const KvPool& from, const KvRange& range, const int32_t* to) {
  for (int layer = range.first_layer; layer < range.first_layer + range.layers; ++layer) {
    for (size_t i = 0; i < range.count; ++i) {
      const uint16_t* source = from.entry(layer, range.blocks[i], 0);
      uint16_t* goal = entry(layer, to[i], 0);
      if (source != goal) std::memcpy(goal, source, block_stride_ * sizeof(uint16_t));
    }
  }
}

}  // namespace penstock
