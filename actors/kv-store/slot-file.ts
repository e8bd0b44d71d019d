/**
 * A file of KV blocks of one format, all of one size, each in a slot: what one block leaves, the next one fills, and nothing
 * fragments. The head says format and layout, and the file's name is the digest of the head, so that a file whose head is
 * not its own is no such file.
 *
 *     offset   bytes
 *          0    4096  head: JSON, filled up with spaces
 *       4096          slots, each a multiple of 4096 bytes:
 *                 0      4  magic "PSKB"
 *                 4      4  place of the block in its chain
 *                 8     16  hash
 *                24      8  when it was written, ms since 1970
 *                32      4  bytes of the block
 *                36      4  CRC-32C of the block, continued from that of the file's head and of bytes 0 ... 35
 *                40      4  CRC-32C of bytes 0 ... 39
 *                44     20  zero
 *                64         the block [layer][K|V][kv head][token][head dim]
 *
 * A slot is emptied before it is written and named last, so that a process that is killed leaves a whole block or none; what
 * a power failure mixes up, the CRC shows.
 *
 * Why such files and no lmdb (3.5.6), nor a file for each block: 2 GiB of blocks of 360 KiB, 16 at a time, each time flushed,
 * on 2 busy cores, two runs each. Put 1.6, 1.8 GB/s; lmdb 0.35, 1.0; files 1.1, 0.7. Put into what is full 2.1, 2.2; lmdb 0.5,
 * 1.4; files 0.14, 0.17. Get 6.5, 4.9; lmdb 2.3, 4.3; files 3.4, 3.3. Start with 2 GiB 14 ms; lmdb 5; files 27. Size after a
 * whole turnover 1,991 MiB; lmdb 2,008; files 1,991. (The tier that is made of it, one write and two reads at a time, CRC
 * included: put 1.8 GB/s, get 1.0, start 40 ms.) And lmdb maps its file into memory: where that is cut off or is
 * something else, the process dies of SIGBUS or SIGSEGV, with all that runs in it.
 */
import { createHash } from "node:crypto"
import { readSync } from "node:fs"
import { open, type FileHandle } from "node:fs/promises"
import { join } from "node:path"
import { Schema } from "effect"
import { crc32c } from "../../kernels/index.ts"
import type { KvLayout } from "../engine/worker.ts"
import type { BlockHash } from "../messages/hashes.ts"
import { KvLayoutMessage } from "../messages/kv-store.ts"

const pageBytes = 4096
const recordBytes = 64
const magic = 0x424b5350 // "PSKB"
const version = 1
/** Heads of slots that are read before others have a turn. */
const scanTurn = 64

const Head = Schema.Struct({ penstock: Schema.Literal("KV blocks"), version: Schema.Literal(version), formatId: Schema.String, layout: KvLayoutMessage })
const decodeHead = Schema.decodeUnknownSync(Head)

/** A block as a slot names it. */
export interface StoredBlock {
  readonly hash: BlockHash
  readonly depth: number
  readonly writtenAtMs: number
}

const nameOf = (head: Uint8Array): string => `${createHash("sha256").update(head).digest("hex").slice(0, 32)}.kv`

export const isSlotFileName = (name: string): boolean => /^[0-9a-f]{32}\.kv$/.test(name)

export class SlotFile {
  readonly path: string
  readonly formatId: string
  readonly layout: KvLayout
  readonly blockBytes: number
  readonly slotBytes: number
  /** Slots that the file has room for. */
  slots: number
  readonly #handle: FileHandle
  readonly #headCrc: number
  /** It ends in the middle of a block: whoever wrote it was killed, or somebody cut it. */
  readonly #cutOff: boolean

  private constructor(path: string, handle: FileHandle, head: Uint8Array, size: number) {
    const { formatId, layout } = decodeHead(JSON.parse(Buffer.from(head).toString("utf8")))
    this.path = path
    this.#handle = handle
    this.formatId = formatId
    this.layout = layout
    this.blockBytes = layout.layers * layout.layerBlockBytes
    this.slotBytes = Math.ceil((recordBytes + this.blockBytes) / pageBytes) * pageBytes
    // The last slot ends with its block.
    this.slots = Math.max(0, Math.floor((size - pageBytes - recordBytes - this.blockBytes) / this.slotBytes) + 1)
    this.#cutOff = size > pageBytes + this.slots * this.slotBytes
    this.#headCrc = crc32c(head, 0)
  }

  /** Bytes on disk. */
  get bytes(): number {
    return pageBytes + this.slots * this.slotBytes
  }

