/**
 * Streams over any bus: the reader opens one by a message, the writer answers with numbered frames under the reader's
 * credits. Both sides send signs of life, so that neither waits for a dead peer; a lost frame shows as a gap.
 *
 * Frame: u8 kind, 3 zero bytes, u32 number little-endian, payload. The number counts data frames from the beginning: of
 * data, end and the writer's sign of life, those before it; of credit and the reader's sign of life, all that the writer
 * may have sent then. So a credit that was lost or came twice does no harm, and a frame that was lost shows at the latest
 * with the next sign of life.
 */
import { limits } from "../../config/limits.ts"
import { header, type Bus, type Delivery, type Headers, type Subscription } from "./bus.ts"
import { decodeFault, encodeFault } from "./codec.ts"
import { Fault } from "./fault.ts"

const kind = { open: 0, data: 1, end: 2, fail: 3, alive: 4, credit: 5, cancel: 6 } as const
const prefixBytes = 8
const text = { encoder: new TextEncoder(), decoder: new TextDecoder() }
const noBytes = new Uint8Array(0)

const frame = (frameKind: number, number: number, payload: Uint8Array): Uint8Array => {
  const bytes = new Uint8Array(prefixBytes + payload.byteLength)
  bytes[0] = frameKind
  new DataView(bytes.buffer).setUint32(4, number, true)
  bytes.set(payload, prefixBytes)
  return bytes
}

const numberOf = (bytes: Uint8Array): number => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength).getUint32(4, true)

export interface OpenStreamOptions {
  readonly headers?: Headers
  /** Frames accepted before they are consumed. */
  readonly windowFrames?: number
  readonly openDeadlineMs?: number
  readonly silenceMs?: number
  /** Names the peer in faults, for example "decode w0". */
  readonly hop: string
}

/** Sends `data` to `subject` and reads the stream that its receiver answers with. */
export const openStream = (bus: Bus, subject: string, data: Uint8Array, options: OpenStreamOptions): StreamReader =>
  new StreamReader(bus, subject, data, options)

export class StreamReader implements AsyncIterable<Uint8Array> {
  readonly #bus: Bus
  readonly #hop: string
  readonly #window: number
  readonly #silenceMs: number
  readonly #subscriptions: Array<Subscription> = []
  readonly #frames: Array<Uint8Array> = []
  readonly #timer: NodeJS.Timeout
  #control: string | undefined // where credits and the cancel go, once the writer has accepted
  #waiting: { resolve(frame: Uint8Array | undefined): void; reject(fault: Fault): void } | undefined
  #outcome: { readonly fault: Fault | undefined } | undefined
  #expected = 0
  #consumed = 0
  #granted: number
  #heardAtMs = performance.now()
  #deadlineMs: number
  #cancelReason: string | undefined

