/**
 * The receiving side of a KV transfer, which opens it: chunks are checked and written once each, in whatever order and
 * number they come. Nothing counts as received before its CRC has been found right and it is there, and nothing is complete
 * before every layer of every block is.
 */
import { limits } from "../../config/limits.ts"
import type { KvDtype } from "../../kernels/index.ts"
import type { Bus, Subscription } from "../runtime/bus.ts"
import { header, protocolVersion } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import { headerForCrc, kvChunkHeaderBytes, readChunkHeader, type ChunkRange, type KvChunkHeader } from "../messages/kv-chunk.ts"
import { KvProgress, KvStatus, type KvProgressMessage } from "../messages/kv-transfer.ts"
import { transferSubject } from "../messages/subjects.ts"
import type { PoolBlocks } from "../engine/pool-blocks.ts"
import { LocalReceiver } from "./local-receiver.ts"
import { Settlement } from "./settlement.ts"

/** Where the bytes go. */
export interface ChunkSink {
  readonly dtype: KvDtype
  readonly blockTokens: number
  readonly layers: number
  readonly layerBlockBytes: number
  crc32c(bytes: Uint8Array, seed: number): number
  /** Writes a payload in place; false where its CRC-32C, continued from `seed`, is not `crc`. Throws where its place is gone. */
  take(range: ChunkRange, payload: Uint8Array, seed: number, crc: number): boolean
  /** Where that is a pool: senders of this process may have it copied from theirs. */
  readonly blocks?: PoolBlocks
}

export interface ReceiverOptions {
  readonly control: Bus
  readonly bulk: Bus
  readonly namespace: string
  readonly transferId: string
  readonly sink: ChunkSink
  /** The blocks that are to come, as places in the receiver's table. */
  readonly firstBlock: number
  readonly blocks: number
  readonly creditBytes: number
  /** Names the sender in faults. */
  readonly hop: string
}

export interface ReceivedTransfer {
  readonly chunks: number
  readonly bytes: number
  readonly ms: number
  readonly corrupted: number
  readonly duplicates: number
  /** First tokens of the choices, as token frames. */
  readonly first: ReadonlyArray<Uint8Array>
}

/** Missing chunks that one status names; the next names more. */
const missingOfMessage = 256

export class TransferReceiver {
  /** Settles when everything is here, or the transfer has failed. */
  readonly done: Promise<ReceivedTransfer>
  readonly #options: Omit<ReceiverOptions, "sink">
  #sink: ChunkSink | undefined // until it fails: what is there is another's then
  readonly #cells: Uint8Array // [layers, blocks] 1: written and checked
  readonly #local: LocalReceiver | undefined
  readonly #taken = new Set<number>() // sequence numbers
  readonly #askedAtMs = new Map<number, number>() // when a missing chunk was last asked for
  #newest = -1 // largest sequence number taken
  #gapless = 0 // all below are taken
  #quietSeen = -1 // what the sender said last time, where no chunk has come since
  readonly #subscriptions: ReadonlyArray<Subscription>
  readonly #timer: NodeJS.Timeout
  readonly #outcome = new Settlement<ReceivedTransfer>()
  #missingCells: number
  #bytes = 0
  #toldBytes = 0
  #seen = 0 // chunks that were certainly sent
  #corrupted = 0
  #duplicates = 0
  #over = false
  #complete = false
  #failure: string | undefined
  #first: ReadonlyArray<Uint8Array> | undefined // known once the sender has nothing more
  #heardAtMs: number | undefined // a prompt may wait long for its turn: silence counts from the sender's first word on, or from a failure
  #firstChunkAtMs: number | undefined

