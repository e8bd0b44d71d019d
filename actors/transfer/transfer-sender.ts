/**
 * The sending side of a KV transfer. Chunks are described when their KV exists and written when there is credit; nothing is
 * kept but their description, since the blocks stay where they are until the receiver has everything. What is lost is named
 * by the receiver and written again. To a pool of the same process only descriptions go.
 */
import { limits } from "../../config/limits.ts"
import type { KvDtype } from "../../kernels/index.ts"
import type { Bus, Subscription } from "../runtime/bus.ts"
import { header, protocolVersion } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import { headerForCrc, kvChunkHeaderBytes, sealChunk, writeChunkHeader, type ChunkRange } from "../messages/kv-chunk.ts"
import { KvProgress, KvStatus, type KvStatusMessage } from "../messages/kv-transfer.ts"
import { transferSubject } from "../messages/subjects.ts"
import type { PoolBlocks } from "../engine/pool-blocks.ts"
import { giveChunkBuffer, takeChunkBuffer } from "./chunk-buffers.ts"
import { chunkBytesOn } from "./chunk-limit.ts"
import { LocalReceiver, type LocalSender } from "./local-receiver.ts"
import { Settlement } from "./settlement.ts"

/** Where the bytes come from. */
export interface ChunkSource {
  readonly dtype: KvDtype
  readonly blockTokens: number
  /** Bytes of one layer of one block. */
  readonly layerBlockBytes: number
  crc32c(bytes: Uint8Array, seed: number): number
  /** Writes a chunk's payload at `offset` and returns its CRC-32C, continued from `seed`. Throws where the KV is gone. */
  write(range: ChunkRange, into: Uint8Array, offset: number, seed: number): number
  /** Where that is a pool: a receiver of this process may copy from it. */
  readonly blocks?: PoolBlocks
}

export interface SenderOptions {
  readonly control: Bus
  readonly bulk: Bus
  readonly namespace: string
  readonly transferId: string
  readonly source: ChunkSource
  /** Bytes that the receiver lets be on their way. */
  readonly creditBytes: number
  /** Names the receiver in faults. */
  readonly hop: string
}

export interface SentTransfer {
  readonly chunks: number
  readonly bytes: number
  /** From the beginning, the computation that filled it included. */
  readonly ms: number
  /** From the last byte computed to the last byte confirmed: what nothing hides. */
  readonly tailMs: number
  /** Of what was not confirmed when all was computed: the way's own bandwidth, which nothing waits for but the way. */
  readonly mbPerS: number
  /** Share of the time without credit. */
  readonly waitedMs: number
  readonly resent: number
}

export class TransferSender {
  /** Settles when the receiver has everything, or the transfer has failed. */
  readonly done: Promise<SentTransfer>
  readonly #options: SenderOptions
  readonly #local: LocalSender | undefined // where the receiver is in this process, and copies: nothing is written
  readonly #chunks: Array<ChunkRange> = []
  readonly #subscriptions: Array<Subscription>
  readonly #timer: NodeJS.Timeout
  readonly #startedAtMs = performance.now()
  readonly #outcome = new Settlement<SentTransfer>()
  #sent = 0 // chunks written once
  #nextTurn: NodeJS.Immediate | undefined
  #sentBytes = 0
  #takenBytes = 0
  readonly #onTheirWay: Array<{ readonly end: number; readonly chunk: Uint8Array }> = [] // `end`: bytes sent with it
  #resent = 0
  readonly #resentAtMs = new Map<number, number>() // by sequence number
  #final = false
  #first: ReadonlyArray<Uint8Array> = []
  #finishedAt = { ms: 0, takenBytes: 0 }
  #over = false
  #advancedAtMs = performance.now() // when the receiver last had more than before
  #waitingSinceMs: number | undefined
  #waitedMs = 0

