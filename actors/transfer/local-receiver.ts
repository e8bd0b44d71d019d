/**
 * A receiver into a pool, as senders from other pools of its process find it: they leave their blocks with it and send chunks
 * that only say which, and it copies from pool to pool. Who has left is not copied from any more, whatever is still on its way.
 */
import type { PoolBlocks } from "../engine/pool-blocks.ts"
import type { ChunkRange } from "../messages/kv-chunk.ts"

/** By the subject of the transfer's chunks. */
const open = new Map<string, LocalReceiver>()

export interface LocalSender {
  /** Names its blocks in chunks. */
  readonly number: number
  leave(): void
}

export class LocalReceiver {
  readonly #subject: string
  readonly #blocks: PoolBlocks
  readonly #senders: Array<PoolBlocks | undefined> = []

  constructor(subject: string, blocks: PoolBlocks) {
    this.#subject = subject
    this.#blocks = blocks
    open.set(subject, this)
  }

  /** Undefined where there is no such receiver in this process, or its pool cannot copy from there. */
  static join(subject: string, from: PoolBlocks): LocalSender | undefined {
    const receiver = open.get(subject)
    if (receiver === undefined || !receiver.#blocks.canCopy(from)) return undefined
    const number = receiver.#senders.push(from)
    return { number, leave: () => void (receiver.#senders[number - 1] = undefined) }
  }

  /** Copies what a sender has there; false where it has left. Throws where the KV is gone, or its place here. */
  copy(range: ChunkRange, sender: number): boolean {
    const from = this.#senders[sender - 1]
    if (from !== undefined) this.#blocks.copy(range, from)
    return from !== undefined
  }

  close(): void {
    if (open.get(this.#subject) === this) open.delete(this.#subject)
  }
}
