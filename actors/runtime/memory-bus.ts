/**
 * The bus inside one process: payloads by reference, delivered in order from one queue, never inside `publish`.
 */
import { limits } from "../../config/limits.ts"
import { header, type Bus, type Delivery, type PublishOptions, type Subscription } from "./bus.ts"
import { Fault } from "./fault.ts"

interface Subscriber {
  readonly handler: (delivery: Delivery) => void
  readonly queue: string | undefined
}

const noBytes = new Uint8Array(0)

export class MemoryBus implements Bus {
  readonly name = "memory"
  readonly maxPayloadBytes: number
  readonly #subscribers = new Map<string, Set<Subscriber>>()
  readonly #disconnectHandlers = new Set<() => void>()
  readonly #turns = new Map<string, number>() // queue group -> next member
  #pending: Array<Delivery> = []
  #draining: Promise<void> | undefined
  #inboxes = 0
  #closed = false

  constructor(options: { readonly maxPayloadBytes?: number } = {}) {
    this.maxPayloadBytes = options.maxPayloadBytes ?? limits.maxPayloadBytes
  }

  publish(subject: string, data: Uint8Array, options: PublishOptions = {}): void {
    if (this.#closed) throw new Fault({ code: "unavailable", message: `publish to ${subject}: the bus is closed`, hop: "bus memory" })
    const headers = options.headers ?? {}
    const bytes = data.byteLength + headerBytes(headers)
    if (bytes > this.maxPayloadBytes) {
      throw new Fault({ code: "invalid_request", message: `publish to ${subject}: ${bytes} bytes are over the bus's limit of ${this.maxPayloadBytes}`, hop: "bus memory" })
    }
    this.#pending.push({ subject, data, headers, reply: options.reply })
    this.#draining ??= Promise.resolve().then(() => this.#drain())
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
    for (const handler of [...this.#disconnectHandlers]) handler()
  }

  async close(): Promise<void> {
    while (this.#draining !== undefined) await this.#draining
    this.#closed = true
    this.#subscribers.clear()
    for (const handler of [...this.#disconnectHandlers]) handler()
  }

  #drain(): void {
    for (let next = this.#pending.shift(); next !== undefined; next = this.#pending.shift()) this.#deliver(next)
    this.#draining = undefined
  }

  #deliver(delivery: Delivery): void {
    const subscribers = this.#subscribers.get(delivery.subject)
    if (subscribers === undefined) {
      if (delivery.reply !== undefined) this.publish(delivery.reply, noBytes, { headers: { [header.noResponders]: delivery.subject } })
      return
    }
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
}

/** A handler that throws has a defect of its own; the others still get their messages. */
const call = (subscriber: Subscriber, delivery: Delivery): void => {
  try {
    subscriber.handler(delivery)
  } catch (defect) {
    console.error(`bus memory: a subscriber of ${delivery.subject} threw`, defect)
  }
}

const headerBytes = (headers: Readonly<Record<string, string>>): number => {
  let bytes = 0
  for (const [name, value] of Object.entries(headers)) bytes += name.length + value.length + 4
  return bytes
}
