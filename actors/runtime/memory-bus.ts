/**
 * The bus inside one process: payloads by reference, delivered in order from one queue, never inside `publish`.
 */
import { limits } from "../../config/limits.ts"
import { header, type Bus, type Delivery, type Headers, type PublishOptions, type Subscription } from "./bus.ts"
import { Fault } from "./fault.ts"

interface Subscriber {
  readonly handler: (delivery: Delivery) => void
  readonly queue: string | undefined
}

const noBytes = new Uint8Array(0)

export class MemoryBus implements Bus {
  readonly #maxPayloadBytes: number
  readonly #subscribers = new Map<string, Set<Subscriber>>()
  readonly #disconnectHandlers = new Set<() => void>()
  readonly #turns = new Map<string, number>() // queue group -> next member
  #pending: Array<Delivery> = []
  #draining: Promise<void> | undefined
  #inboxes = 0
  #closed = false

  constructor(options: { readonly maxPayloadBytes?: number } = {}) {
    this.#maxPayloadBytes = options.maxPayloadBytes ?? limits.maxPayloadBytes
  }

  get name(): string {
    return "memory"
  }

  get maxPayloadBytes(): number {
    return this.#maxPayloadBytes
  }

  publish(subject: string, data: Uint8Array, options: PublishOptions = {}): void {
    const headers = options.headers ?? {}
    this.admit(subject, data, headers)
    this.#pending.push({ subject, data, headers, reply: options.reply })
    this.#draining ??= Promise.resolve().then(() => this.#drain())
  }

  /** Throws a Fault where a message cannot be sent. */
  protected admit(subject: string, data: Uint8Array, headers: Headers): void {
    if (this.#closed) throw new Fault({ code: "unavailable", message: `publish to ${subject}: the bus is closed`, hop: "bus memory" })
    const bytes = data.byteLength + headerBytes(headers)
    if (bytes > this.maxPayloadBytes) {
      throw new Fault({ code: "invalid_request", message: `publish to ${subject}: ${bytes} bytes are over the bus's limit of ${this.maxPayloadBytes}`, hop: "bus memory" })
    }
  }

  subscribe(subject: string, handler: (delivery: Delivery) => void, options: { readonly queue?: string } = {}): Subscription {
    if (this.#closed) throw new Fault({ code: "unavailable", message: `subscribe to ${subject}: the bus is closed`, hop: "bus memory" })
    const subscriber: Subscriber = { handler, queue: options.queue }
    const subscribers = this.#subscribers.get(subject) ?? new Set()
    this.#subscribers.set(subject, subscribers.add(subscriber))
    return {
      unsubscribe: () => {
        subscribers.delete(subscriber)
        if (subscribers.size === 0 && this.#subscribers.get(subject) === subscribers) this.#subscribers.delete(subject)
      },
    }
  }

  inbox(): string {
    return `_local.${++this.#inboxes}`
  }

  onDisconnect(handler: () => void): Subscription {
    this.#disconnectHandlers.add(handler)
    return { unsubscribe: () => this.#disconnectHandlers.delete(handler) }
  }

  /** For tests: what a lost connection does. */
  disconnect(): void {
    this.#pending = []
    this.lost()
  }

  protected lost(): void {
    for (const handler of [...this.#disconnectHandlers]) handler()
  }

  async close(): Promise<void> {
    while (this.#draining !== undefined) await this.#draining
    this.#closed = true
    this.#subscribers.clear()
    this.lost()
  }

  #drain(): void {
    for (let next = this.#pending.shift(); next !== undefined; next = this.#pending.shift()) this.deliver(next)
    this.#draining = undefined
  }

  protected deliver(delivery: Delivery): void {
    const subscribers = this.#subscribers.get(delivery.subject)
    if (subscribers === undefined) return this.#nobody(delivery)
    const groups = new Map<string, Array<Subscriber>>()
    for (const subscriber of [...subscribers]) {
      if (!subscribers.has(subscriber)) continue // an earlier one's handler has taken it away
      if (subscriber.queue === undefined) call(subscriber, delivery)
      else groups.set(subscriber.queue, [...(groups.get(subscriber.queue) ?? []), subscriber])
    }
    for (const [queue, members] of groups) {
      const key = `${delivery.subject} ${queue}`
      const turn = this.#turns.get(key) ?? 0
      this.#turns.set(key, (turn + 1) % members.length)
      call(members[turn % members.length]!, delivery)
    }
  }

  #nobody({ subject, reply }: Delivery): void {
    if (reply === undefined) return
    try {
      this.publish(reply, noBytes, { headers: { [header.noResponders]: subject } })
    } catch {
      // Who asks cannot be told where the answer leaves the process and there is no connection.
    }
  }
}

/** A handler that throws has a defect of its own; the others still get their messages. */
const call = (subscriber: Subscriber, delivery: Delivery): void => {
  try {
    subscriber.handler(delivery)
  } catch (defect) {
    console.error(`bus memory: a subscriber of ${delivery.subject} threw`, defect)
  }
}

const headerBytes = (headers: Headers): number => {
  let bytes = 0
  for (const [name, value] of Object.entries(headers)) bytes += name.length + value.length + 4
  return bytes
}
