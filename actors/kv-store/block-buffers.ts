/**
 * Whole blocks in memory, as the ends of a transfer. A block's bytes are layer after layer, so that a layer of it is one run,
 * whatever the dtype; a chunk's payload is [layer][block] of such runs.
 */
import { crc32c } from "../../kernels/index.ts"
import type { ChunkRange } from "../messages/kv-chunk.ts"
import type { KvLayout } from "../engine/worker.ts"
import type { ChunkSink } from "../transfer/transfer-receiver.ts"
import type { ChunkSource } from "../transfer/transfer-sender.ts"

/** Calls back with each run of a range: its offset in the payload, its block, and its offset in that block. */
const forEachRun = (range: ChunkRange, { layerBlockBytes }: KvLayout, visit: (payloadOffset: number, block: number, offset: number) => void): void => {
  let payloadOffset = 0
  for (let layer = range.firstLayer; layer < range.firstLayer + range.layers; layer++) {
    for (let block = range.firstBlock; block < range.firstBlock + range.blocks; block++) {
      visit(payloadOffset, block, layer * layerBlockBytes)
      payloadOffset += layerBlockBytes
    }
  }
}

/** `blocks[0]` has the place `firstBlock` in the receiver's table. */
export const bufferSource = (layout: KvLayout, blocks: ReadonlyArray<Uint8Array>, firstBlock: number): ChunkSource => ({
  ...layout,
  crc32c,
  write: (range, into, start, seed) => {
    forEachRun(range, layout, (payloadOffset, block, offset) => into.set(blocks[block - firstBlock]!.subarray(offset, offset + layout.layerBlockBytes), start + payloadOffset))
    return crc32c(into.subarray(start, start + range.layers * range.blocks * layout.layerBlockBytes), seed)
  },
})

/** Fills `blocks`, whose places begin at 0. */
export const bufferSink = (layout: KvLayout, blocks: ReadonlyArray<Uint8Array>): ChunkSink => ({
  ...layout,
  crc32c,
  take: (range, payload, seed, crc) => {
    if (crc32c(payload, seed) !== crc) return false
    forEachRun(range, layout, (payloadOffset, block, offset) => blocks[block]!.set(payload.subarray(payloadOffset, payloadOffset + layout.layerBlockBytes), offset))
    return true
  },
})
