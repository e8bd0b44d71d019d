/** KV that a sequence lacks and that could come from elsewhere, before it is computed. */
import { Fault } from "../runtime/fault.ts"
import type { BlockHash } from "../messages/hashes.ts"
import type { BlockManager } from "./block-manager.ts"
import { PoolBlocks, type PoolKernels } from "./pool-blocks.ts"
import type { Sequence } from "./sequence.ts"

export interface MissingKv {
  /** Traceparent of its request. */
  readonly trace: string | undefined
  /** Of the sequence. */
  readonly tokens: number
  /** Place in its table of the first block that it lacks. */
  readonly from: number
  /** Of that block and all full ones after it, but for that of the last token, which is always computed. */
  readonly hashes: ReadonlyArray<BlockHash>
  /** Where KV of these places in the table goes, as long as it is wanted. */
  readonly blocks: PoolBlocks
  /** Takes so many of the blocks, the first ones, for computed. False when they are not wanted any more. */
  accept(blocks: number): boolean
}

/** Of a sequence that was preempted and has blocks again. It is in no batch before `settle`, and loses its claim when it gives way once more. */
export interface ReturningKv extends MissingKv {
  settle(): void
}

export interface ReturningOptions {
  readonly name: string
  readonly kernels: PoolKernels
  readonly blocks: BlockManager
  readonly blockTokens: number
  readonly notify: () => void
}

/** Undefined where it lacks no full block, or has to compute all of them. */
export const returningKv = (sequence: Sequence, { name, kernels, blocks, blockTokens, notify }: ReturningOptions): ReturningKv | undefined => {
  const { spec, prefillDone } = sequence.group
  const from = Math.floor(sequence.computed / blockTokens)
  const hashes = sequence.hashes.slice(from, Math.floor((sequence.length - 1) / blockTokens))
  if (hashes.length === 0 || (spec.promptLogprobs && !prefillDone)) return undefined
  const claim = {}
  sequence.returning = claim
  const isWanted = () => sequence.returning === claim && !sequence.group.cancelled
  return {
    trace: spec.trace,
    tokens: sequence.length,
    from,
    hashes,
    blocks: new PoolBlocks(kernels, ({ firstBlock, blocks }) => {
      if (!isWanted()) throw new Fault({ code: "unavailable", message: `${name}: a sequence of ${spec.id} has given its blocks away`, hop: name })
      return Int32Array.from(sequence.table.slice(firstBlock, firstBlock + blocks))
    }),
    accept: (count) => {
      if (!isWanted()) return false
      sequence.computed += count * blockTokens
      sequence.seal(blocks, from, from + count)
      return true
    },
    settle: () => {
      if (sequence.returning !== claim) return
      sequence.returning = undefined
      notify()
    },
  }
}
