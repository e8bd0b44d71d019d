/**
 * What becomes of a request whose work has failed: whether it is placed again, how soon, and where not. What is given away is
 * no failure: it is placed again at once. State and time only.
 */
import { limits } from "../../config/limits.ts"
import type { Fault } from "../runtime/fault.ts"

/** Most placements of one attempt of the gateway's, so that each has a number of its own. */
const placementsOfAttempt = limits.placementAttempts + limits.movesPerRequest

export class Recovery {
  readonly #sender: string
  readonly #firstAttempt: number
  /** Of this attempt of the gateway's. */
  placements = 0
  /** Workers that have failed the request. */
  exclude: ReadonlyArray<string> = []
  /** The worker that has given the request away, and holds its KV, until another has drawn a token. */
  movedFrom: string | undefined
  #moves = 0
  #faults = 0 // since the last token
  #failingSinceMs: number | undefined

  /** `sender`: who recovers; where that is over itself, the request is another's. */
  constructor(sender: string, gatewayAttempt: number) {
    this.#sender = sender
    this.#firstAttempt = gatewayAttempt * placementsOfAttempt
  }

  /** Number of the next placement, or of the one that there is: never that of an earlier one, and always more. */
  get attempt(): number {
    return this.#firstAttempt + this.placements
  }

  /** The client got a token. */
  progressed(): void {
    this.#faults = 0
    this.#failingSinceMs = undefined
    this.movedFrom = undefined
  }

  /** What was placed there has failed. */
  failedAt(worker: string, { code }: Fault): void {
    if (code === "moved") this.movedFrom = worker
    else if (code !== "stale") this.exclude = [...this.exclude, worker]
  }

  /** How long to wait before it is placed again; undefined: it fails. */
  delayMs(fault: Fault, nowMs: number): number | undefined {
    const faults = this.#faults++
    this.#failingSinceMs ??= nowMs
    if (fault.code === "stale" && fault.hop === this.#sender) return undefined
    const isMove = (fault.code === "moved" || fault.code === "stale") && this.#moves < limits.movesPerRequest
    if (isMove) this.#moves++
    // Where nobody serves now, a worker may be on its way back: that costs time, but none of the placements.
    const isLast = this.placements - this.#moves >= limits.placementAttempts || nowMs - this.#failingSinceMs > limits.recoveryDeadlineMs
    if (isLast || !fault.retryable || fault.code === "overloaded") return undefined
    if (isMove && faults === 0) return 0
    return Math.min(limits.restartDelayMs * 2 ** faults, limits.heartbeatIntervalMs)
  }
}
