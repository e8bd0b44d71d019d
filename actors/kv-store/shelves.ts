/**
 * The files of a disk tier, one for each format, and which of their slots hold what. All files together have a limit of
 * bytes: where one has to grow, the others are cut from their ends, the one that was used least recently first.
 */
import { readdirSync, unlinkSync } from "node:fs"
import { join } from "node:path"
import type { BlockHash } from "../messages/hashes.ts"
import type { BlockIndex, NewBlock } from "./block-index.ts"
import { sameLayout, type StoredFormat } from "./formats.ts"
import { isSlotFileName, SlotFile } from "./slot-file.ts"

export interface Shelf {
  readonly file: SlotFile
  /** Slots that hold nothing. */
  readonly free: Array<number>
  readonly keys: Array<string | undefined> // [slots]
  usedAtMs: number
  /** Has been said. */
  damaged: boolean
}

/** Where a block is. */
export interface Place {
  readonly shelf: Shelf
  readonly slot: number
  readonly hash: BlockHash
}

export const blockKey = (formatId: string, hash: BlockHash): string => `${formatId}/${hash}`

export interface ShelvesOptions {
  readonly folder: string
  readonly capacityBytes: number
  readonly index: BlockIndex<Place>
  readonly warn: (message: string) => void
}

export class Shelves {
  readonly #options: ShelvesOptions
  readonly #shelves = new Set<Shelf>()

  constructor(options: ShelvesOptions) {
    this.#options = options
  }

  /** Takes over what is in the folder. What is no file of a store, or damaged, is skipped. */
  async find(): Promise<void> {
    const { folder, capacityBytes, warn } = this.#options
    for (const name of readdirSync(folder)) {
      if (name === "lock" || name.startsWith("lock.")) continue
      try {
        if (!isSlotFileName(name)) throw new Error("it is no file of the KV store")
        await this.#take(await SlotFile.open(folder, name))
      } catch (error) {
        warn(`${join(folder, name)} is skipped: ${(error as Error).message}`)
      }
    }
    await this.#shrinkTo(capacityBytes, undefined)
  }

  /** The shelf of a format, made where there is none; undefined where it cannot be kept. */
  async of({ formatId, layout }: StoredFormat): Promise<Shelf | undefined> {
    for (const shelf of this.#shelves) if (shelf.file.formatId === formatId) return sameLayout(shelf.file.layout, layout) ? shelf : undefined
    const file = await SlotFile.create(this.#options.folder, formatId, layout)
    if (file === undefined) return undefined
    const shelf: Shelf = { file, free: [], keys: [], usedAtMs: Date.now(), damaged: false }
    this.#shelves.add(shelf)
    return shelf
  }

  /** An empty slot, which is the caller's until `keep` or `vacate`; undefined where there is no room for it. */
  async slotOn(shelf: Shelf): Promise<number | undefined> {
    const free = shelf.free.pop()
    if (free !== undefined) return free
    return (await this.#shrinkTo(this.#options.capacityBytes - shelf.file.slotBytes, shelf)) ? shelf.file.slots : undefined
  }

  /** What is in a slot becomes known. */
  keep({ shelf, slot, hash }: Place, block: Pick<NewBlock<Place>, "depth" | "usedAt">): void {
    const key = blockKey(shelf.file.formatId, hash)
    if (!this.#options.index.has(key) && this.#options.index.add({ ...block, key, value: { shelf, slot, hash }, bytes: shelf.file.slotBytes })) shelf.keys[slot] = key
    else this.vacate({ shelf, slot })
  }

  /** A slot may be used again. */
  vacate({ shelf, slot }: Pick<Place, "shelf" | "slot">): void {
    shelf.keys[slot] = undefined
    if (slot < shelf.file.slots) shelf.free.push(slot)
  }

  async close(): Promise<void> {
    for (const { file } of this.#shelves) {
      await file.flush().catch(() => {})
      await file.close().catch(() => {})
    }
  }

  async #take(file: SlotFile): Promise<void> {
    try {
      const { blocks, damaged } = await file.scan()
      if (damaged > 0) this.#options.warn(`${file.path}: ${damaged === 1 ? "a block is skipped: it is" : `${damaged} blocks are skipped: they are`} damaged`)
      const shelf: Shelf = { file, free: [], keys: blocks.map(() => undefined), usedAtMs: blocks.reduce((newest, block) => Math.max(newest, block?.writtenAtMs ?? 0), 0), damaged: damaged > 0 }
      this.#shelves.add(shelf)
      blocks.forEach((block, slot) => {
        if (block === undefined) this.vacate({ shelf, slot })
        // Older than everything that is used from now on.
        else this.keep({ shelf, slot, hash: block.hash }, { depth: block.depth, usedAt: Math.min(0, block.writtenAtMs - Date.now()) })
      })
    } catch (error) {
      await file.close()
      throw error
    }
  }

  /** Cuts the other files until all together have at most these bytes. False where that is not possible. */
  async #shrinkTo(bytes: number, except: Shelf | undefined): Promise<boolean> {
    const { index } = this.#options
    const excess = () => [...this.#shelves].reduce((sum, { file }) => sum + file.bytes, 0) - bytes
    for (const shelf of [...this.#shelves].filter((other) => other !== except).sort((a, b) => a.usedAtMs - b.usedAtMs)) {
      const { file, keys, free } = shelf
      let over = excess()
      if (over <= 0) return true
      let slots = file.slots
      for (; over > 0 && slots > 0; over -= file.slotBytes) {
        const key = keys[slots - 1]
        if (key !== undefined && !index.remove(key)) break // it is being read
        if (key !== undefined) index.evicted++
        slots--
      }
      keys.length = slots
      free.splice(0, free.length, ...free.filter((slot) => slot < slots))
      if (slots > 0) await file.truncate(slots)
      else await this.#discard(shelf)
    }
    return excess() <= 0
  }

  async #discard(shelf: Shelf): Promise<void> {
    this.#shelves.delete(shelf)
    await shelf.file.close()
    unlinkSync(shelf.file.path)
  }
}
