/**
 * One prompt's generation as the gateway reads it: a stream of events that survives the request actor it had, goes on with
 * another from what was delivered, ends with a Fault where it cannot, and never outlives the request's deadline.
 */
import { limits } from "../config/limits.ts"
import { decodeGenerateEvent, type FinishReason, type GenerateEvent, type GenerateMessage } from "../actors/messages/request.ts"
import { packTokens } from "../actors/messages/tokens.ts"
import { Fault, type FaultCode } from "../actors/runtime/fault.ts"
import type { StreamReader } from "../actors/runtime/stream-reader.ts"

/** Sends a `Generate` to any request actor. */
export type OpenGenerate = (message: GenerateMessage, deadlineMs: number) => StreamReader

/** What a generation is asked; the attempt and what was delivered are filled in here. */
export type GenerateOrder = Omit<GenerateMessage, "attempt" | "delivered">

// An overloaded system is not asked again at once: the client is told when to. What happens behind a request actor is that
// actor's to try again, and it has.
const resumable: ReadonlySet<FaultCode> = new Set(["unavailable", "disconnected", "deadline_exceeded", "shutting_down", "moved", "stale"])

/** Whether a generation goes on with another request actor: it is the one that it had which is lost, gives it back, or is over. */
const isResumable = (fault: Fault): boolean => /^(request|bus)\b/.test(fault.hop) && resumable.has(fault.code)

/** The request actor lives, and does not want it: no failure, so long as that does not happen again and again. */
const isGivenBack = (fault: Fault): boolean => fault.code === "moved" || fault.code === "stale"

export class Generation {
  readonly #open: OpenGenerate
  readonly #order: GenerateOrder
  readonly #deadlineAtMs: number
  readonly #deadline: NodeJS.Timeout
  readonly #delivered: ReadonlyArray<Array<number>> // [choices]
  #reader: StreamReader
  #attempt = 0
  #failures = 0
  #failedAtMs = 0
  #moves = 0
  #faults = 0 // since the last event
  #failingSinceMs: number | undefined
  #taken = false // by some request actor
  #prompted = false
  #scores = { delivered: 0, ofAttempt: 0 } // prompt tokens
  #done = false
  #stopped: Fault | undefined

  constructor(open: OpenGenerate, order: GenerateOrder, deadlineMs: number) {
    this.#open = open
    this.#order = order
    this.#deadlineAtMs = performance.now() + deadlineMs
    this.#delivered = Array.from({ length: order.choices }, () => [])
    this.#reader = open({ ...order, attempt: 0, delivered: [] }, deadlineMs)
    this.#deadline = setTimeout(() => this.stop(new Fault({ code: "deadline_exceeded", message: `gateway: the request took longer than ${deadlineMs} ms`, hop: "gateway" })), deadlineMs)
    this.#deadline.unref()
  }

