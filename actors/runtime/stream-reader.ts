/** The reading side of a stream, which opens it by a message and grants the credits. */
import { limits } from "../../config/limits.ts"
import { header, type Bus, type Delivery, type Headers, type Subscription } from "./bus.ts"
import { decodeFault } from "./codec.ts"
import { Fault } from "./fault.ts"
import { frameKind, frameNumber, framePrefixBytes, noBytes, streamFrame, text } from "./stream-frame.ts"

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
    if (this.#control !== undefined) this.#tell(frameKind.cancel, text.encoder.encode(reason))
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
    if (delivery.data.byteLength < framePrefixBytes) return this.#break("a frame without a head came")
    const payload = delivery.data.subarray(framePrefixBytes)
    switch (delivery.data[0]) {
      case frameKind.open:
        this.#control = text.decoder.decode(payload)
        this.#deadlineMs = this.#silenceMs
        // A cancel that came before the acceptance could not be sent until now.
        if (this.#cancelReason !== undefined) {
          this.#tell(frameKind.cancel, text.encoder.encode(this.#cancelReason))
          this.#release()
        }
        return
      case frameKind.alive:
        if (this.#outcome === undefined && frameNumber(delivery.data) !== this.#expected) this.#break(`frame ${this.#expected} was lost`)
        return
      case frameKind.fail:
        return this.#settle(decodeFault(payload, this.#hop))
      case frameKind.data:
      case frameKind.end:
        if (this.#outcome !== undefined) return
        if (frameNumber(delivery.data) !== this.#expected) return this.#break(`frame ${this.#expected} was lost`)
        if (delivery.data[0] === frameKind.end) return this.#settle(undefined)
        // A writer that minds no credits would fill this side's memory.
        if (this.#expected >= this.#granted) return this.#break("more frames than were granted came")
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
    if (this.#outcome === undefined) this.#tell(frameKind.credit, noBytes)
  }

  #break(why: string): void {
    this.#tell(frameKind.cancel, text.encoder.encode(why))
    this.#settle(this.#fault("disconnected", why))
  }

  #tell(kind: number, payload: Uint8Array): void {
    if (this.#control === undefined) return
    try {
      this.#bus.publish(this.#control, streamFrame(kind, this.#granted, payload))
    } catch {
      // The bus is closed: the writer's own watch ends it.
    }
  }

  #watch(): void {
    const silentMs = performance.now() - this.#heardAtMs
    if (silentMs > this.#deadlineMs) {
      if (this.#outcome !== undefined) return this.#release()
      this.#tell(frameKind.cancel, text.encoder.encode("silence"))
      return this.#settle(this.#fault("deadline_exceeded", `no sign of life for ${Math.round(silentMs)} ms`))
    }
    this.#tell(frameKind.alive, noBytes)
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
