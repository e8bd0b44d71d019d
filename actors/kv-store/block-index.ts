/**
 * What one tier holds: blocks by key under a limit of bytes, of which those that are coming count as well. Above the high
 * watermark it gives up blocks, in the order of its policy, down to the low one; never one that is leased (being read or
 * written on) or pinned. Pure data: where the bytes are is the tier's.
 */
import { limits } from "../../config/limits.ts"
import { EvictionQueue, type Eviction, type Kept } from "./eviction.ts"
import type { Pin } from "./pins.ts"

export interface BlockIndexOptions<V> {
  readonly capacityBytes: number
  readonly eviction: Eviction
  /** Called with what is given up for others; its place may be used again. */
  readonly onEvict?: (value: V) => void
  /** Milliseconds, for the ends of pins. */
  readonly now?: () => number
  /** Whether a block that comes is to be pinned. */
  readonly pinOf?: (key: string) => Pin | undefined
}

export interface Lease<V> {
  readonly value: V
  release(): void
}

export interface NewBlock<V> {
  readonly key: string
  readonly value: V
  readonly bytes: number
  readonly depth: number
  /** Absent: now. */
  readonly usedAt?: number
}

interface Entry<V> extends NewBlock<V>, Kept {
  uses: number
  usedAt: number
  leases: number
  pinnedUntilMs: number
  /** On whose account it is pinned. */
  pinnedFor: string
  /** In the queue of what may be given up; -1: not in it. */
  place: number
}

export class BlockIndex<V> {
  readonly capacityBytes: number
  readonly #options: BlockIndexOptions<V>
  readonly #entries = new Map<string, Entry<V>>()
  readonly #evictable: EvictionQueue<Entry<V>>
  readonly #pinned = new Set<Entry<V>>()
  readonly #pinnedBytes = new Map<string, number>() // by tenant
  #bytes = 0
  #reservedBytes = 0
  #clock = 0
  /** Blocks given up since the start. */
  evicted = 0

  constructor(options: BlockIndexOptions<V>) {
    this.#options = options
    this.capacityBytes = options.capacityBytes
    this.#evictable = new EvictionQueue(options.eviction)
  }

  get bytes(): number {
    return this.#bytes
  }

  get size(): number {
    return this.#entries.size
  }

