/**
 * Blocks by key under a limit of bytes, which those that are still coming count towards; the least recently used go first. Pure data: the KV-store actor's policy.
 */
export class BlockCache {
  readonly #capacityBytes: number
  /** Least recently used first (a Map keeps the order of insertion). */
  readonly #blocks = new Map<string, Uint8Array>()
  #bytes = 0
  #reservedBytes = 0

  constructor(capacityBytes: number) {
    this.#capacityBytes = capacityBytes
  }

  get bytes(): number {
    return this.#bytes
  }

  get size(): number {
    return this.#blocks.size
  }

  has(key: string): boolean {
    return this.#blocks.has(key)
  }

  /** The block, which becomes the most recently used. */
  get(key: string): Uint8Array | undefined {
    const bytes = this.#blocks.get(key)
    if (bytes === undefined) return undefined
    this.#blocks.delete(key)
    this.#blocks.set(key, bytes)
    return bytes
  }

  /** Makes room for bytes that are coming, evicting blocks for them. False, and nothing is evicted, where others' are coming already. */
  reserve(bytes: number): boolean {
    if (this.#reservedBytes + bytes > this.#capacityBytes) return false
    this.#reservedBytes += bytes
    this.#evict()
    return true
  }

  /** Gives back what was reserved: its bytes are to be put now, or are not coming. */
  release(bytes: number): void {
    this.#reservedBytes -= bytes
  }

  /** Keeps a block, evicting others for it. False when it is larger than the room beside what is reserved. */
  put(key: string, bytes: Uint8Array): boolean {
    if (bytes.byteLength > this.#capacityBytes - this.#reservedBytes) return false
    if (this.get(key) !== undefined) return true
    this.#blocks.set(key, bytes)
    this.#bytes += bytes.byteLength
    this.#evict()
    return true
  }

  #evict(): void {
    for (const [oldest, evicted] of this.#blocks) {
      if (this.#bytes + this.#reservedBytes <= this.#capacityBytes) break
      this.#blocks.delete(oldest)
      this.#bytes -= evicted.byteLength
    }
  }
}
