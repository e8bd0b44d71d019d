/**
 * A bus that loses, doubles, reorders, delays and corrupts what is published to chosen subjects: always the same for the same
 * seed and the same messages. It also counts what is subscribed, and what is on its way.
 */
import type { Bus, Delivery, PublishOptions, Subscription } from "../../actors/runtime/bus.ts"
import { randomNumbers } from "./tiny-model.ts"

/** How probable each fault is, 0 … 1. */
export interface Faults {
  readonly drop?: number
  readonly duplicate?: number
  /** Comes after the message that follows it on its subject, or a moment later where none does. */
  readonly reorder?: number
  /** Comes some milliseconds later, whatever comes in between. */
  readonly delay?: number
  /** One bit anywhere is wrong. */
  readonly corrupt?: number
}

export interface FaultyBusOptions {
  readonly seed?: number
  readonly faultsOf: (subject: string) => Faults | undefined
  /** Most milliseconds of a delay. */
  readonly delayMs?: number
}

export class FaultyBus implements Bus {
  readonly name = "memory"
  /** Messages that met each fault. */
  readonly met = { drop: 0, duplicate: 0, reorder: 0, delay: 0, corrupt: 0 }
  readonly #inner: Bus
  readonly #options: FaultyBusOptions
  readonly #random: () => number
  readonly #held = new Map<string, () => void>()
  readonly #bytesOnTheirWay = new Map<string, number>()
  readonly #peakBytes = new Map<string, number>()
  #listeners = 0

  constructor(inner: Bus, options: FaultyBusOptions) {
    this.#inner = inner
    this.#options = options
    this.#random = randomNumbers(options.seed ?? 1)
  }

  get maxPayloadBytes(): number {
    return this.#inner.maxPayloadBytes
  }

  /** Subscriptions and listeners that nobody has given back. */
  get listeners(): number {
    return this.#listeners
  }

  /** Most bytes of each subject that were published and had not come, been lost or corrupted. */
  get peakBytes(): ReadonlyMap<string, number> {
    return this.#peakBytes
  }

  publish(subject: string, data: Uint8Array, options?: PublishOptions): void {
    const faults = this.#options.faultsOf(subject)
    if (faults === undefined) return this.#inner.publish(subject, data, options)
    const meets = (fault: keyof Faults): boolean => {
      const probability = faults[fault] ?? 0
      if (probability === 0 || this.#random() >= probability) return false
      this.met[fault]++
      return true
    }
    const send = () => {
      try {
        this.#inner.publish(subject, bytes, options)
      } catch {
        // The bus was closed in the meantime.
      }
    }
    const before = this.#held.get(subject)
    let bytes = data
    if (meets("corrupt") && data.byteLength > 0) {
      bytes = data.slice()
      bytes[Math.floor(this.#random() * bytes.byteLength)]! ^= 1 << Math.floor(this.#random() * 8)
    }
    if (meets("drop")) {
      // Lost.
    } else if (meets("delay")) {
      this.#count(subject, bytes.byteLength)
      setTimeout(send, Math.ceil(this.#random() * (this.#options.delayMs ?? 300)))
    } else if (before === undefined && meets("reorder")) {
      this.#count(subject, bytes.byteLength)
      const release = () => {
        clearTimeout(timer)
        this.#held.delete(subject)
        send()
      }
      const timer = setTimeout(release, 20)
      this.#held.set(subject, release)
    } else {
      this.#count(subject, bytes.byteLength)
      this.#inner.publish(subject, bytes, options)
      if (meets("duplicate")) {
        this.#count(subject, bytes.byteLength)
        send()
      }
    }
    before?.()
  }

  subscribe(subject: string, handler: (delivery: Delivery) => void, options?: { readonly queue?: string }): Subscription {
    const counted = (delivery: Delivery) => {
      const bytes = this.#bytesOnTheirWay.get(delivery.subject)
      if (bytes !== undefined) this.#bytesOnTheirWay.set(delivery.subject, bytes - delivery.data.byteLength)
      handler(delivery)
    }
    return this.#listen(this.#inner.subscribe(subject, counted, options))
  }

  inbox(): string {
    return this.#inner.inbox()
  }

  onDisconnect(handler: () => void): Subscription {
    return this.#listen(this.#inner.onDisconnect(() => handler()))
  }

  close(): Promise<void> {
    return this.#inner.close()
  }

  #count(subject: string, bytes: number): void {
    const now = (this.#bytesOnTheirWay.get(subject) ?? 0) + bytes
    this.#bytesOnTheirWay.set(subject, now)
    this.#peakBytes.set(subject, Math.max(now, this.#peakBytes.get(subject) ?? 0))
  }

  #listen(subscription: Subscription): Subscription {
    this.#listeners++
    let listening = true
    return {
      unsubscribe: () => {
        if (listening) this.#listeners--
        listening = false
        subscription.unsubscribe()
      },
    }
  }
}
