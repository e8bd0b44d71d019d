// KV blocks on their way out of the device's pool and into it: packed side by side, through two pinned buffers, so that one part is
// copied over the bus while the part before it goes into the message, or out of it. To another pool of the same device they are
// copied where they lie, and to one of another device packed, without the host's memory.
#pragma once

#include "../cpu/crc32c.h"
#include "../kv_range.h"
#include "launchers.h"

namespace penstock::cuda {

class KvStaging {
 public:
  // Device memory that it will take.
  static size_t device_bytes(const KvView& kv);

  KvStaging(Device& device, const KvView& kv, Crc32c crc32c);

  // As Engine's. They return when all is done.
  uint32_t export_layers(const KvRange& range, uint8_t* into, uint32_t seed);
  uint32_t import_layers(const KvRange& range, const uint8_t* from, uint32_t seed);
  void copy_layers(KvStaging& from, const KvRange& range, const int32_t* to);

 private:
  struct Slot {
    uint8_t* packed;  // of the device
    uint8_t* pinned;
    Event done;
  };
  static size_t pieces_together(const KvView& kv);
  // Brings the numbers of blocks to the device, where a kernel finds them.
  void begin(const KvRange& range);
  void copy_here(const KvView& from, const KvRange& range, const int32_t* to);
  void copy_from_peer(KvStaging& peer, const KvRange& range, const int32_t* to);
  MoveArguments move(const KvRange& range, size_t first, Slot& slot) const;

  Device& device_;
  const KvView kv_;
  const Crc32c crc32c_;
  Stream stream_;
  DeviceMemory memory_;
  PinnedMemory pinned_;
  int32_t* blocks_;         // [2, blocks] of the device: those that move, and where they go where that is this pool too
  int32_t* pinned_blocks_;  // [2, blocks]
  Slot slots_[2];
};

}  // namespace penstock::cuda
