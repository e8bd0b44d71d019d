/** Blocks of a pool as one end of a transfer: KV is written from them into a message, taken from one, or copied from another pool's. */
import type { Engine as Kernels } from "../../kernels/index.ts"
import type { ChunkRange } from "../messages/kv-chunk.ts"

/** What a pool needs of kernels' Engine. */
export type PoolKernels = Pick<Kernels, "exportLayers" | "importLayers" | "canCopy" | "copyLayers">

export class PoolBlocks {
  readonly #kernels: PoolKernels
  readonly #blocksOf: (range: ChunkRange) => Int32Array

  /** `blocksOf` throws a Fault where they are no longer whose they were. */
  constructor(kernels: PoolKernels, blocksOf: (range: ChunkRange) => Int32Array) {
    this.#kernels = kernels
    this.#blocksOf = blocksOf
  }

  /** Writes KV as a chunk's payload and returns its CRC-32C, continued from `seed`. Throws when it is gone. */
  write(range: ChunkRange, into: Uint8Array, offset: number, seed: number): number {
    return this.#kernels.exportLayers(this.#blocksOf(range), range.firstLayer, range.layers, into, offset, seed)
  }

  /** Takes a chunk's payload; false where the CRC does not match. Throws when it is not wanted any more. */
  take(range: ChunkRange, payload: Uint8Array, seed: number, crc: number): boolean {
    return this.#kernels.importLayers(this.#blocksOf(range), range.firstLayer, range.layers, payload, 0, seed, crc)
  }

  /** Whether KV can be copied from there, which is of this process, without being written. */
  canCopy(from: PoolBlocks): boolean {
    return this.#kernels.canCopy(from.#kernels)
  }

  /** Copies the same range from there. Throws when it is gone there, or not wanted here any more. */
  copy(range: ChunkRange, from: PoolBlocks): void {
    if (!this.#kernels.canCopy(from.#kernels)) throw new Error("these pools' blocks do not hold the same")
    this.#kernels.copyLayers(from.#kernels, from.#blocksOf(range), range.firstLayer, range.layers, this.#blocksOf(range))
  }
}
