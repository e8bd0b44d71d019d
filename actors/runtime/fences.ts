/** Which incarnation of each sender has spoken last, so that what an earlier one still asks for is known. */
import { limits } from "../../config/limits.ts"
import { header, type Headers } from "./bus.ts"

interface Latest {
  readonly epoch: number
  /** When this incarnation was heard last. */
  readonly heardAtMs: number
}

export class Fences {
  readonly #latest = new Map<string, Latest>() // by sender, the one that was heard longest ago first

  /** Whether an earlier incarnation of its sender has sent this. A sender without an epoch, or of epoch 0, has no incarnations. */
  isStale(headers: Headers, nowMs: number): boolean {
    const sender = headers[header.sender]
    const epoch = Number(headers[header.epoch])
    if (sender === undefined || !(epoch > 0)) return false
    const latest = this.#latest.get(sender)
    // A machine's clock may have gone back: an incarnation that has been silent for so long is believed to be over.
    if (latest !== undefined && latest.epoch > epoch && nowMs - latest.heardAtMs <= limits.fenceMs) return true
    this.#latest.delete(sender)
    this.#latest.set(sender, { epoch, heardAtMs: nowMs })
    if (this.#latest.size > limits.fencedSenders) this.#latest.delete(this.#latest.keys().next().value!)
    return false
  }
}