  /** The next event, or undefined at the end. Rejects with a Fault. One caller at a time. */
  async next(): Promise<GenerateEvent | undefined> {
    for (;;) {
      try {
        if (this.#stopped !== undefined) throw this.#stopped
        const frame = await this.#reader.next()
        if (frame === undefined) {
          if (!this.#done) throw new Fault({ code: "disconnected", message: "request: the generation ended before it was done", hop: "request" })
          clearTimeout(this.#deadline)
          return undefined
        }
        const event = this.#fresh(decodeGenerateEvent(frame))
        if (event === undefined) continue
        this.#faults = 0
        this.#failingSinceMs = undefined
        return event
      } catch (error) {
        await this.#resume(Fault.from(error, "request"))
      }
    }
  }

  /** Cancels the generation at once, here and at the request actor; `next` rejects with `fault`. */
  stop(fault: Fault): void {
    clearTimeout(this.#deadline)
    this.#stopped ??= fault
    this.#reader.cancel(fault.message)
  }

  /** What is new to the client of an event, as a later attempt says again what was said before; undefined: nothing. */
  #fresh(event: GenerateEvent): GenerateEvent | undefined {
    if (event.type === "delta") this.#delivered[event.choice]?.push(...event.tokens)
    else if (event.type === "done") this.#done = true
    else if (event.type === "prompt") {
      if (this.#prompted) return undefined
      this.#prompted = true
    } else {
      const logprobs = event.logprobs.slice(Math.max(0, this.#scores.delivered - this.#scores.ofAttempt))
      this.#scores.ofAttempt += event.logprobs.length
      this.#scores.delivered += logprobs.length
      return logprobs.length === 0 ? undefined : { ...event, logprobs }
    }
    return event
  }

  /** Goes on with another request actor, from what was delivered: at once where it was given back, else after a while. */
  async #resume(fault: Fault): Promise<void> {
    const nowMs = performance.now()
    this.#failingSinceMs ??= nowMs
    const isMove = isGivenBack(fault) && this.#moves < limits.movesPerRequest
    // Where nobody serves now what a request actor has had, the only one may be on its way back: that costs time, but none of the attempts.
    if (fault.code !== "unavailable" && fault.hop.startsWith("request")) this.#taken = true
    const isWait = fault.code === "unavailable" && (this.#taken || this.#prompted) && nowMs - this.#failingSinceMs < limits.recoveryDeadlineMs
    const backOffMs = limits.generateRetryDelayMs * 2 ** this.#faults
    const waitMs = isMove && this.#faults === 0 ? 0 : isMove || isWait ? Math.min(backOffMs, limits.heartbeatIntervalMs) : backOffMs
    const leftMs = this.#deadlineAtMs - nowMs - waitMs
    this.#faults++
    if (isMove) this.#moves++
    else if (!isWait) {
      // A long answer outlives many changes of the system: what was long ago is forgiven.
      this.#failures = nowMs - this.#failedAtMs > limits.recoveryDeadlineMs ? 1 : this.#failures + 1
      this.#failedAtMs = nowMs
    }
    if (this.#stopped !== undefined || !isResumable(fault) || this.#failures >= limits.generateAttempts || leftMs <= 0) {
      clearTimeout(this.#deadline)
      throw this.#stopped ?? fault
    }
    if (waitMs > 0) await new Promise((resolve) => setTimeout(resolve, waitMs))
    this.#scores.ofAttempt = 0
    const message: GenerateMessage = { ...this.#order, attempt: ++this.#attempt, delivered: this.#delivered.map((tokens) => packTokens(tokens)) }
    if (this.#stopped === undefined) this.#reader = this.#open(message, leftMs)
  }
}

/** An event and the prompt (of a batch) that it belongs to. */
export interface BatchEvent {
  readonly prompt: number
  readonly event: GenerateEvent
}

/** The generations of a request's prompts as one stream, at most one event read ahead of each. */
export class Batch {
  /** What has come so far, for the trace: `firstAfterMs` from the beginning to the first token. */
  readonly seen = { firstAfterMs: undefined as number | undefined, finishes: [] as Array<FinishReason>, promptTokens: 0, completionTokens: 0, cachedTokens: 0 }
  readonly #beganAtMs = performance.now()
  readonly #generations: ReadonlyArray<Generation>
  readonly #ready: Array<BatchEvent> = []
  readonly #idle: Array<number> = [] // generations with nothing being read
  #live: number
  #failure: { readonly error: unknown } | undefined
  #wake: (() => void) | undefined

  constructor(generations: ReadonlyArray<Generation>) {
    this.#generations = generations
    this.#live = generations.length
    for (const prompt of generations.keys()) this.#idle.push(prompt)
  }

  /** The next event of any, or undefined when all have ended. Rejects with the first Fault of any, and stops the others. */
  async next(): Promise<BatchEvent | undefined> {
    for (let idle = this.#idle.pop(); idle !== undefined; idle = this.#idle.pop()) this.#read(idle)
    for (;;) {
      if (this.#failure !== undefined) throw this.#failure.error
      const ready = this.#ready.shift()
      if (ready !== undefined) {
        this.#idle.push(ready.prompt)
        this.#see(ready.event)
        return ready
      }
      if (this.#live === 0) return undefined
      await new Promise<void>((resolve) => (this.#wake = resolve))
    }
  }

  stop(fault: Fault): void {
    for (const generation of this.#generations) generation.stop(fault)
    this.#settle({ error: fault })
  }

  #see(event: GenerateEvent): void {
    if (event.type === "prompt") {
      this.seen.promptTokens += event.tokens.byteLength / Int32Array.BYTES_PER_ELEMENT
      this.seen.cachedTokens += event.cachedTokens
    } else if (event.type === "delta") {
      this.seen.firstAfterMs ??= performance.now() - this.#beganAtMs
      this.seen.completionTokens += event.tokens.length
      if (event.finish !== undefined) this.seen.finishes.push(event.finish)
    }
  }

  #read(prompt: number): void {
    this.#generations[prompt]!.next().then(
      (event) => {
        if (event === undefined) this.#live--
        else this.#ready.push({ prompt, event })
        this.#settle(undefined)
      },
      (error: unknown) => {
        const fault = Fault.from(error, "request")
        for (const generation of this.#generations) generation.stop(fault)
        this.#settle({ error })
      },
    )
  }

  #settle(failure: { readonly error: unknown } | undefined): void {
    this.#failure ??= failure
    const wake = this.#wake
    this.#wake = undefined
    wake?.()
  }
}
