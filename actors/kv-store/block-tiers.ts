/**
 * The store's blocks in memory and on disk. What is put is in memory at once and written to disk in the background, whatever
 * happens to it later (write-through): a process that is killed has lost nothing but what was just written, and memory gives
 * blocks up without waiting for the disk. What is found on disk only comes back to memory. The bytes of what is being read,
 * sent and written count as memory, which bounds them.
 */
import type { StorePresence, TierPresence } from "../messages/presence.ts"
import type { BlockHash } from "../messages/hashes.ts"
import { BlockIndex } from "./block-index.ts"
import type { DiskTier } from "./disk-tier.ts"
import type { Eviction } from "./eviction.ts"
import { sameLayout, type StoredFormat } from "./formats.ts"
import { Pins } from "./pins.ts"
import { blockKey } from "./shelves.ts"

export interface PutBlock {
  readonly hash: BlockHash
  readonly depth: number
  readonly bytes: Uint8Array
}

/** Blocks that stay where they are until `release`. */
export interface TakenBlocks {
  /** Undefined where the disk has spoilt it. */
  readonly block: (i: number) => Promise<Uint8Array | undefined>
  readonly release: () => void
}

interface InMemory {
  readonly bytes: Uint8Array
}

interface Counts {
  hits: number
  misses: number
}

export class BlockTiers {
  /** Where there is one now. */
  disk: DiskTier | undefined
  readonly memory: BlockIndex<InMemory>
  readonly pins = new Pins()
  #clock = 0
  readonly #counts: Readonly<Record<"memory" | "disk", Counts>> = { memory: { hits: 0, misses: 0 }, disk: { hits: 0, misses: 0 } }

  constructor(options: { readonly memoryBytes: number; readonly eviction: Eviction }) {
    this.memory = new BlockIndex({ capacityBytes: options.memoryBytes, eviction: options.eviction, pinOf: (key) => this.pins.of(key) })
  }

  has(key: string): boolean {
    return this.memory.has(key) || this.disk?.index.has(key) === true
  }

  /** Whether a block is on disk, and not in memory. */
  isOnDiskOnly(key: string): boolean {
    return !this.memory.has(key) && this.disk?.index.has(key) === true
  }

  /** Uses of a block since it came to where it is. */
  uses(key: string): number {
    return Math.max(this.memory.uses(key), this.disk?.index.uses(key) ?? 0)
  }

  /** A block's place in its chain. */
  depth(key: string): number {
    return this.memory.has(key) ? this.memory.depth(key) : (this.disk?.index.depth(key) ?? 0)
  }

  /** Counts a use of blocks, all at one time. False for those that are nowhere. */
  use(keys: ReadonlyArray<string>): ReadonlyArray<boolean> {
    const usedAt = ++this.#clock
    return keys.map((key) => {
      const inMemory = this.memory.use(key, usedAt) !== undefined
      return this.disk?.index.use(key, usedAt) !== undefined || inMemory
    })
  }

  /** Has an owner's blocks kept until then, those that are here and those that come; a time that has passed lets them go. */
  pin(owner: string, tenant: string, keys: ReadonlyArray<string>, untilMs: number): ReadonlyArray<boolean> {
    const isPinned = new Set<string>()
    for (const key of this.pins.set(owner, tenant, keys, untilMs)) {
      const pin = this.pins.of(key)
      const inMemory = this.memory.pin(key, pin)
      if ((this.disk?.index.pin(key, pin) === true || inMemory) && pin !== undefined) isPinned.add(key)
    }
    return keys.map((key) => isPinned.has(key))
  }

  /** Somebody looked for these to have them sent, and they are nowhere. */
  missed(blocks: number): void {
    this.#counts.memory.misses += blocks
    if (this.disk !== undefined) this.#counts.disk.misses += blocks
  }

  /** Blocks for being sent: all of them, or undefined where one is not here or there is no memory to read it into. */
  take({ formatId, layout }: StoredFormat, hashes: ReadonlyArray<BlockHash>): TakenBlocks | undefined {
    const blockBytes = layout.layers * layout.layerBlockBytes
    const keys = hashes.map((hash) => blockKey(formatId, hash))
    const { disk } = this
    const inMemory = keys.map((key) => this.memory.lease(key))
    const onDisk = keys.map((key, i) => (inMemory[i] === undefined ? disk?.index.lease(key) : undefined))
    const fits = (i: number): boolean => {
      if (inMemory[i] !== undefined) return inMemory[i].value.bytes.byteLength === blockBytes
      return onDisk[i] !== undefined && sameLayout(onDisk[i].value.shelf.file.layout, layout)
    }
    const read = onDisk.filter((lease) => lease !== undefined).length
    const room = keys.length > 0 && keys.every((_, i) => fits(i)) && this.memory.reserve(read * blockBytes)
    let reserved = room ? read : 0
    const release = () => {
      for (const lease of [...inMemory, ...onDisk]) lease?.release()
      this.memory.release(reserved * blockBytes)
      reserved = 0
    }
    if (!room) {
      release()
      return undefined
    }
    this.#counts.memory.hits += keys.length - read
    this.#counts.memory.misses += read
    this.#counts.disk.hits += read
    const usedAt = this.#clock
    const promote = async (key: string, i: number): Promise<Uint8Array | undefined> => {
      const depth = this.depth(key)
      const bytes = await disk!.read(key, onDisk[i]!)
      if (bytes === undefined || reserved === 0) return bytes
      reserved--
      this.memory.release(blockBytes)
      if (this.memory.add({ key, value: { bytes }, bytes: blockBytes, depth, usedAt })) inMemory[i] = this.memory.lease(key)
      return bytes
    }
    return { block: async (i) => inMemory[i]?.value.bytes ?? promote(keys[i]!, i), release }
  }

  /** Keeps whole blocks, for whose bytes room was reserved in memory, and has them written. */
  put(format: StoredFormat, blocks: ReadonlyArray<PutBlock>): void {
    const usedAt = ++this.#clock
    const writtenAtMs = Date.now()
    for (const { hash, depth, bytes } of blocks) {
      const key = blockKey(format.formatId, hash)
      if (!this.memory.add({ key, value: { bytes }, bytes: bytes.byteLength, depth, usedAt })) continue
      const lease = this.memory.lease(key)!
      if (this.disk?.write({ ...format, hash, depth, bytes, usedAt, writtenAtMs }, lease.release) !== true) lease.release()
    }
  }

  /** What an operator sees of each tier. */
  get figures(): StorePresence {
    const of = ({ size, bytes, capacityBytes, evicted }: Pick<BlockIndex<never>, "size" | "bytes" | "capacityBytes" | "evicted">, counts: Counts): TierPresence => ({ blocks: size, bytes, limitBytes: capacityBytes, ...counts, evictions: evicted })
    return { memory: of(this.memory, this.#counts.memory), disk: this.disk === undefined ? undefined : of(this.disk.index, this.#counts.disk) }
  }
}
