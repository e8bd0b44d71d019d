/**
 * Who holds which KV block. A block is free, cached (nobody's, but its content is known by hash and may be found again) or
 * referenced. Cached blocks are evicted least recently used first, when no free ones are left. Fewer than all may be in use:
 * a limit that shrinks evicts what is cached, and what is referenced beyond it goes with its holders.
 */
import type { BlockHash } from "../messages/hashes.ts"

export interface BlockEvents {
  /** `trace`: traceparent of the request that it was computed for; `depth`: its place in its sequence. */
  stored(hash: BlockHash, trace?: string, depth?: number): void
  removed(hash: BlockHash): void
}

export class BlockManager {
  readonly total: number
  #limit: number
  readonly #references: Uint32Array
  readonly #hashes: Array<BlockHash | undefined>
  readonly #index = new Map<BlockHash, number>()
  readonly #free: Array<number> = []
  /** Cached blocks, least recently used first (a Map keeps the order of insertion). */
  readonly #cached = new Map<number, true>()
  readonly #events: BlockEvents

  constructor(total: number, events: BlockEvents = { stored: () => {}, removed: () => {} }) {
    this.total = total
    this.#limit = total
    this.#events = events
    this.#references = new Uint32Array(total)
    this.#hashes = new Array<BlockHash | undefined>(total).fill(undefined)
    for (let block = total - 1; block >= 0; block--) this.#free.push(block)
  }

  /** Blocks that `allocate` can give. */
  get available(): number {
    return Math.max(0, this.#limit - this.#referenced)
  }

  /** Most blocks that may be in use, of all. */
  get limit(): number {
    return this.#limit
  }

  set limit(blocks: number) {
    this.#limit = Math.max(1, Math.min(this.total, blocks))
    while (this.#inUse > this.#limit && this.#cached.size > 0) this.#free.push(this.#evict()!)
  }

  /** Blocks that are referenced beyond the limit: their holders have to give them back. */
  get excess(): number {
    return Math.max(0, this.#referenced - this.#limit)
  }

  get #inUse(): number {
    return this.total - this.#free.length
  }

  get #referenced(): number {
    return this.#inUse - this.#cached.size
  }

  get cached(): number {
    return this.#cached.size
  }

  references(block: number): number {
    return this.#references[block]!
  }

  /** A block with one reference and no known content; undefined when as many are referenced as may be. */
  allocate(): number | undefined {
    if (this.available === 0) return undefined
    const block = this.#inUse < this.#limit ? this.#free.pop() : this.#evict()
    if (block !== undefined) this.#references[block] = 1
    return block
  }

  #evict(): number | undefined {
    const oldest = this.#cached.keys().next()
    if (oldest.done) return undefined
    this.#cached.delete(oldest.value)
    this.#forget(oldest.value)
    return oldest.value
  }

  /** The block with this content, referenced once more; undefined when it is not here. */
  acquire(hash: BlockHash): number | undefined {
    const block = this.#index.get(hash)
    if (block === undefined) return undefined
    this.#cached.delete(block)
    this.#references[block]!++
    return block
  }

  /** Leading blocks of a chain that are here. */
  countPrefix(hashes: ReadonlyArray<BlockHash>): number {
    let count = 0
    while (count < hashes.length && this.#index.has(hashes[count]!)) count++
    return count
  }

  /** The block with this content, as it is now: without a reference it may be evicted by the next `allocate`. */
  find(hash: BlockHash): number | undefined {
    return this.#index.get(hash)
  }

  /** One more holder of a block that has one. */
  share(block: number): void {
    if (this.#references[block] === 0) throw new Error(`block ${block} has no holder to share it`)
    this.#references[block]!++
  }

  /** Gives blocks back. In the order given: pass a sequence's last block first, so that its tail is evicted first. */
  release(blocks: Iterable<number>): void {
    for (const block of blocks) {
      if (this.#references[block] === 0) throw new Error(`block ${block} is released more often than it was taken`)
      if (--this.#references[block]! > 0) continue
      if (this.#inUse > this.#limit) this.#forget(block)
      if (this.#hashes[block] === undefined) this.#free.push(block)
      else this.#cached.set(block, true)
    }
  }

  /** Makes a full block's content known. Where another block has the same content, that one stays the known one. */
  seal(block: number, hash: BlockHash, trace?: string, depth?: number): void {
    if (this.#references[block] === 0) throw new Error(`block ${block} is sealed but nobody's`)
    if (this.#hashes[block] !== undefined || this.#index.has(hash)) return
    this.#hashes[block] = hash
    this.#index.set(hash, block)
    this.#events.stored(hash, trace, depth)
  }

  /** Every hash that is known here, for whoever missed events. */
  knownHashes(): Array<BlockHash> {
    return [...this.#index.keys()]
  }

  /**
   * The invariants: every block is free, cached or referenced; the counts agree with `held`, the tables of all holders;
   * the index and the blocks' hashes name each other. Throws on the first that does not hold.
   */
  check(held: Iterable<ReadonlyArray<number>>): void {
    const counts = new Uint32Array(this.total)
    for (const table of held) for (const block of table) counts[block]!++
    const free = new Set(this.#free)
    if (free.size !== this.#free.length) throw new Error("a block is free twice")
    for (let block = 0; block < this.total; block++) {
      if (counts[block] !== this.#references[block]) throw new Error(`block ${block} has ${counts[block]} holders but ${this.#references[block]} references`)
      const states = Number(free.has(block)) + Number(this.#cached.has(block)) + Number(this.#references[block]! > 0)
      if (states !== 1) throw new Error(`block ${block} is in ${states} of the states free, cached and referenced`)
      const hash = this.#hashes[block]
      if (hash !== undefined && this.#index.get(hash) !== block) throw new Error(`block ${block} is not found by its hash`)
      if (this.#cached.has(block) && hash === undefined) throw new Error(`block ${block} is cached without a hash`)
    }
    if (this.#cached.size > 0 && this.#inUse > this.#limit) throw new Error(`${this.#inUse} blocks are in use, of which ${this.#cached.size} are cached, where ${this.#limit} may be`)
    for (const [hash, block] of this.#index) if (this.#hashes[block] !== hash) throw new Error(`the index names block ${block} by a hash that it does not have`)
  }

  #forget(block: number): void {
    const hash = this.#hashes[block]
    if (hash === undefined) return
    this.#hashes[block] = undefined
    this.#index.delete(hash)
    this.#events.removed(hash)
  }
}