  /** Makes the file of a format; undefined where its name is too long to be kept. */
  static async create(folder: string, formatId: string, { layers, dtype, blockTokens, layerBlockBytes }: KvLayout): Promise<SlotFile | undefined> {
    const text = JSON.stringify({ penstock: "KV blocks", version, formatId, layout: { layers, dtype, blockTokens, layerBlockBytes } })
    if (Buffer.byteLength(text) > pageBytes) return undefined
    const head = Buffer.alloc(pageBytes, " ")
    head.write(text)
    const path = join(folder, nameOf(head))
    const handle = await open(path, "w+", 0o600)
    try {
      await writeAll(handle, head, 0)
      return new SlotFile(path, handle, head, pageBytes)
    } catch (error) {
      await handle.close()
      throw error
    }
  }

  /** Opens a file that was made before. Throws where its head is not what its name says. */
  static async open(folder: string, name: string): Promise<SlotFile> {
    const path = join(folder, name)
    const handle = await open(path, "r+")
    try {
      const head = Buffer.alloc(pageBytes)
      const { bytesRead } = await handle.read(head, 0, pageBytes, 0)
      if (bytesRead < pageBytes || nameOf(head) !== name) throw new Error("its head is damaged, or it is another program's")
      return new SlotFile(path, handle, head, (await handle.stat()).size)
    } catch (error) {
      await handle.close()
      throw error
    }
  }

  /** The block of each slot, undefined where there is none; and how many are there whose record cannot be believed. */
  async scan(): Promise<{ readonly blocks: ReadonlyArray<StoredBlock | undefined>; readonly damaged: number }> {
    const blocks: Array<StoredBlock | undefined> = []
    let damaged = this.#cutOff ? 1 : 0
    const record = Buffer.alloc(recordBytes)
    for (let slot = 0; slot < this.slots; slot++) {
      if (slot % scanTurn === scanTurn - 1) await new Promise((resolve) => setImmediate(resolve))
      readSync(this.#handle.fd, record, 0, recordBytes, this.#offset(slot))
      const whole = record.readUInt32LE(0) === magic && crc32c(record.subarray(0, 40), 0) === record.readUInt32LE(40)
      if (!whole && record.some((byte) => byte !== 0)) damaged++
      blocks.push(whole ? { hash: record.toString("latin1", 8, 24), depth: record.readUInt32LE(4), writtenAtMs: Number(record.readBigUInt64LE(24)) } : undefined)
    }
    return { blocks, damaged }
  }

  /** Writes a block; until it is whole, the slot is empty. */
  async write(slot: number, { hash, depth, writtenAtMs }: StoredBlock, block: Uint8Array): Promise<void> {
    const record = Buffer.alloc(recordBytes)
    await writeAll(this.#handle, record, this.#offset(slot))
    await writeAll(this.#handle, block, this.#offset(slot) + recordBytes)
    record.writeUInt32LE(magic, 0)
    record.writeUInt32LE(depth, 4)
    record.write(hash, 8, "latin1")
    record.writeBigUInt64LE(BigInt(writtenAtMs), 24)
    record.writeUInt32LE(block.byteLength, 32)
    record.writeUInt32LE(this.#crc(record, block), 36)
    record.writeUInt32LE(crc32c(record.subarray(0, 40), 0), 40)
    await writeAll(this.#handle, record, this.#offset(slot))
    this.slots = Math.max(this.slots, slot + 1)
  }

  /** The block of this hash; undefined where the slot holds another one or is damaged. */
  async read(slot: number, hash: BlockHash): Promise<Uint8Array | undefined> {
    const record = Buffer.from(new ArrayBuffer(recordBytes + this.blockBytes))
    const { bytesRead } = await this.#handle.read(record, 0, record.byteLength, this.#offset(slot))
    if (bytesRead < record.byteLength || record.readUInt32LE(0) !== magic || record.toString("latin1", 8, 24) !== hash) return undefined
    const block = new Uint8Array(record.buffer, recordBytes)
    return this.#crc(record, block) === record.readUInt32LE(36) ? block : undefined
  }

  /** Leaves room for so many slots, and gives the rest back. */
  async truncate(slots: number): Promise<void> {
    await this.#handle.truncate(pageBytes + slots * this.slotBytes)
    this.slots = slots
  }

  flush(): Promise<void> {
    return this.#handle.datasync()
  }

  close(): Promise<void> {
    return this.#handle.close()
  }

  #offset(slot: number): number {
    return pageBytes + slot * this.slotBytes
  }

  #crc(record: Uint8Array, block: Uint8Array): number {
    return crc32c(block, crc32c(record.subarray(0, 36), this.#headCrc))
  }
}

const writeAll = async (handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> => {
  for (let done = 0; done < bytes.byteLength; ) done += (await handle.write(bytes, done, bytes.byteLength - done, position + done)).bytesWritten
}
