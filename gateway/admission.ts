/** The requests a gateway has open: a bound on their number, and one place to tell them that the server stops. */
import { limits } from "../config/limits.ts"
import { Fault } from "../actors/runtime/fault.ts"
import { shuttingDown } from "./errors.ts"

export type Stop = (fault: Fault) => void

export class Admission {
  readonly #open = new Set<{ stop: Stop }>()
  readonly #most: number
  #closing = false
  readonly #onIdle = new Set<() => void>()

  constructor(most: number) {
    this.#most = most
  }

  get open(): number {
    return this.#open.size
  }

  get closing(): boolean {
    return this.#closing
  }

  /** Takes a place or throws a Fault. The request says how it is stopped once it has something to stop, and leaves once. */
  enter(): { onStop(stop: Stop): void; leave(): void } {
    if (this.#closing) throw shuttingDown
    if (this.#open.size >= this.#most) {
      throw new Fault({ code: "overloaded", message: `the server has ${this.#open.size} open requests, which is its limit`, hop: "gateway", retryAfterMs: limits.retryAfterMs })
    }
    const place: { stop: Stop } = { stop: () => {} }
    this.#open.add(place)
    return {
      onStop: (stop) => (place.stop = stop),
      leave: () => {
        this.#open.delete(place)
        if (this.#open.size === 0) for (const resolve of this.#onIdle) resolve()
      },
    }
  }

  /** Admits nothing more. */
  close(): void {
    this.#closing = true
  }

  stopAll(fault: Fault): void {
    for (const { stop } of this.#open) stop(fault)
  }

  /** Resolves once nothing is open, or after `mostMs`. */
  idle(mostMs: number): Promise<void> {
    if (this.#open.size === 0) return Promise.resolve()
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer)
        this.#onIdle.delete(done)
        resolve()
      }
      const timer = setTimeout(done, mostMs)
      this.#onIdle.add(done)
    })
  }
}
