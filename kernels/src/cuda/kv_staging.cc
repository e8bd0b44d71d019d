#include "kv_staging.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "arena.h"

namespace penstock::cuda {

namespace {

constexpr size_t kSlotBytes = size_t{1} << 20;
// Bytes that are copied before the CRC runs over them: they are still in the first-level cache then.
constexpr size_t kTogetherBytes = 12 << 10;

}  // namespace

size_t KvStaging::pieces_together(const KvView& kv) { return std::max(size_t{1}, kSlotBytes / kv.layer_block_bytes()); }

size_t KvStaging::device_bytes(const KvView& kv) {
  Arena arena;
  uint8_t* packed;
  int32_t* blocks;
  for (int i = 0; i < 2; ++i) arena.take(packed, pieces_together(kv) * kv.layer_block_bytes());
  arena.take(blocks, 2 * size_t(kv.blocks));
  return arena.used();
}

KvStaging::KvStaging(Device& device, const KvView& kv, Crc32c crc32c)
    : device_(device), kv_(kv), crc32c_(crc32c), stream_(device, device.create_stream()) {
  const size_t bytes = pieces_together(kv) * kv.layer_block_bytes();
  memory_ = DeviceMemory(device, device.allocate(device_bytes(kv), "staging of KV"));
  pinned_ = PinnedMemory(device, device.allocate_pinned(2 * bytes + 2 * kv.blocks * sizeof(int32_t), "staging of KV"));
  Arena arena(&device, memory_.get());
  for (int i = 0; i < 2; ++i) {
    arena.take(slots_[i].packed, bytes);
    slots_[i].pinned = pinned_.as<uint8_t>() + i * bytes;
    slots_[i].done = Event(device, device.create_event());
  }
  arena.take(blocks_, 2 * size_t(kv.blocks));
  pinned_blocks_ = reinterpret_cast<int32_t*>(pinned_.as<uint8_t>() + 2 * bytes);
}

void KvStaging::begin(const KvRange& range) {
  if (range.count > static_cast<size_t>(kv_.blocks)) {
    throw std::runtime_error("blocks: expected at most the pool's " + std::to_string(kv_.blocks) + ", found " + std::to_string(range.count));
  }
  std::copy(range.blocks, range.blocks + range.count, pinned_blocks_);
  device_.copy_to_device(blocks_, pinned_blocks_, range.count * sizeof(int32_t), stream_.get());
}

MoveArguments KvStaging::move(const KvRange& range, size_t first, Slot& slot) const {
  const size_t total = range.count * range.layers;
  return {blocks_,
          static_cast<int>(range.count),
          range.first_layer,
          static_cast<int>(first),
          static_cast<int>(std::min(pieces_together(kv_), total - first)),
          slot.packed};
}

uint32_t KvStaging::export_layers(const KvRange& range, uint8_t* into, uint32_t seed) {
  const size_t total = range.count * range.layers;
  const size_t together = pieces_together(kv_);
  const size_t piece = kv_.layer_block_bytes();
  if (total == 0) return seed;
  begin(range);
  const auto send = [&](size_t part) {
    Slot& slot = slots_[part % 2];
    const MoveArguments arguments = move(range, part * together, slot);
    pack_blocks({device_, stream_.get()}, kv_, arguments);
    device_.copy_to_host(slot.pinned, slot.packed, arguments.pieces * piece, stream_.get());
    device_.record(slot.done.get(), stream_.get());
  };
  const size_t parts = (total + together - 1) / together;
  send(0);
  for (size_t part = 0; part < parts; ++part) {
    if (part + 1 < parts) send(part + 1);
    Slot& slot = slots_[part % 2];
    device_.synchronise_event(slot.done.get());
    const size_t bytes = std::min(together, total - part * together) * piece;
    for (size_t at = 0; at < bytes; at += kTogetherBytes) {
      const size_t count = std::min(kTogetherBytes, bytes - at);
      std::memcpy(into + at, slot.pinned + at, count);
      seed = crc32c_(into + at, count, seed);
    }
    into += bytes;
  }
  return seed;
}

uint32_t KvStaging::import_layers(const KvRange& range, const uint8_t* from, uint32_t seed) {
  const size_t total = range.count * range.layers;
  const size_t together = pieces_together(kv_);
  const size_t piece = kv_.layer_block_bytes();
  if (total == 0) return seed;
  begin(range);
  for (size_t first = 0, part = 0; first < total; first += together, ++part) {
    Slot& slot = slots_[part % 2];
    if (part >= 2) device_.synchronise_event(slot.done.get());  // what it was filled with before is on the device
    const MoveArguments arguments = move(range, first, slot);
    const size_t bytes = arguments.pieces * piece;
    for (size_t at = 0; at < bytes; at += kTogetherBytes) {
      const size_t count = std::min(kTogetherBytes, bytes - at);
      seed = crc32c_(from + at, count, seed);
      std::memcpy(slot.pinned + at, from + at, count);
    }
    device_.copy_to_device(slot.packed, slot.pinned, bytes, stream_.get());
    unpack_blocks({device_, stream_.get()}, kv_, arguments);
    device_.record(slot.done.get(), stream_.get());
    from += bytes;
  }
  device_.synchronise(stream_.get());
  return seed;
}

void KvStaging::copy_layers(KvStaging& from, const KvRange& range, const int32_t* to) {
  if (range.count == 0) return;
  if (from.device_.facts().number == device_.facts().number) {
    copy_here(from.kv_, range, to);
  } else {
    copy_from_peer(from, range, to);
  }
  device_.synchronise(stream_.get());
}

void KvStaging::copy_here(const KvView& from, const KvRange& range, const int32_t* to) {
  begin({to, range.count, range.first_layer, range.layers});
  int32_t* pinned = pinned_blocks_ + kv_.blocks;
  int32_t* sources = blocks_ + kv_.blocks;
  std::copy(range.blocks, range.blocks + range.count, pinned);
  device_.copy_to_device(sources, pinned, range.count * sizeof(int32_t), stream_.get());
  copy_blocks({device_, stream_.get()}, from, kv_, {sources, blocks_, static_cast<int>(range.count), range.first_layer, range.layers});
}

// Each part is packed there while the one before it is on its way here.
void KvStaging::copy_from_peer(KvStaging& peer, const KvRange& range, const int32_t* to) {
  const KvRange goal = {to, range.count, range.first_layer, range.layers};
  const size_t total = range.count * range.layers;
  peer.begin(range);
  begin(goal);
  for (size_t first = 0, part = 0; first < total; first += pieces_together(kv_), ++part) {
    Slot& there = peer.slots_[part % 2];
    Slot& here = slots_[part % 2];
    if (part >= 2) device_.synchronise_event(here.done.get());  // what both were filled with before is in the pool
    pack_blocks({peer.device_, peer.stream_.get()}, peer.kv_, peer.move(range, first, there));
    peer.device_.record(there.done.get(), peer.stream_.get());
    peer.device_.synchronise_event(there.done.get());
    const MoveArguments arguments = move(goal, first, here);
    device_.copy_from_peer(here.packed, peer.device_, there.packed, arguments.pieces * kv_.layer_block_bytes(), stream_.get());
    unpack_blocks({device_, stream_.get()}, kv_, arguments);
    device_.record(here.done.get(), stream_.get());
  }
}

}  // namespace penstock::cuda
