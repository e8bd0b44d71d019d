/** The writing side of a stream, made by the receiver of the opening message. */
import { limits } from "../../config/limits.ts"
import { header, type Bus, type Delivery, type Subscription } from "./bus.ts"
import { encodeFault } from "./codec.ts"
import { Fault } from "./fault.ts"
import { frameKind, frameNumber, framePrefixBytes, noBytes, streamFrame, text } from "./stream-frame.ts"

export class StreamWriter {
  readonly #bus: Bus
  readonly #reply: string
  readonly #hop: string
  readonly #subscriptions: Array<Subscription> = []
  readonly #backlog: Array<Uint8Array> = []
  readonly #timer: NodeJS.Timeout
  readonly #closeHandlers: Array<(fault: Fault | undefined) => void> = []
  /** Data frames that may have been sent, and that have been. */
  #allowed: number
  #sent = 0
  #heardAtMs = performance.now()
  #ending = false
  #outcome: { readonly fault: Fault | undefined } | undefined
  #onWritable: (() => void) | undefined
  #waiters: Array<() => void> = []

  /** Accepts the stream that `delivery` asks for. `hop` names this side in faults. */
  constructor(bus: Bus, delivery: Delivery, hop: string) {
    if (delivery.reply === undefined) throw new Fault({ code: "invalid_request", message: `${hop}: a stream was asked for without a reply subject`, hop })
    this.#bus = bus
    this.#reply = delivery.reply
    this.#hop = hop
    const window = Number(delivery.headers[header.streamWindow])
    this.#allowed = Number.isInteger(window) && window > 0 ? Math.min(window, limits.streamBacklogFrames) : 1
    const control = bus.inbox()
    this.#subscriptions.push(
      bus.subscribe(control, (message) => this.#receive(message)),
      bus.onDisconnect(() => this.#close(new Fault({ code: "disconnected", message: `${hop}: the connection was lost`, hop }))),
    )
    this.#timer = setInterval(() => this.#watch(), limits.streamKeepAliveMs)
    this.#timer.unref()
    this.#send(frameKind.open, text.encoder.encode(control))
  }

  get closed(): boolean {
    return this.#outcome !== undefined
  }

  /** Whether the reader has granted credit: a producer pauses while it has not. */
  get writable(): boolean {
    return !this.closed && this.#sent < this.#allowed
  }

  /** Called each time the reader grants credit after there was none. */
  onWritable(handler: () => void): void {
    this.#onWritable = handler
  }

  /** Resolves when there is credit, or the stream is over; the writer's watch bounds the wait. */
  untilWritable(): Promise<void> {
    if (this.writable || this.closed) return Promise.resolve()
    return new Promise((resolve) => this.#waiters.push(resolve))
  }

  /** Called once when the stream is over, or is already: undefined after `end`, else why (`cancelled` by the reader, or a failure). */
  onClose(handler: (fault: Fault | undefined) => void): void {
    if (this.#outcome === undefined) this.#closeHandlers.push(handler)
    else handler(this.#outcome.fault)
  }

  /** Sends a frame, or keeps it until there is credit. Dropped silently once the stream is over. */
  write(payload: Uint8Array): void {
    if (this.closed || this.#ending) return
    if (this.writable && this.#backlog.length === 0) return this.#sendData(payload)
    this.#backlog.push(payload)
    if (this.#backlog.length > limits.streamBacklogFrames) {
      this.fail(new Fault({ code: "overloaded", message: `${this.#hop}: the reader takes nothing`, hop: this.#hop }))
    }
  }

  /** Ends the stream after what was written. */
  end(): void {
    if (this.closed) return
    this.#ending = true
    this.#flush()
  }

  /** Ends the stream now, with a fault that the reader's `next` rejects with. */
  fail(fault: Fault): void {
    if (this.closed) return
    this.#send(frameKind.fail, encodeFault(fault))
    this.#close(fault)
  }

  #receive(message: Delivery): void {
    if (message.data.byteLength < framePrefixBytes) return
    this.#heardAtMs = performance.now()
    if (message.data[0] === frameKind.cancel) {
      const reason = text.decoder.decode(message.data.subarray(framePrefixBytes))
      this.#close(new Fault({ code: "cancelled", message: `${this.#hop}: cancelled: ${reason}`, hop: this.#hop }))
    } else if (message.data[0] === frameKind.credit || message.data[0] === frameKind.alive) {
      const had = this.writable
      this.#allowed = Math.max(this.#allowed, Math.min(frameNumber(message.data), this.#sent + limits.streamBacklogFrames))
      this.#flush()
      if (!had && this.writable) {
        this.#onWritable?.()
        this.#releaseWaiters()
      }
    }
  }

  #flush(): void {
    while (this.writable && this.#backlog.length > 0) this.#sendData(this.#backlog.shift()!)
    if (this.#ending && this.#backlog.length === 0 && !this.closed) {
      this.#send(frameKind.end, noBytes)
      this.#close(undefined)
    }
  }

  #sendData(payload: Uint8Array): void {
    this.#send(frameKind.data, payload)
    this.#sent++
  }

  #send(kind: number, payload: Uint8Array): void {
    try {
      this.#bus.publish(this.#reply, streamFrame(kind, this.#sent, payload))
    } catch (error) {
      const fault = Fault.from(error, this.#hop)
      // A frame that is too large can be told of; on a closed bus, nothing can.
      if (kind === frameKind.data) this.fail(fault)
      else this.#close(fault)
    }
  }

  #watch(): void {
    if (performance.now() - this.#heardAtMs > limits.streamSilenceMs) {
      return this.#close(new Fault({ code: "disconnected", message: `${this.#hop}: no sign of life from the reader`, hop: this.#hop }))
    }
    this.#send(frameKind.alive, noBytes)
  }

  #close(fault: Fault | undefined): void {
    if (this.closed) return
    this.#outcome = { fault }
    clearInterval(this.#timer)
    this.#backlog.length = 0
    for (const subscription of this.#subscriptions) subscription.unsubscribe()
    for (const handler of this.#closeHandlers) handler(fault)
    this.#releaseWaiters()
  }

  #releaseWaiters(): void {
    for (const resolve of this.#waiters.splice(0)) resolve()
  }
}
