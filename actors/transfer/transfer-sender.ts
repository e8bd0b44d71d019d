/**
 * The sending side of a KV transfer. Chunks are described when their KV exists and written when there is credit; nothing is
 * kept but their description, since the blocks stay where they are until the receiver has everything. What is lost is named
 * by the receiver and written again.
 */
import { limits } from "../../config/limits.ts"
import type { Bus, Subscription } from "../runtime/bus.ts"
import { header, protocolVersion } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import { headerForCrc, kvChunkHeaderBytes, sealChunk, writeChunkHeader, type ChunkRange, type KvDtype } from "../messages/kv-chunk.ts"
import { KvProgress, KvStatus, type KvStatusMessage } from "../messages/kv-transfer.ts"
import { transferSubject } from "../messages/subjects.ts"
import { Settlement } from "./settlement.ts"

/** Where the bytes come from. */
export interface ChunkSource {
  readonly dtype: KvDtype
  readonly blockTokens: number
  /** Bytes of one layer of one block. */
  readonly layerBlockBytes: number
  crc32c(bytes: Uint8Array, seed: number): number
  /** Writes a chunk's payload at `offset` and returns its CRC-32C, continued from `seed`. */
  write(range: ChunkRange, into: Uint8Array, offset: number, seed: number): number
}

export interface SenderOptions {
  readonly control: Bus
  readonly bulk: Bus
  readonly cluster: string
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
  readonly ms: number
  /** Share of the time without credit. */
  readonly waitedMs: number
  readonly resent: number
}

export class TransferSender {
  /** Settles when the receiver has everything, or the transfer has failed. */
  readonly done: Promise<SentTransfer>
  readonly #options: SenderOptions
  readonly #chunks: Array<ChunkRange> = []
  readonly #subscriptions: Array<Subscription>
  readonly #timer: NodeJS.Timeout
  readonly #startedAtMs = performance.now()
  readonly #outcome = new Settlement<SentTransfer>()
  #sent = 0 // chunks written once
  #sentBytes = 0
  #takenBytes = 0
  #resent = 0
  #final = false
  #first: ReadonlyArray<Uint8Array> = []
  #over = false
  #heardAtMs = performance.now()
  #waitingSinceMs: number | undefined
  #waitedMs = 0

  constructor(options: SenderOptions) {
    this.#options = options
    this.done = this.#outcome.promise
    const { control, bulk, cluster, transferId } = options
    const lost = () => this.fail(this.#fault("disconnected", "the connection was lost"))
    this.#subscriptions = [
      control.subscribe(transferSubject(cluster, transferId, "status"), ({ data }) => this.#receive(data)),
      control.onDisconnect(lost),
      bulk.onDisconnect(lost),
    ]
    this.#timer = setInterval(() => this.#watch(), limits.kvProgressIntervalMs)
    this.#timer.unref()
  }

  /** Queues KV that is complete in the pool: `ranges` are cut to chunks of at most the limit. */
  send(range: ChunkRange): void {
    const { layerBlockBytes } = this.#options.source
    const most = Math.max(1, Math.floor((limits.kvChunkBytes - kvChunkHeaderBytes) / layerBlockBytes)) // layers x blocks
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
    this.#flush()
  }

  /** Gives the transfer up and tells the receiver why. */
  fail(fault: Fault): void {
    if (this.#over) return
    this.#tell(fault.message)
    this.#close()
    this.#outcome.reject(fault)
  }

  #flush(): void {
    while (!this.#over && this.#sent < this.#chunks.length && this.#sentBytes - this.#takenBytes < this.#options.creditBytes) {
      this.#sentBytes += this.#write(this.#sent++)
    }
    const waits = !this.#over && this.#sent < this.#chunks.length
    if (waits) this.#waitingSinceMs ??= performance.now()
    else if (this.#waitingSinceMs !== undefined) {
      this.#waitedMs += performance.now() - this.#waitingSinceMs
      this.#waitingSinceMs = undefined
    }
    if (this.#final && !waits) this.#tell(undefined)
  }

  #write(sequence: number): number {
    const { bulk, cluster, transferId, source } = this.#options
    const range = this.#chunks[sequence]!
    const payloadBytes = range.layers * range.blocks * source.layerBlockBytes
    const chunk = new Uint8Array(kvChunkHeaderBytes + payloadBytes)
    writeChunkHeader(chunk, { ...range, transferId, sequence, dtype: source.dtype, blockTokens: source.blockTokens, payloadBytes })
    const seed = source.crc32c(headerForCrc(chunk), 0)
    sealChunk(chunk, source.write(range, chunk, kvChunkHeaderBytes, seed))
    try {
      bulk.publish(transferSubject(cluster, transferId, "chunk"), chunk)
    } catch (error) {
      this.fail(Fault.from(error, this.#options.hop))
    }
    return chunk.byteLength
  }

  #receive(data: Uint8Array): void {
    let status: KvStatusMessage
    try {
      status = KvStatus.decode(data)
    } catch (error) {
      return this.fail(Fault.from(error, this.#options.hop))
    }
    this.#heardAtMs = performance.now()
    if (status.failure !== undefined) return this.fail(this.#fault("disconnected", status.failure))
    this.#takenBytes = Math.max(this.#takenBytes, Math.min(status.bytes, this.#sentBytes))
    for (const sequence of status.missing) {
      if (this.#over || sequence >= this.#sent) continue
      this.#resent++
      this.#write(sequence)
    }
    if (status.complete && this.#final) {
      this.#close()
      const ms = performance.now() - this.#startedAtMs
      return this.#outcome.resolve({ chunks: this.#sent, bytes: this.#sentBytes, ms, waitedMs: this.#waitedMs, resent: this.#resent })
    }
    if (this.#sent < this.#chunks.length) this.#flush()
  }

  #watch(): void {
    const unanswered = this.#sent > 0 && (this.#final || this.#waitingSinceMs !== undefined)
    if (!unanswered) {
      this.#heardAtMs = performance.now() // it is this side that has nothing to send
      return this.#tell(undefined)
    }
    if (performance.now() - this.#heardAtMs > limits.kvSilenceMs) {
      return this.fail(this.#fault("deadline_exceeded", `no word of the receiver for ${limits.kvSilenceMs} ms`))
    }
    this.#tell(undefined)
  }

  #tell(failure: string | undefined): void {
    const { control, cluster, transferId } = this.#options
    const final = this.#final && this.#sent === this.#chunks.length
    try {
      control.publish(transferSubject(cluster, transferId, "progress"), KvProgress.encode({ chunks: this.#sent, final, first: final ? this.#first : [], failure }), { headers: { [header.version]: protocolVersion } })
    } catch {
      // Disconnected: the watch and onDisconnect end the transfer.
    }
  }

  #fault(code: "disconnected" | "deadline_exceeded", message: string): Fault {
    return new Fault({ code, message: `KV transfer to ${this.#options.hop}: ${message}`, hop: this.#options.hop })
  }

  #close(): void {
    this.#over = true
    clearInterval(this.#timer)
    for (const subscription of this.#subscriptions) subscription.unsubscribe()
  }
}
