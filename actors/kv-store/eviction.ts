/**
 * Which block a tier gives up first: one comparison for each policy, and a queue that is ordered by it.
 */

/** What a policy may look at. */
export interface Kept {
  /** Place in its chain: 0 is the first block of a prompt. */
  readonly depth: number
  /** How often it was used since it came. */
  readonly uses: number
  /** When it was last used, on a clock that counts messages: what is put or sent together has the same time. */
  readonly usedAt: number
}

/** Negative: `a` goes before `b`. */
export type Eviction = (a: Kept, b: Kept) => number

/** A block is of use only where all before it in its chain are there: what is equal else goes from the end of its chain. */
export const evictions = {
  /** Least recently used first. */
  lru: (a, b) => a.usedAt - b.usedAt || b.depth - a.depth,
  /** Least often used first. */
  lfu: (a, b) => a.uses - b.uses || a.usedAt - b.usedAt || b.depth - a.depth,
  /** Last in its chain first; of the same place, the least often used. */
  "length-aware": (a, b) => b.depth - a.depth || a.uses - b.uses || a.usedAt - b.usedAt,
} as const satisfies Readonly<Record<string, Eviction>>

export type EvictionName = keyof typeof evictions

/** A binary heap whose items know their place, so that one that changes its rank or leaves is found at once. */
export class EvictionQueue<T extends Kept & { place: number }> {
  readonly #before: Eviction
  readonly #heap: Array<T> = []

  constructor(before: Eviction) {
    this.#before = before
  }

  get first(): T | undefined {
    return this.#heap[0]
  }

  get size(): number {
    return this.#heap.length
  }

  add(item: T): void {
    if (item.place >= 0) throw new Error("it is in the queue already")
    this.#put(item, this.#heap.length)
    this.#rise(item)
  }

  /** Takes it out, if it is in. */
  remove(item: T): void {
    if (item.place < 0) return
    const last = this.#heap.pop()!
    if (last !== item) {
      this.#put(last, item.place)
      this.moved(last)
    }
    item.place = -1
  }

  /** Its rank has changed. */
  moved(item: T): void {
    if (item.place < 0) return
    this.#rise(item)
    this.#sink(item)
  }

  #put(item: T, place: number): void {
    this.#heap[place] = item
    item.place = place
  }

  #rise(item: T): void {
    while (item.place > 0) {
      const parent = this.#heap[(item.place - 1) >> 1]!
      if (this.#before(parent, item) <= 0) return
      this.#swap(item, parent)
    }
  }

  #sink(item: T): void {
    for (;;) {
      const [left, right] = [this.#heap[2 * item.place + 1], this.#heap[2 * item.place + 2]]
      const child = left !== undefined && right !== undefined && this.#before(right, left) < 0 ? right : left
      if (child === undefined || this.#before(item, child) <= 0) return
      this.#swap(child, item)
    }
  }

  #swap(a: T, b: T): void {
    const place = a.place
    this.#put(a, b.place)
    this.#put(b, place)
  }
}