  constructor(bus: Bus, subject: string, data: Uint8Array, options: OpenStreamOptions) {
    this.#bus = bus
    this.#hop = options.hop
    this.#window = options.windowFrames ?? limits.streamWindowFrames
    this.#granted = this.#window
    this.#silenceMs = options.silenceMs ?? limits.streamSilenceMs
    this.#deadlineMs = options.openDeadlineMs ?? limits.streamOpenDeadlineMs
    this.#timer = setInterval(() => this.#watch(), Math.min(limits.streamKeepAliveMs, Math.ceil(this.#deadlineMs / 2), Math.ceil(this.#silenceMs / 2)))
    this.#timer.unref()
    try {
      const inbox = bus.inbox()
      this.#subscriptions.push(bus.onDisconnect(() => this.#settle(this.#fault("disconnected", "the connection was lost"))))
      this.#subscriptions.push(bus.subscribe(inbox, (delivery) => this.#receive(delivery)))
      bus.publish(subject, data, { reply: inbox, headers: { ...options.headers, [header.streamWindow]: String(this.#window) } })
    } catch (error) {
      this.#settle(Fault.from(error, this.#hop))
    }
  }

  /** The next frame, or undefined at the end. Rejects with a Fault when the stream failed. One caller at a time. */
  next(): Promise<Uint8Array | undefined> {
    const ready = this.#frames.shift()
    if (ready !== undefined) {
      this.#consume()
      return Promise.resolve(ready)
    }
    if (this.#outcome !== undefined) return this.#outcome.fault === undefined ? Promise.resolve(undefined) : Promise.reject(this.#outcome.fault)
    return new Promise((resolve, reject) => (this.#waiting = { resolve, reject }))
  }

  /** Tells the writer to stop, and ends here with a `cancelled` fault. */
  cancel(reason: string): void {
    if (this.#outcome !== undefined) return
    this.#cancelReason = reason
    if (this.#control !== undefined) this.#tell(kind.cancel, text.encoder.encode(reason))
    this.#settle(this.#fault("cancelled", reason), this.#control === undefined)
    this.#frames.length = 0
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Uint8Array> {
    try {
      for (let next = await this.next(); next !== undefined; next = await this.next()) yield next
    } finally {
      this.cancel("the reader stopped")
    }
  }

  #fault(code: "cancelled" | "disconnected" | "deadline_exceeded" | "unavailable", message: string): Fault {
    return new Fault({ code, message: `${this.#hop}: ${message}`, hop: this.#hop })
  }

  #receive(delivery: Delivery): void {
    this.#heardAtMs = performance.now()
    if (delivery.headers[header.noResponders] !== undefined) return this.#settle(this.#fault("unavailable", "nobody serves it"))
    if (delivery.headers[header.fault] !== undefined) return this.#settle(decodeFault(delivery.data, this.#hop))
    if (delivery.data.byteLength < prefixBytes) return this.#break("a frame without a head came")
    const payload = delivery.data.subarray(prefixBytes)
    switch (delivery.data[0]) {
      case kind.open:
        this.#control = text.decoder.decode(payload)
        this.#deadlineMs = this.#silenceMs
        // A cancel that came before the acceptance could not be sent until now.
        if (this.#cancelReason !== undefined) {
          this.#tell(kind.cancel, text.encoder.encode(this.#cancelReason))
          this.#release()
        }
        return
      case kind.alive:
        if (this.#outcome === undefined && numberOf(delivery.data) !== this.#expected) this.#break(`frame ${this.#expected} was lost`)
        return
      case kind.fail:
        return this.#settle(decodeFault(payload, this.#hop))
      case kind.data:
      case kind.end:
        if (this.#outcome !== undefined) return
        if (numberOf(delivery.data) !== this.#expected) return this.#break(`frame ${this.#expected} was lost`)
        if (delivery.data[0] === kind.end) return this.#settle(undefined)
        this.#expected++
        if (this.#waiting === undefined) {
          this.#frames.push(payload)
        } else {
          const { resolve } = this.#waiting
          this.#waiting = undefined
          this.#consume()
          resolve(payload)
        }
    }
  }

  /** Credit is given back a half window at a time. */
  #consume(): void {
    if (++this.#consumed % Math.max(1, this.#window >> 1) !== 0) return
    this.#granted = this.#consumed + this.#window
    if (this.#outcome === undefined) this.#tell(kind.credit, noBytes)
  }

  #break(why: string): void {
    this.#tell(kind.cancel, text.encoder.encode(why))
    this.#settle(this.#fault("disconnected", why))
  }

  #tell(frameKind: number, payload: Uint8Array): void {
    if (this.#control === undefined) return
    try {
      this.#bus.publish(this.#control, frame(frameKind, this.#granted, payload))
    } catch {
      // The bus is closed: the writer's own watch ends it.
    }
  }

  #watch(): void {
    const silentMs = performance.now() - this.#heardAtMs
    if (silentMs > this.#deadlineMs) {
      if (this.#outcome !== undefined) return this.#release()
      this.#tell(kind.cancel, text.encoder.encode("silence"))
      return this.#settle(this.#fault("deadline_exceeded", `no sign of life for ${Math.round(silentMs)} ms`))
    }
    this.#tell(kind.alive, noBytes)
  }

  #settle(fault: Fault | undefined, keepListening = false): void {
    if (this.#outcome !== undefined) return this.#release() // the writer's answer to what was cancelled before it
    this.#outcome = { fault }
    if (!keepListening) this.#release()
    const waiting = this.#waiting
    this.#waiting = undefined
    if (fault === undefined) waiting?.resolve(undefined)
    else waiting?.reject(fault)
  }

  #release(): void {
    clearInterval(this.#timer)
    for (const subscription of this.#subscriptions) subscription.unsubscribe()
  }
}

/** The writing side of a stream, made by the receiver of the opening message. */
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
    this.#send(kind.open, text.encoder.encode(control))
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
    this.#send(kind.fail, encodeFault(fault))
    this.#close(fault)
  }

  #receive(message: Delivery): void {
    if (message.data.byteLength < prefixBytes) return
    this.#heardAtMs = performance.now()
    if (message.data[0] === kind.cancel) {
      const reason = text.decoder.decode(message.data.subarray(prefixBytes))
      this.#close(new Fault({ code: "cancelled", message: `${this.#hop}: cancelled: ${reason}`, hop: this.#hop }))
    } else if (message.data[0] === kind.credit || message.data[0] === kind.alive) {
      const had = this.writable
      this.#allowed = Math.max(this.#allowed, Math.min(numberOf(message.data), this.#sent + limits.streamBacklogFrames))
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
      this.#send(kind.end, noBytes)
      this.#close(undefined)
    }
  }

  #sendData(payload: Uint8Array): void {
    this.#send(kind.data, payload)
    this.#sent++
  }

  #send(frameKind: number, payload: Uint8Array): void {
    try {
      this.#bus.publish(this.#reply, frame(frameKind, this.#sent, payload))
    } catch (error) {
      const fault = Fault.from(error, this.#hop)
      // A frame that is too large can be told of; on a closed bus, nothing can.
      if (frameKind === kind.data) this.fail(fault)
      else this.#close(fault)
    }
  }

  #watch(): void {
    if (performance.now() - this.#heardAtMs > limits.streamSilenceMs) {
      return this.#close(new Fault({ code: "disconnected", message: `${this.#hop}: no sign of life from the reader`, hop: this.#hop }))
    }
    this.#send(kind.alive, noBytes)
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
