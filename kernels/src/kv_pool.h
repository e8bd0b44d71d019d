// The KV cache of one engine: a fixed number of blocks, each holding `block_tokens` tokens of all layers as f16 or as codes.
//
// Everything lies in units of 16 bits, an f16 or two or four codes; `units` of them are one token's key or value. Layout
// [layer][block][kv head]{K [units, tokens], V [tokens, units, of f16 padded to 16]}: keys lie token beside token, so that a
// vector register holds a unit of several keys, and values unit beside unit. Codes have their f16 scales [tokens] and
// zeros [tokens] behind K, as if they were two units more, and behind V.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/crc32c.h"
#include "cpu/kernels.h"
#include "kv_range.h"
#include "region.h"

namespace penstock {

class KvPool {
 public:
  // Memory is reserved here and committed as blocks are first written.
  // Throws where a token's codes would fill no whole units.
  KvPool(const Kernels& kernels, KvDtype dtype, int layers, int blocks, int kv_heads, int block_tokens, int head_dim);

  KvDtype dtype() const { return dtype_; }
  int blocks() const { return blocks_; }
  int block_tokens() const { return block_tokens_; }
  int value_stride() const { return value_stride_; }
  // Of a token's key, the scale and the zero of codes included.
  int key_rows() const { return units_ + scales_; }

  // [key_rows, block_tokens]
  uint16_t* keys(int layer, int block, int head) const { return entry(layer, block, head); }
  // [block_tokens, value_stride]
  uint16_t* values(int layer, int block, int head) const { return entry(layer, block, head) + value_offset_; }
  // [scale | zero, block_tokens] of codes
  uint16_t* value_scales(int layer, int block, int head) const {
    return values(layer, block, head) + size_t(value_stride_) * block_tokens_;
  }

  // Writes a token's key, which is rotated already, and its value; both [head_dim].
  void write(int layer, int block, int head, int slot, const float* key, const float* value);

  // On the wire.
  size_t layer_block_bytes() const { return size_t{2} * kv_heads_ * piece_bytes(); }
  size_t block_bytes() const { return layers_ * layer_block_bytes(); }

  // Write to the wire layout and read from it, at any address. Both return the CRC-32C of those bytes, continued from `seed`;
  // what was imported has to be forgotten where it is not the one expected.
  uint32_t export_layers(const KvRange& range, uint8_t* into, uint32_t seed) const;
  uint32_t import_layers(const KvRange& range, const uint8_t* from, uint32_t seed);
  // From a pool whose blocks hold the same: `range` is of its blocks, and they go to `to`, [range.count] of this one's.
  void copy_layers(const KvPool& from, const KvRange& range, const int32_t* to);

 private:
  // Keys or values of one head in one block of one layer: what lies together here and on the wire.
  struct Piece {
    int layer;
    int block;
    int head;
    bool values;
  };

  uint16_t* entry(int layer, int block, int head) const {
    return region_.as<uint16_t>() + (static_cast<size_t>(layer) * blocks_ + block) * block_stride_ + head * head_stride_;
  }
  // On the wire.
  size_t codes_bytes() const { return sizeof(uint16_t) * block_tokens_ * units_; }
  size_t scales_bytes() const { return sizeof(uint16_t) * block_tokens_ * scales_; }
  size_t piece_bytes() const { return codes_bytes() + scales_bytes(); }
  size_t pieces(const KvRange& range) const { return size_t{2} * kv_heads_ * range.count * range.layers; }
  size_t pieces_together() const;
  Piece piece(const KvRange& range, size_t index) const;
  void export_piece(const Piece& piece, uint8_t* into) const;
  void import_piece(const Piece& piece, const uint8_t* from);

  const Kernels& kernels_;
  const Crc32c crc32c_;
  KvDtype dtype_;
  int layers_;
  int blocks_;
  int kv_heads_;
  int block_tokens_;
  int head_dim_;
  int units_;            // of a token's key or value
  int scales_;           // f16 beside them: none, or a scale and a zero
  int value_stride_;     // units of a value, of f16 padded to 16
  size_t value_offset_;  // from an entry's keys to its values
  size_t head_stride_;   // from one head's entry to the next
  size_t block_stride_;  // from one block of a layer to the next
  Region region_;
};

}  // namespace penstock
