/**
 * Which sequences run and which wait, and the blocks they hold. First come, first served; when the pool is full the
 * youngest is preempted: it gives its blocks back, waits in front, and recomputes what is no longer cached.
 */
import type { BlockManager } from "./block-manager.ts"
import type { Chunk } from "./composer.ts"
import type { Group, Sequence } from "./sequence.ts"

export interface SequenceQueueOptions {
  readonly blocks: BlockManager
  readonly blockTokens: number
  /** Most sequences at once. */
  readonly maxBatch: number
  readonly copyBlock: (from: number, to: number) => void
}

export class SequenceQueue {
  /** In order of arrival. */
  running: Array<Sequence> = []
  waiting: Array<Sequence> = []
  preemptions = 0
  readonly #options: SequenceQueueOptions

  constructor(options: SequenceQueueOptions) {
    this.#options = options
  }

  /** Gives waiting sequences their blocks, in order, as long as there are some. Returns those that may run now. */
  admit(): Array<Sequence> {
    const admitted: Array<Sequence> = []
    for (let sequence = this.waiting[0]; sequence !== undefined; sequence = this.waiting[0]) {
      const slots = this.running.reduce((sum, { group }) => sum + 1 + group.unforked, 0)
      if (slots + 1 + sequence.group.unforked > this.#options.maxBatch || !this.#takeBlocks(sequence)) break
      this.waiting.shift()
      this.add(sequence)
      admitted.push(sequence)
    }
    return admitted
  }

  /** A sequence that has its blocks: admitted, or forked from one that runs. */
  add(sequence: Sequence): void {
    sequence.running = true
    const older = this.running.findLastIndex(({ group, choice }) => group.arrival < sequence.group.arrival || (group === sequence.group && choice < sequence.choice))
    this.running.splice(older + 1, 0, sequence)
  }

  /** Another choice of a running sequence's request, on the same blocks. */
  fork(sequence: Sequence, choice: number): Sequence {
    const fork = sequence.fork(choice)
    for (const block of fork.table) this.#options.blocks.share(block)
    this.add(fork)
    return fork
  }

  /** Frees what a sequence holds, running or waiting. */
  remove(sequence: Sequence): void {
    this.#releaseBlocks(sequence)
    this.running = this.running.filter((other) => other !== sequence)
    this.waiting = this.waiting.filter((other) => other !== sequence)
  }

  removeGroup(group: Group): void {
    for (const sequence of group.sequences) this.remove(sequence)
  }

  /**
   * Gives every row of the chunks a block of its own to write to: a new one, or a copy of one that is shared. Returns the
   * chunks whose sequences still run.
   */
  ensureBlocks(chunks: ReadonlyArray<Chunk>): Array<Chunk> {
    const { blocks, blockTokens } = this.#options
    for (const { sequence, tokens } of chunks) {
      const last = Math.floor((sequence.computed + tokens - 1) / blockTokens)
      for (let place = Math.floor(sequence.computed / blockTokens); place <= last && sequence.running; place++) {
        const held = sequence.table[place]
        if (held !== undefined && blocks.references(held) === 1) continue
        const block = this.#allocateFor(sequence)
        if (block === undefined) break
        if (held === undefined) {
          sequence.table.push(block)
        } else {
          this.#options.copyBlock(held, block)
          blocks.release([held])
          sequence.table[place] = block
        }
      }
    }
    return chunks.filter(({ sequence }) => sequence.running)
  }

  /** The longest known prefix, but never the last token, and new blocks for the rest: all or nothing. */
  #takeBlocks(sequence: Sequence): boolean {
    const { blocks, blockTokens } = this.#options
    const { spec, prefillDone } = sequence.group
    const needed = Math.ceil(sequence.length / blockTokens)
    const reusable = Math.floor((sequence.length - 1) / blockTokens)
    sequence.hashUpTo(reusable * blockTokens, blockTokens)
    // Every row of a prompt whose log probabilities are asked for has to be computed.
    const known = spec.promptLogprobs && !prefillDone ? [] : sequence.hashes.slice(0, reusable)
    const table = known.slice(0, blocks.countPrefix(known)).map((hash) => blocks.acquire(hash)!)
    const hit = table.length
    if (blocks.available < needed - hit) {
      blocks.release(table.reverse())
      return false
    }
    while (table.length < needed) table.push(blocks.allocate()!)
    sequence.table = table
    sequence.computed = hit * blockTokens
    return true
  }

  /** A block; where there is none, younger sequences give way, or at last the sequence itself (then undefined). */
  #allocateFor(sequence: Sequence): number | undefined {
    for (;;) {
      const block = this.#options.blocks.allocate()
      if (block !== undefined) return block
      // Reservations that have not begun are left alone: KV may be arriving for them.
      const victim = this.running.findLast(({ group }) => group.prefill !== undefined) ?? sequence
      this.preemptions++
      this.#releaseBlocks(victim)
      this.running = this.running.filter((other) => other !== victim)
      this.waiting.unshift(victim)
      if (victim === sequence) return undefined
    }
  }

  #releaseBlocks(sequence: Sequence): void {
    this.#options.blocks.release(sequence.table.reverse())
    sequence.table = []
    sequence.computed = 0
    sequence.running = false
  }
}