  constructor(options: SenderOptions) {
    this.#options = options
    this.done = this.#outcome.promise
    const { control, bulk, namespace, transferId, source } = options
    const lost = () => this.fail(this.#fault("disconnected", "the connection was lost"))
    this.#subscriptions = [
      control.subscribe(transferSubject(namespace, transferId, "status"), ({ data }) => this.#receive(data)),
      control.onDisconnect(lost),
      bulk.onDisconnect(lost),
    ]
    this.#local = source.blocks && LocalReceiver.join(transferSubject(namespace, transferId, "chunk"), source.blocks)
    this.#timer = setInterval(() => this.#watch(), limits.kvProgressIntervalMs)
    this.#timer.unref()
  }

  /** Queues KV that is complete in the pool: `ranges` are cut to chunks of at most the limit. Never throws. */
  send(range: ChunkRange): void {
    if (this.#over) return
    const most = Math.max(1, Math.floor((chunkBytesOn(this.#options.bulk) - kvChunkHeaderBytes) / this.#options.source.layerBlockBytes)) // layers x blocks
    const blocks = Math.min(range.blocks, most)
    const layers = Math.min(range.layers, Math.max(1, Math.floor(most / blocks)))
    for (let layer = 0; layer < range.layers; layer += layers) {
      for (let block = 0; block < range.blocks; block += blocks) {
        this.#chunks.push({
          firstLayer: range.firstLayer + layer,
          layers: Math.min(layers, range.layers - layer),
          firstBlock: range.firstBlock + block,
          blocks: Math.min(blocks, range.blocks - block),
        })
      }
    }
    this.#flush()
  }

  /** There will be no more. `first` are the first tokens of the choices, as token frames. */
  finish(first: ReadonlyArray<Uint8Array>): void {
    this.#final = true
    this.#first = first
    this.#finishedAt = { ms: performance.now(), takenBytes: this.#takenBytes }
    this.#flush()
  }

  /** Gives the transfer up and tells the receiver why. */
  fail(fault: Fault): void {
    if (this.#over) return
    this.#tell({ failure: fault.message })
    this.#close()
    this.#outcome.reject(fault)
  }

  #flush(): void {
    if (this.#nextTurn !== undefined) return
    const turnEnds = this.#sentBytes + limits.kvTurnBytes
    while (!this.#over && this.#sent < this.#chunks.length && this.#hasCredit()) {
      if (this.#sentBytes >= turnEnds) return this.#goOnNextTurn()
      if (!this.#write(this.#sent)) break
      this.#sentBytes += this.#bytesOf(this.#sent++)
    }
    if (this.#over) return
    const waits = this.#sent < this.#chunks.length
    if (waits) this.#waitingSinceMs ??= performance.now()
    else if (this.#waitingSinceMs !== undefined) {
      this.#waitedMs += performance.now() - this.#waitingSinceMs
      this.#waitingSinceMs = undefined
    }
    if (this.#final && !waits) this.#tell({})
  }

  /** What else this process does comes in between, and the socket gets on meanwhile. */
  #goOnNextTurn(): void {
    this.#nextTurn = setImmediate(() => {
      this.#nextTurn = undefined
      this.#flush()
    })
  }

  /** One chunk may always be on its way, however small the window. */
  #hasCredit(): boolean {
    const onTheirWay = this.#sentBytes - this.#takenBytes
    return onTheirWay === 0 || onTheirWay + this.#bytesOf(this.#sent) <= this.#options.creditBytes
  }

  #bytesOf(sequence: number): number {
    const { layers, blocks } = this.#chunks[sequence]!
    return kvChunkHeaderBytes + layers * blocks * this.#options.source.layerBlockBytes
  }

  /** False where it could not be published: now, or for good. */
  #write(sequence: number): boolean {
    const { bulk, namespace, transferId, source, hop } = this.#options
    const range = this.#chunks[sequence]!
    try {
      const bytes = this.#bytesOf(sequence)
      const sender = this.#local?.number ?? 0
      const chunk = takeChunkBuffer(sender === 0 ? bytes : kvChunkHeaderBytes)
      writeChunkHeader(chunk, { ...range, transferId, sequence, dtype: source.dtype, blockTokens: source.blockTokens, payloadBytes: bytes - kvChunkHeaderBytes, sender })
      const crc = source.crc32c(headerForCrc(chunk), 0)
      sealChunk(chunk, sender === 0 ? source.write(range, chunk, kvChunkHeaderBytes, crc) : crc)
      bulk.publish(transferSubject(namespace, transferId, "chunk"), chunk)
      if (sequence === this.#sent) this.#onTheirWay.push({ end: this.#sentBytes + bytes, chunk })
      return true
    } catch (error) {
      const fault = Fault.from(error, hop)
      if (fault.code !== "overloaded") this.fail(fault) // what the bus has no room for is tried again by the watch
      return false
    }
  }

  #receive(data: Uint8Array): void {
    if (this.#over) return
    let status: KvStatusMessage
    try {
      status = KvStatus.decode(data)
    } catch {
      return // as good as lost: it comes again
    }
    const nowMs = performance.now()
    if (status.failure !== undefined) return this.fail(this.#fault("disconnected", status.failure))
    if (status.complete && this.#final && this.#sent === this.#chunks.length) {
      for (const { chunk } of this.#onTheirWay.splice(0)) giveChunkBuffer(chunk)
      this.#tell({ closed: true })
      this.#close()
      const nowMs = performance.now()
      const ms = nowMs - this.#startedAtMs
      const tailMs = nowMs - this.#finishedAt.ms
      const tailBytes = this.#sentBytes - this.#finishedAt.takenBytes
      const mbPerS = tailBytes > 0 ? tailBytes / 1000 / Math.max(tailMs, 0.001) : this.#sentBytes / 1000 / Math.max(ms, 0.001)
      return this.#outcome.resolve({ chunks: this.#sent, bytes: this.#sentBytes, ms, mbPerS, tailMs, waitedMs: this.#waitedMs, resent: this.#resent })
    }
    const taken = Math.min(status.bytes, this.#sentBytes)
    if (taken > this.#takenBytes) {
      this.#takenBytes = taken
      while (this.#onTheirWay.length > 0 && this.#onTheirWay[0]!.end <= taken) giveChunkBuffer(this.#onTheirWay.shift()!.chunk)
      this.#advancedAtMs = nowMs
    }
    for (const sequence of status.missing) this.#resend(sequence, nowMs)
    if (this.#sent < this.#chunks.length) this.#flush()
  }

  /** Once an interval at most, so that a status that comes twice does not double what is on its way. */
  #resend(sequence: number, nowMs: number): void {
    if (this.#over || sequence >= this.#sent || nowMs - (this.#resentAtMs.get(sequence) ?? -Infinity) < limits.kvProgressIntervalMs / 2) return
    this.#resentAtMs.set(sequence, nowMs)
    if (this.#write(sequence)) this.#resent++
  }

  #watch(): void {
    const unanswered = this.#sent > 0 && (this.#final || this.#waitingSinceMs !== undefined)
    if (!unanswered) {
      this.#advancedAtMs = performance.now() // it is this side that has nothing to send
    } else if (performance.now() - this.#advancedAtMs > limits.kvSilenceMs) {
      return this.fail(this.#fault("deadline_exceeded", `nothing was taken for ${limits.kvSilenceMs} ms`))
    }
    this.#tell({})
    if (this.#sent < this.#chunks.length) this.#flush()
  }

  #tell(outcome: { readonly failure?: string; readonly closed?: boolean }): void {
    const { control, namespace, transferId } = this.#options
    const final = this.#final && this.#sent === this.#chunks.length
    const progress = { chunks: this.#sent, final, first: final ? this.#first : [], closed: outcome.closed === true, failure: outcome.failure }
    try {
      control.publish(transferSubject(namespace, transferId, "progress"), KvProgress.encode(progress), { headers: { [header.version]: protocolVersion } })
    } catch {
      // Disconnected: the watch and onDisconnect end the transfer.
    }
  }

  #fault(code: "disconnected" | "deadline_exceeded", message: string): Fault {
    return new Fault({ code, message: `KV transfer to ${this.#options.hop}: ${message}`, hop: this.#options.hop })
  }

  #close(): void {
    this.#over = true
    this.#local?.leave()
    clearInterval(this.#timer)
    clearImmediate(this.#nextTurn)
    for (const subscription of this.#subscriptions) subscription.unsubscribe()
  }
}
