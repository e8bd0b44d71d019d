/**
 * Which sequences run and which wait, and the blocks they hold. First come, first served; when the pool is full the
 * youngest is preempted, one whose reader is behind before all others: it gives its blocks back, waits in its place, and
 * recomputes what is no longer cached, or has it brought from where it was parked.
 */
import type { BlockHash } from "../messages/hashes.ts"
import type { BlockManager } from "./block-manager.ts"
import type { Chunk } from "./composer.ts"
import type { Group, Sequence } from "./sequence.ts"

const isOlder = (left: Sequence, right: Sequence): boolean =>
  left.group.arrival < right.group.arrival || (left.group === right.group && left.choice < right.choice)

export interface SequenceQueueOptions {
  readonly blocks: BlockManager
  readonly blockTokens: number
  /** Most sequences at once. */
  readonly maxBatch: number
  readonly copyBlock: (from: number, to: number) => void
  /** A sequence gives its blocks away; they are still its own. */
  readonly onPreempt?: ((sequence: Sequence) => void) | undefined
}

export class SequenceQueue {
  maxBatch: number
  /** Both in order of arrival. */
  running: Array<Sequence> = []
  waiting: Array<Sequence> = []
  preemptions = 0
  readonly #options: SequenceQueueOptions

  constructor(options: SequenceQueueOptions) {
    this.#options = options
    this.maxBatch = options.maxBatch
  }

  /** Takes up the sequences of a new group, behind all others. */
  enqueue(sequences: ReadonlyArray<Sequence>): void {
    this.waiting.push(...sequences)
  }

  /** Gives waiting sequences their blocks, in order, as long as there are some. Returns those that may run now. */
  admit(): Array<Sequence> {
    const admitted: Array<Sequence> = []
    let slots = this.running.reduce((sum, { group }) => sum + 1 + group.unforked, 0)
    for (const sequence of [...this.waiting]) {
      if (sequence.group.paused) continue // with its blocks, others get on meanwhile
      slots += 1 + sequence.group.unforked
      if (slots > this.maxBatch || !this.#takeBlocks(sequence)) break
      this.waiting.splice(this.waiting.indexOf(sequence), 1)
      this.add(sequence)
      admitted.push(sequence)
    }
    return admitted
  }

  /** A sequence that has its blocks: admitted, or forked from one that runs. */
  add(sequence: Sequence): void {
    sequence.running = true
    this.running.splice(this.running.findLastIndex((other) => isOlder(other, sequence)) + 1, 0, sequence)
  }

  /**
   * The running sequences that have something of their own to compute. One whose next block is another's next too waits for
   * it, and goes on with what is known then: what several begin with is computed once.
   */
  ready(): Array<Sequence> {
    const coming = new Set<BlockHash>()
    return this.running.filter((sequence) => {
      const { group } = sequence
      if (sequence.returning !== undefined) return false
      if (group.prefill === undefined || group.held || group.paused || sequence.pending === 1) return true
      const scored = group.spec.promptLogprobs && !group.prefillDone
      if (!scored) this.takeKnown(sequence)
      const next = sequence.hashes[Math.floor(sequence.computed / this.#options.blockTokens)]
      if (next === undefined) return true // its last block, which is not full
      if (coming.has(next) && !scored) return false
      coming.add(next)
      return true
    })
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
        const isOwn = () => held !== undefined && blocks.references(held) === 1
        if (isOwn()) continue
        const block = this.#allocateFor(sequence, isOwn)
        if (block === undefined) continue
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

  /** The youngest give way while more blocks are held than may be. */
  giveBack(): void {
    for (let victim = this.#giving(); victim !== undefined && this.#options.blocks.excess > 0; victim = this.#giving()) this.#preempt(victim)
  }

  /** Those that wait, and will never have what they need, within the bounds as they are. */
  misfits(): Array<Sequence> {
    const { blocks, blockTokens } = this.#options
    return this.waiting.filter(({ length, group }) => Math.ceil(length / blockTokens) > blocks.limit || 1 + group.unforked > this.maxBatch)
  }

  /** Whose blocks the others get: one whose reader is behind, or the youngest. Where KV is arriving or leaving, they have to stay. */
  #giving(): Sequence | undefined {
    const mayGive = ({ group }: Sequence) => group.prefill !== undefined && group.spec.prefillOnly !== true
    return this.running.findLast((other) => mayGive(other) && other.group.paused) ?? this.running.findLast(mayGive)
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

  /** Blocks that became known since this sequence got its own take their place, but never that of the last token. */
  takeKnown(sequence: Sequence): void {
    const { blocks, blockTokens } = this.#options
    const { group, table } = sequence
    for (let place = Math.floor(sequence.computed / blockTokens); (place + 1) * blockTokens < sequence.length; place++) {
      const hash = sequence.hashes[place]
      const known = hash === undefined ? undefined : blocks.acquire(hash)
      if (known === undefined) return
      blocks.release([table[place]!])
      table[place] = known
      const end = (place + 1) * blockTokens
      if (!group.prefillDone) group.cachedTokens += end - sequence.computed
      sequence.computed = end
    }
  }

  /**
   * A block; where there is none, others give way, or at last the sequence itself. Undefined then, and where a shared
   * block has become its own, since the others have gone.
   */
  #allocateFor(sequence: Sequence, isOwn: () => boolean): number | undefined {
    while (sequence.running && !isOwn()) {
      const block = this.#options.blocks.allocate()
      if (block !== undefined) return block
      this.#preempt(this.#giving() ?? sequence)
    }
    return undefined
  }

  #preempt(victim: Sequence): void {
    this.preemptions++
    victim.preempted = true
    this.#options.onPreempt?.(victim)
    this.#releaseBlocks(victim)
    this.running = this.running.filter((other) => other !== victim)
    this.waiting.splice(this.waiting.findLastIndex((other) => isOlder(other, victim)) + 1, 0, victim)
  }

  #releaseBlocks(sequence: Sequence): void {
    this.#options.blocks.release(sequence.table.reverse())
    sequence.table = []
    sequence.computed = 0
    sequence.running = false
    sequence.returning = undefined
  }
}
