/** Blocks that are kept in the pool for whoever sends them elsewhere. */
import type { BlockHash } from "../messages/hashes.ts"
import type { BlockManager } from "./block-manager.ts"
import { PoolBlocks, type PoolKernels } from "./pool-blocks.ts"

export interface HeldBlocks {
  readonly hashes: ReadonlyArray<BlockHash>
  /** These of the blocks, the first of them at `firstBlock` of a transfer. */
  at(places: ReadonlyArray<number>, firstBlock?: number): PoolBlocks
  release(): void
}

export class BlockHolds {
  readonly #blocks: BlockManager
  readonly #kernels: PoolKernels
  readonly #onRelease: () => void
  readonly #held = new Set<ReadonlyArray<number>>()

  constructor(blocks: BlockManager, kernels: PoolKernels, onRelease: () => void) {
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
      at: (places, firstBlock = 0) =>
        new PoolBlocks(this.#kernels, (range) => {
          const from = range.firstBlock - firstBlock
          return Int32Array.from(places.slice(from, from + range.blocks), (place) => table[place]!)
        }),
      release: () => {
        if (!this.#held.delete(table)) return
        this.#blocks.release(table)
        this.#onRelease()
      },
    }
  }
}