  get pinnedBytes(): number {
    let sum = 0
    for (const bytes of this.#pinnedBytes.values()) sum += bytes
    return sum
  }

  has(key: string): boolean {
    return this.#entries.has(key)
  }

  /** A block's place in its chain; 0 where it is not here. */
  depth(key: string): number {
    return this.#entries.get(key)?.depth ?? 0
  }

  /** How often a block was used; 0 where it is not here. */
  uses(key: string): number {
    return this.#entries.get(key)?.uses ?? 0
  }

  /** The block, which counts as a use of it. */
  use(key: string, usedAt = ++this.#clock): V | undefined {
    const entry = this.#entries.get(key)
    if (entry === undefined) return undefined
    entry.uses++
    entry.usedAt = usedAt
    this.#evictable.moved(entry)
    return entry.value
  }

  /** Keeps a block here until it is released, however old it gets; no use of it. */
  lease(key: string): Lease<V> | undefined {
    const entry = this.#entries.get(key)
    if (entry === undefined) return undefined
    entry.leases++
    this.#evictable.remove(entry)
    let released = false
    const release = () => {
      if (released) return
      released = true
      entry.leases--
      this.#settle(entry)
    }
    return { value: entry.value, release }
  }

  /** Keeps a block here until then, or lets it go. False where it is not here, or too much is pinned, in all or for this tenant. */
  pin(key: string, pin: Pin | undefined): boolean {
    const entry = this.#entries.get(key)
    if (entry === undefined) return false
    this.#unpinExpired()
    if (pin === undefined || pin.untilMs <= this.#now()) {
      this.#unpin(entry)
      return true
    }
    if (!this.#pinned.has(entry)) {
      const ofTenant = (this.#pinnedBytes.get(pin.tenant) ?? 0) + entry.bytes
      const ofAll = this.pinnedBytes + entry.bytes
      if (ofAll > this.capacityBytes * limits.storePinShare || ofTenant > this.capacityBytes * limits.storePinTenantShare) return false
      this.#pinnedBytes.set(pin.tenant, ofTenant)
      this.#pinned.add(entry)
      entry.pinnedFor = pin.tenant
      this.#evictable.remove(entry)
    }
    entry.pinnedUntilMs = pin.untilMs
    return true
  }

  /** Makes room for bytes that are coming, giving up blocks for them. False, and nothing is given up, where others' are coming already. */
  reserve(bytes: number): boolean {
    if (!this.#makeRoom(bytes)) return false
    this.#reservedBytes += bytes
    return true
  }

  /** Gives back what was reserved: its bytes are to be added now, or are not coming. */
  release(bytes: number): void {
    this.#reservedBytes -= bytes
  }

  /** Keeps a block, giving up others for it; one that is here already is used. False where there is no room. */
  add(block: NewBlock<V>): boolean {
    const usedAt = block.usedAt ?? ++this.#clock
    if (this.use(block.key, usedAt) !== undefined) return true
    if (!this.#makeRoom(block.bytes)) return false
    const entry: Entry<V> = { ...block, uses: 0, usedAt, leases: 0, pinnedUntilMs: 0, pinnedFor: "", place: -1 }
    this.#entries.set(block.key, entry)
    this.#bytes += block.bytes
    this.#evictable.add(entry)
    const pin = this.#options.pinOf?.(block.key)
    if (pin !== undefined) this.pin(block.key, pin)
    return true
  }

  /** Forgets a block. False, and nothing happens, while it is leased. */
  remove(key: string): boolean {
    const entry = this.#entries.get(key)
    if (entry === undefined) return true
    if (entry.leases > 0) return false
    this.#drop(entry)
    return true
  }

  /** Every limit is kept and every count agrees; throws on the first that does not. */
  checkInvariants(): void {
    const entries = [...this.#entries.values()]
    const sum = (of: ReadonlyArray<Entry<V>>) => of.reduce((bytes, entry) => bytes + entry.bytes, 0)
    if (sum(entries) !== this.#bytes) throw new Error(`${sum(entries)} bytes are here, ${this.#bytes} are counted`)
    for (const tenant of new Set([...this.#pinnedBytes.keys(), ...[...this.#pinned].map(({ pinnedFor }) => pinnedFor)])) {
      const pinned = sum([...this.#pinned].filter(({ pinnedFor }) => pinnedFor === tenant))
      if (pinned === 0 || pinned !== this.#pinnedBytes.get(tenant)) throw new Error(`${pinned} bytes are pinned for ${tenant}, ${this.#pinnedBytes.get(tenant)} are counted`)
    }
    if (this.#bytes + this.#reservedBytes > this.capacityBytes) throw new Error(`${this.#bytes} bytes and ${this.#reservedBytes} reserved are more than ${this.capacityBytes}`)
    const free = entries.filter((entry) => entry.leases === 0 && !this.#pinned.has(entry))
    if (free.length !== this.#evictable.size || free.some(({ place }) => place < 0)) throw new Error(`${free.length} blocks may be given up, ${this.#evictable.size} are in the queue`)
  }

  #makeRoom(bytes: number): boolean {
    if (this.#reservedBytes + bytes > this.capacityBytes) return false
    const taken = () => this.#bytes + this.#reservedBytes + bytes
    const [high, low] = [this.capacityBytes * limits.storeHighWatermark, this.capacityBytes * limits.storeLowWatermark]
    if (taken() <= high) return true
    this.#unpinExpired()
    for (let given = 0; taken() > (given < limits.storeEvictionBatch ? low : high); given++) {
      const entry = this.#evictable.first
      if (entry === undefined) break
      this.#drop(entry)
      this.evicted++
      this.#options.onEvict?.(entry.value)
    }
    return taken() <= this.capacityBytes
  }

  #drop(entry: Entry<V>): void {
    this.#entries.delete(entry.key)
    this.#bytes -= entry.bytes
    this.#unpin(entry)
    this.#evictable.remove(entry)
  }

  #unpinExpired(): void {
    const now = this.#now()
    for (const entry of this.#pinned) if (entry.pinnedUntilMs <= now) this.#unpin(entry)
  }

  #unpin(entry: Entry<V>): void {
    if (!this.#pinned.delete(entry)) return
    const left = this.#pinnedBytes.get(entry.pinnedFor)! - entry.bytes
    if (left === 0) this.#pinnedBytes.delete(entry.pinnedFor)
    else this.#pinnedBytes.set(entry.pinnedFor, left)
    this.#settle(entry)
  }

  /** Back among what may be given up, where nothing keeps it. */
  #settle(entry: Entry<V>): void {
    if (entry.leases === 0 && !this.#pinned.has(entry) && entry.place < 0 && this.#entries.get(entry.key) === entry) this.#evictable.add(entry)
  }

  #now(): number {
    return this.#options.now?.() ?? performance.now()
  }
}