  constructor(options: ReceiverOptions) {
    const { sink, ...rest } = options
    this.#options = rest
    this.#sink = sink
    this.done = this.#outcome.promise
    this.#missingCells = sink.layers * options.blocks
    this.#cells = new Uint8Array(this.#missingCells)
    const { control, bulk, namespace, transferId } = options
    const chunks = transferSubject(namespace, transferId, "chunk")
    const lost = () => this.#end(this.#fault("disconnected", "the connection was lost"))
    this.#subscriptions = [
      bulk.subscribe(chunks, ({ data }) => this.#chunk(data)),
      control.subscribe(transferSubject(namespace, transferId, "progress"), ({ data }) => this.#progress(data)),
      control.onDisconnect(lost),
      bulk.onDisconnect(lost),
    ]
    this.#local = sink.blocks && new LocalReceiver(chunks, sink.blocks)
    this.#timer = setInterval(() => this.#watch(), limits.kvProgressIntervalMs)
    this.#timer.unref()
  }

  /** Gives the transfer up and tells the sender why: now, and, for `kvSilenceMs` from its last word, one that has not heard it or has yet to begin. */
  fail(fault: Fault): void {
    if (this.#over || this.#failure !== undefined) return
    if (this.#complete) return this.close()
    this.#failure = fault.message
    this.#sink = undefined
    this.#heardAtMs = performance.now()
    this.#local?.close()
    this.#tell()
    this.#outcome.reject(fault)
  }

  /** Takes nothing more, and answers nothing. */
  close(): void {
    this.#over = true
    this.#local?.close()
    clearInterval(this.#timer)
    for (const subscription of this.#subscriptions) subscription.unsubscribe()
  }

  /** The sender need not be told. */
  #end(fault: Fault): void {
    this.close()
    this.#outcome.reject(fault)
  }

  /** Nothing more is taken; the sender is answered until it has heard how this ended. */
  get #isDecided(): boolean {
    return this.#complete || this.#failure !== undefined
  }

  #chunk(chunk: Uint8Array): void {
    const sink = this.#sink
    if (this.#over || sink === undefined) return
    this.#heardAtMs = performance.now()
    this.#firstChunkAtMs ??= this.#heardAtMs
    let read: ReturnType<typeof readChunkHeader>
    try {
      read = readChunkHeader(chunk)
    } catch {
      this.#corrupted++ // its header cannot be believed: the sender sends again what stays missing
      return
    }
    const { header: found, crc } = read
    const { transferId, firstBlock, blocks, hop } = this.#options
    const isIntact = () => sink.crc32c(chunk.subarray(kvChunkHeaderBytes), sink.crc32c(headerForCrc(chunk), 0)) === crc
    // To send it again would help no more than the first time.
    if (found.transferId === transferId && found.dtype !== sink.dtype && isIntact()) {
      return this.fail(this.#fault("invalid_request", `it sends KV in ${found.dtype}, and what is here takes ${sink.dtype}`))
    }
    const inside =
      found.transferId === transferId &&
      found.sequence < this.#cells.length &&
      found.layers > 0 &&
      found.blocks > 0 &&
      found.dtype === sink.dtype &&
      found.blockTokens === sink.blockTokens &&
      found.firstLayer + found.layers <= sink.layers &&
      found.firstBlock >= firstBlock &&
      found.firstBlock + found.blocks <= firstBlock + blocks &&
      found.payloadBytes === found.layers * found.blocks * sink.layerBlockBytes
    if (!inside) {
      this.#corrupted++
      return
    }
    if (this.#taken.has(found.sequence) || this.#overlaps(found)) {
      this.#duplicates++
      return
    }
    try {
      if (!this.#take(sink, found, chunk, crc)) {
        this.#corrupted++
        return
      }
    } catch (error) {
      return this.fail(Fault.from(error, hop))
    }
    this.#mark(found)
    this.#taken.add(found.sequence)
    this.#newest = Math.max(this.#newest, found.sequence)
    this.#quietSeen = -1
    this.#bytes += kvChunkHeaderBytes + found.payloadBytes
    while (this.#taken.has(this.#gapless)) this.#gapless++
    if (this.#missingCells === 0 && this.#first !== undefined) return this.#finish()
    if (this.#bytes - this.#toldBytes >= this.#options.creditBytes / 4) this.#tell()
  }

  /** False where it is not what was sent, or nobody has it any more. */
  #take(sink: ChunkSink, found: KvChunkHeader, chunk: Uint8Array, crc: number): boolean {
    const seed = sink.crc32c(headerForCrc(chunk), 0)
    if (found.sender === 0) return sink.take(found, chunk.subarray(kvChunkHeaderBytes), seed, crc)
    return seed === crc && this.#local?.copy(found, found.sender) === true
  }

  #progress(data: Uint8Array): void {
    if (this.#over) return
    let progress: KvProgressMessage
    try {
      progress = KvProgress.decode(data)
    } catch {
      return // as good as lost: it comes again
    }
    const { chunks, closed, failure, final, first } = progress
    this.#heardAtMs = performance.now()
    if (this.#isDecided) return closed || failure !== undefined ? this.close() : this.#tell()
    if (failure !== undefined) return this.#end(this.#fault("disconnected", failure))
    if (final) this.#first = first
    // Progress and chunks travel on different connections: what was sent is lost only when the sender says it again and
    // nothing has come in between.
    if (this.#quietSeen === chunks) this.#seen = Math.max(this.#seen, chunks)
    this.#quietSeen = chunks
    if (this.#missingCells === 0 && this.#first !== undefined) return this.#finish()
    this.#tell()
  }

  /** Sequence numbers that were sent and did not come: chunks keep their order, so a gap below the newest is a loss. */
  #missing(): Array<number> {
    const nowMs = performance.now()
    const missing: Array<number> = []
    for (let sequence = this.#gapless; sequence < Math.max(this.#newest, this.#seen) && missing.length < missingOfMessage; sequence++) {
      if (this.#taken.has(sequence) || nowMs - (this.#askedAtMs.get(sequence) ?? -Infinity) < limits.kvProgressIntervalMs) continue
      this.#askedAtMs.set(sequence, nowMs)
      missing.push(sequence)
    }
    return missing
  }

  #overlaps({ firstLayer, layers, firstBlock, blocks }: ChunkRange): boolean {
    for (let layer = firstLayer; layer < firstLayer + layers; layer++) {
      const from = layer * this.#options.blocks + firstBlock - this.#options.firstBlock
      for (let cell = from; cell < from + blocks; cell++) if (this.#cells[cell] === 1) return true
    }
    return false
  }

  #mark({ firstLayer, layers, firstBlock, blocks }: ChunkRange): void {
    for (let layer = firstLayer; layer < firstLayer + layers; layer++) {
      const from = layer * this.#options.blocks + firstBlock - this.#options.firstBlock
      this.#cells.fill(1, from, from + blocks)
    }
    this.#missingCells -= layers * blocks
  }

  #finish(): void {
    this.#complete = true
    this.#tell()
    const ms = performance.now() - (this.#firstChunkAtMs ?? performance.now())
    this.#outcome.resolve({ chunks: this.#taken.size, bytes: this.#bytes, ms, corrupted: this.#corrupted, duplicates: this.#duplicates, first: this.#first ?? [] })
    // The last word may be lost: the sender is answered until it says that it has heard it, or is quiet.
  }

  #watch(): void {
    if (this.#heardAtMs === undefined) return
    const silentMs = performance.now() - this.#heardAtMs
    if (silentMs <= limits.kvSilenceMs) return
    if (this.#isDecided) return this.close()
    this.fail(this.#fault("deadline_exceeded", `nothing came for ${Math.round(silentMs)} ms`))
  }

  #tell(): void {
    const { control, namespace, transferId } = this.#options
    this.#toldBytes = this.#bytes
    const status = { bytes: this.#bytes, missing: this.#isDecided ? [] : this.#missing(), complete: this.#complete, failure: this.#failure }
    try {
      control.publish(transferSubject(namespace, transferId, "status"), KvStatus.encode(status), { headers: { [header.version]: protocolVersion } })
    } catch {
      // Disconnected: onDisconnect ends the transfer.
    }
  }

  #fault(code: "disconnected" | "deadline_exceeded" | "invalid_request", message: string): Fault {
    return new Fault({ code, message: `KV transfer from ${this.#options.hop}: ${message}`, hop: this.#options.hop })
  }
}
