/**
 * Who waits for which answer on one connection. The server knows one subscription to all of them, so an ask costs it
 * nothing beyond its two messages.
 */
import type { Delivery, Subscription } from "./bus.ts"

interface Subscriber {
  readonly handler: (delivery: Delivery) => void
  readonly queue: string | undefined
}

export class Inboxes {
  readonly #subscribers = new Map<string, Set<Subscriber>>()

  subscribe(subject: string, handler: Subscriber["handler"], queue: string | undefined): Subscription {
    const subscriber: Subscriber = { handler, queue }
    const subscribers = this.#subscribers.get(subject) ?? new Set()
    this.#subscribers.set(subject, subscribers.add(subscriber))
    return {
      unsubscribe: () => {
        subscribers.delete(subscriber)
        if (subscribers.size === 0 && this.#subscribers.get(subject) === subscribers) this.#subscribers.delete(subject)
      },
    }
  }

  /** Hands a message to all its subscribers, or of a queue group to the one that has waited longest. `false`: there are none. */
  deliver(delivery: Delivery): boolean {
    const subscribers = this.#subscribers.get(delivery.subject)
    if (subscribers === undefined) return false
    const served = new Set<string>()
    for (const subscriber of Array.from(subscribers)) {
      if (!subscribers.has(subscriber)) continue // an earlier one's handler has taken it away
      if (subscriber.queue !== undefined) {
        if (served.has(subscriber.queue)) continue
        served.add(subscriber.queue)
        subscribers.delete(subscriber)
        subscribers.add(subscriber)
      }
      callSafely(subscriber.handler, delivery)
    }
    return true
  }

  clear(): void {
    this.#subscribers.clear()
  }
}

/** A handler that throws has a defect of its own; the others still get their messages, and the client goes on reading. */
export const callSafely = (handler: Subscriber["handler"], delivery: Delivery): void => {
  try {
    handler(delivery)
  } catch (defect) {
    console.error(`bus nats: a subscriber of ${delivery.subject} threw`, defect)
  }
}
