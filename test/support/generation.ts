/** A generation on an engine as its callers see it: what it was told, in order, and how it ended. */
import type { Engine } from "../../actors/engine/engine.ts"
import type { GenerationSpec } from "../../actors/engine/sequence.ts"
import type { TokenEvent } from "../../actors/messages/decode.ts"
import { defaultSampling } from "../../actors/messages/sampling.ts"
import type { Fault } from "../../actors/runtime/fault.ts"

export const specOf = (id: string, prompt: ReadonlyArray<number>, more: Partial<GenerationSpec> = {}): GenerationSpec => ({
  id,
  requestId: id,
  hashRoot: "0123456789abcdef",
  prompt: Int32Array.from(prompt),
  delivered: [],
  choices: 1,
  finished: [],
  sampling: { ...defaultSampling, seed: 1 },
  maxTokens: 8,
  stopTokens: new Set(),
  suppressedTokens: [],
  logprobs: -1,
  promptLogprobs: false,
  ...more,
})

export class Generation {
  readonly spec: GenerationSpec
  /** Of each choice: what was delivered before, and what was drawn since. */
  readonly tokens: ReadonlyArray<Array<number>>
  readonly finishes: Array<TokenEvent["finish"]>
  readonly events: Array<TokenEvent> = []
  /** By prompt position. */
  readonly scores = new Map<number, number>()
  /** Undefined once it has ended, or why it failed. */
  readonly ended: Promise<Fault | undefined>
  readonly reserved: Promise<number>
  cachedTokens: number | undefined
  prefillDone = false
  /** What `sink.writable` says. */
  writable = true
  /** Called with each token, before anything else can happen. */
  onToken: (event: TokenEvent) => void = () => {}
  readonly #engine: Engine
  /** Has blocks. */
  isReserved = false
  #over = false
  #begun = false

  /** Reserves; throws what the engine refuses with. */
  constructor(engine: Engine, spec: GenerationSpec) {
    this.#engine = engine
    this.spec = spec
    this.tokens = Array.from({ length: spec.choices }, (_, choice) => [...(spec.delivered[choice] ?? [])])
    this.finishes = this.tokens.map(() => "")
    let resolveReserved: (prefixTokens: number) => void
    this.reserved = new Promise((resolve) => (resolveReserved = resolve))
    let resolveEnded: (fault: Fault | undefined) => void
    this.ended = new Promise((resolve) => (resolveEnded = resolve))
    const end = (fault: Fault | undefined) => {
      if (this.#over) throw new Error(`${spec.id} ended twice`)
      this.#over = true
      resolveEnded(fault)
    }
    engine.reserve(spec, {
      reserved: (prefixTokens) => {
        this.#alive()
        this.isReserved = true
        resolveReserved(prefixTokens)
      },
      token: (event) => {
        if (!this.prefillDone) throw new Error(`${spec.id}: a token of decode came before prefill was done`)
        this.#push(event)
      },
      ended: () => end(undefined),
      failed: end,
      writable: () => this.writable,
    })
  }

  get over(): boolean {
    return this.#over
  }

  prefill(): void {
    this.#begun = true
    this.#engine.prefill(this.spec.id, {
      scores: ({ position, logprobs }) => {
        this.#alive()
        logprobs.forEach((logprob, i) => this.scores.set(position + i, logprob))
      },
      token: (event) => {
        if (this.prefillDone) throw new Error(`${this.spec.id}: a token of prefill came after it was done`)
        this.#push(event)
      },
      done: (cachedTokens) => {
        this.#alive()
        this.prefillDone = true
        this.cachedTokens = cachedTokens
      },
      failed: () => {},
    })
  }

  /** Begins once there is a place, and waits for the end. */
  async run(): Promise<this> {
    await Promise.race([this.reserved, this.ended])
    if (!this.#over && !this.#begun) this.prefill()
    await this.ended
    return this
  }

  #alive(): void {
    if (this.#over) throw new Error(`${this.spec.id} was told of something after its end`)
  }

  #push(event: TokenEvent): void {
    this.#alive()
    const tokens = this.tokens[event.choice]!
    if (event.index !== tokens.length) throw new Error(`${this.spec.id}: token ${event.index} of choice ${event.choice} came in place of ${tokens.length}`)
    if (this.finishes[event.choice] !== "") throw new Error(`${this.spec.id}: choice ${event.choice} goes on after its end`)
    tokens.push(event.token)
    this.finishes[event.choice] = event.finish
    this.events.push(event)
    this.onToken(event)
  }
}

export const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
