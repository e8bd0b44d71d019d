/**
 * Blocks on disk, in a folder that one process has for itself. They are written one at a time in the background and read two
 * at a time, all off the event loop. What goes wrong with the disk is said once and costs misses: what is read is checked,
 * and what cannot be written is not there.
 */
import { chmodSync, mkdirSync } from "node:fs"
import { join } from "node:path"
import { takeLock, type Release } from "../../config/folder-lock.mjs"
import { limits } from "../../config/limits.ts"
import type { BlockHash } from "../messages/hashes.ts"
import { BlockIndex, type BlockIndexOptions, type Lease } from "./block-index.ts"
import type { Eviction } from "./eviction.ts"
import type { StoredFormat } from "./formats.ts"
import { blockKey, Shelves, type Place } from "./shelves.ts"
import type { SlotFile } from "./slot-file.ts"

export interface DiskTierOptions {
  readonly folder: string
  readonly capacityBytes: number
  readonly eviction: Eviction
  readonly pinOf?: BlockIndexOptions<unknown>["pinOf"]
  readonly warn: (message: string) => void
}

export interface DiskBlock extends StoredFormat {
  readonly hash: BlockHash
  readonly depth: number
  readonly bytes: Uint8Array
  readonly writtenAtMs: number
  readonly usedAt: number
}

export class DiskTier {
  readonly index: BlockIndex<Place>
  readonly #options: DiskTierOptions
  readonly #release: Release
  readonly #shelves: Shelves
  readonly #queue: Array<{ readonly block: DiskBlock; readonly done: () => void }> = [] // the first is being written
  #queuedBytes = 0
  #writing: Promise<void> = Promise.resolve()
  readonly #lanes: Array<Promise<unknown>> = Array.from({ length: limits.storeDiskReads }, () => Promise.resolve())
  #lane = 0
  #failed = false
  #pausedUntilMs = 0

  private constructor(options: DiskTierOptions, release: Release) {
    this.#options = options
    this.#release = release
    this.index = new BlockIndex<Place>({ ...options, onEvict: (place) => this.#shelves.vacate(place) })
    this.#shelves = new Shelves({ ...options, index: this.index })
  }

  /** Takes the folder's lock and finds what is there. Throws where the folder cannot be used, or another process has it. */
  static async open(options: DiskTierOptions): Promise<DiskTier> {
    const { folder } = options
    mkdirSync(folder, { recursive: true, mode: 0o700 })
    chmodSync(folder, 0o700)
    const tier = new DiskTier(options, await takeLock(join(folder, "lock"), { deadlineMs: limits.storeLockDeadlineMs }))
    try {
      await tier.#shelves.find()
      return tier
    } catch (error) {
      await tier.close()
      throw error
    }
  }

  /** Queues a block to be written, and calls back when it needs its bytes no more. False where it will not be written. */
  write(block: DiskBlock, done: () => void): boolean {
    const mayWait = Math.min(limits.storeDiskQueueBytes, this.#options.capacityBytes)
    if (this.#isPaused || this.#queuedBytes + block.bytes.byteLength > mayWait || this.index.has(blockKey(block.formatId, block.hash))) return false
    this.#queue.push({ block, done })
    this.#queuedBytes += block.bytes.byteLength
    if (this.#queue.length === 1) this.#writing = this.#writing.then(() => this.#writeQueued())
    return true
  }

  /** The bytes of a block, checked, and the end of its lease; undefined where they are damaged, and then the block is forgotten. */
  read(key: string, { value, release }: Lease<Place>): Promise<Uint8Array | undefined> {
    const { shelf, slot, hash } = value
    const read = async (): Promise<Uint8Array | undefined> => {
      let found: Uint8Array | undefined
      let why = "it is damaged"
      try {
        found = await shelf.file.read(slot, hash)
      } catch (error) {
        why = (error as Error).message
      }
      release()
      shelf.usedAtMs = Date.now()
      if (found === undefined) this.#forget(key, value, why)
      return found
    }
    this.#lane = (this.#lane + 1) % this.#lanes.length
    const reading = this.#lanes[this.#lane]!.then(read)
    this.#lanes[this.#lane] = reading
    return reading
  }

  /** What is queued is written and flushed, if that does not take too long, and the folder is free again. */
  async close(): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<void>((resolve) => (timer = setTimeout(resolve, limits.storeFlushDeadlineMs)))
    await Promise.race([this.#writing, late])
    clearTimeout(timer)
    for (const { done } of this.#queue.splice(0)) done()
    await Promise.all([this.#writing, ...this.#lanes])
    await this.#shelves.close()
    this.#release()
  }

  /** Whether blocks wait to be written. */
  get isWriting(): boolean {
    return this.#queue.length > 0
  }

  get #isPaused(): boolean {
    return performance.now() < this.#pausedUntilMs
  }

  #forget(key: string, { shelf, slot }: Place, why: string): void {
    if (shelf.keys[slot] !== key || !this.index.remove(key)) return
    this.#shelves.vacate({ shelf, slot })
    if (!shelf.damaged) this.#options.warn(`${shelf.file.path}: a block is skipped: ${why}`)
    shelf.damaged = true
  }

  async #writeQueued(): Promise<void> {
    const written = new Set<SlotFile>()
    for (let next = this.#queue[0]; next !== undefined; next = this.#queue[0]) {
      const { block, done } = next
      try {
        const file = await this.#write(block)
        if (file !== undefined) written.add(file)
        // What has come meanwhile is flushed together.
        if (this.#queue.length <= 1) for (const file of written) await file.flush()
        if (file !== undefined) this.#failed = false
      } catch (error) {
        this.#fails(error as Error)
      }
      if (this.#queue[0] === next) this.#queue.shift()
      this.#queuedBytes -= block.bytes.byteLength
      done()
    }
  }

  async #write({ formatId, layout, hash, depth, bytes, writtenAtMs, usedAt }: DiskBlock): Promise<SlotFile | undefined> {
    if (this.#isPaused || this.index.has(blockKey(formatId, hash))) return undefined
    const shelf = await this.#shelves.of({ formatId, layout })
    if (shelf === undefined || !this.index.reserve(shelf.file.slotBytes)) return undefined
    let slot: number | undefined
    let whole = false
    try {
      slot = await this.#shelves.slotOn(shelf)
      if (slot === undefined) return undefined
      await shelf.file.write(slot, { hash, depth, writtenAtMs }, bytes)
      whole = true
    } finally {
      this.index.release(shelf.file.slotBytes)
      if (slot !== undefined && !whole) this.#shelves.vacate({ shelf, slot })
    }
    shelf.usedAtMs = Date.now()
    this.#shelves.keep({ shelf, slot, hash }, { depth, usedAt })
    return shelf.file
  }

  /** Nothing is written for a while, and one line says so for a run of failures. */
  #fails(error: Error): void {
    this.#pausedUntilMs = performance.now() + limits.storeDiskRetryMs
    if (!this.#failed) this.#options.warn(`${this.#options.folder}: new blocks are kept in memory only, until the disk takes them again: ${error.message}`)
    this.#failed = true
  }
}
