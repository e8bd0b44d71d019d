/** Blocks that are kept in the pool for whoever sends them elsewhere. */
import type { Engine as Kernels } from "../../kernels/index.ts"
import type { BlockHash } from "../messages/hashes.ts"
import type { ChunkRange } from "../messages/kv-chunk.ts"
import type { BlockManager } from "./block-manager.ts"

export interface HeldBlocks {
  readonly hashes: ReadonlyArray<BlockHash>
  /** Writes chunks of these of the blocks, place 0 being the first of them, and returns the CRC-32C continued from `seed`. */
  writeOf(places: ReadonlyArray<number>): (range: ChunkRange, into: Uint8Array, offset: number, seed: number) => number
  release(): void
}

export class BlockHolds {
  readonly #blocks: BlockManager
  readonly #kernels: Pick<Kernels, "exportLayers">
  readonly #onRelease: () => void
  readonly #held = new Set<ReadonlyArray<number>>()

  constructor(blocks: BlockManager, kernels: Pick<Kernels, "exportLayers">, onRelease: () => void) {
    this.#blocks = blocks
    this.#kernels = kernels
    this.#onRelease = onRelease
  }

  /** The blocks of each hold. */
  get tables(): Iterable<ReadonlyArray<number>> {
    return this.#held
  }

  /** Holds those of the blocks with these contents that are here, so that they can be written out until their release. */
  hold(hashes: ReadonlyArray<BlockHash>): HeldBlocks {
    const found = hashes.flatMap((hash) => {
      const block = this.#blocks.acquire(hash)
      return block === undefined ? [] : [{ hash, block }]
    })
    const table = found.map(({ block }) => block)
    this.#held.add(table)
    return {
      hashes: found.map(({ hash }) => hash),
      writeOf: (places) => (range, into, offset, seed) => {
        const blocks = places.slice(range.firstBlock, range.firstBlock + range.blocks).map((place) => table[place]!)
        return this.#kernels.exportLayers(Int32Array.from(blocks), range.firstLayer, range.layers, into, offset, seed)
      },
      release: () => {
        if (!this.#held.delete(table)) return
        this.#blocks.release(table)
        this.#onRelease()
      },
    }
  }
}
