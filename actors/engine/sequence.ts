/**
 * A generation inside the engine: one group a request, one sequence a choice. A sequence is its tokens, how many of them
 * have KV, and the table of blocks that hold it; prefill, decode and recomputation differ only in how many are missing.
 */
import type { Fault } from "../runtime/fault.ts"
import type { PromptScores } from "../messages/prefill.ts"
import type { TokenEvent } from "../messages/decode.ts"
import type { Sampling } from "../messages/sampling.ts"
import type { BlockHash } from "../messages/hashes.ts"
import { blockHash } from "./block-hash.ts"
import type { BlockManager } from "./block-manager.ts"

export interface GenerationSpec {
  readonly id: string
  readonly requestId: string
  /** Traceparent of the request, for those who hear of its blocks. */
  readonly trace?: string
  readonly hashRoot: BlockHash
  readonly prompt: Int32Array
  /** What each choice has drawn already, elsewhere; empty where the generation is new. */
  readonly delivered: ReadonlyArray<Int32Array>
  readonly choices: number
  /** Choices that need no more tokens. */
  readonly finished: ReadonlyArray<number>
  readonly sampling: Sampling
  /** Tokens of each choice in all. */
  readonly maxTokens: number
  readonly stopTokens: ReadonlySet<number>
  readonly suppressedTokens: ReadonlyArray<number>
  /** Top log probabilities of each token; -1: none at all. */
  readonly logprobs: number
  readonly promptLogprobs: boolean
  /** Compute the prompt and draw the first tokens only, and hold the blocks until it is cancelled: others decode. */
  readonly prefillOnly?: boolean
}

/**
 * Who hears of a generation's place and of the tokens after the first. Calls come between steps and must not throw; the
 * last one is `ended` or `failed`.
 */
export interface DecodeSink {
  reserved(prefixTokens: number): void
  token(event: TokenEvent): void
  ended(): void
  failed(fault: Fault): void
  /** False while the reader is behind: the sequences pause, and keep their blocks while nobody else needs them. */
  writable(): boolean
}

/** Who hears of a generation's prompt and first tokens. */
export interface PrefillSink {
  scores(scores: PromptScores): void
  token(event: TokenEvent): void
  done(cachedTokens: number, computedTokens: number): void
  failed(fault: Fault): void
  /** KV of one layer of these blocks, as places in the table, is complete. Called while the step goes on. */
  layer?(layer: number, firstBlock: number, blocks: number): void
}

export class Group {
  readonly spec: GenerationSpec
  readonly arrival: number
  readonly sink: DecodeSink
  /** Set when prefill may begin. */
  prefill: PrefillSink | undefined
  sequences: Array<Sequence>
  /** Numbers of the native samplers, by choice; made when a choice first draws. */
  readonly samplers: Array<number> = []
  reserved = false
  prefillDone = false
  cancelled = false
  /** The first tokens of a prompt that others decode are drawn. */
  drawn = false
  /** Choices whose text was complete before this generation was taken over. */
  readonly finishedEarly = new Set<number>()
  /** Blocks whose layers have been reported to the prefill sink. */
  reportedBlocks = 0
  cachedTokens = 0
  computedTokens = 0
  /** Prompt positions below this have been scored. */
  scoredTo = 1

  constructor(spec: GenerationSpec, arrival: number, sink: DecodeSink) {
    this.spec = spec
    this.arrival = arrival
    this.sink = sink
    this.sequences = spec.delivered.some((tokens) => tokens.length > 0)
      ? spec.delivered.flatMap((tokens, choice) => (spec.finished.includes(choice) ? [] : [new Sequence(this, choice, tokens)]))
      : [new Sequence(this, 0, new Int32Array(0))] // the other choices fork from it once the prompt is computed
  }

  /** Its reader is behind: none of its choices draws until it has caught up. */
  get paused(): boolean {
    return this.prefillDone && !this.sink.writable()
  }

  /** Its KV may still come from elsewhere: nothing has begun here. */
  get waitsForKv(): boolean {
    return this.prefill === undefined && !this.cancelled
  }

  /** It has drawn its first tokens and only waits to be taken over. */
  get held(): boolean {
    return this.prefillDone && this.spec.prefillOnly === true
  }

  /** Choices that have no sequence of their own yet. */
  get unforked(): number {
    const forks = !this.prefillDone && this.sequences.length === 1 && this.spec.delivered.every((tokens) => tokens.length === 0)
    return forks ? this.spec.choices - 1 : 0
  }
}

export class Sequence {
  readonly group: Group
  readonly choice: number
  #tokens: Int32Array
  length: number
  /** Leading tokens whose KV is in the pool. */
  computed = 0
  /** Block i holds tokens i * blockTokens …; leading ones may be shared. */
  table: Array<number> = []
  /** Chained hashes of the full blocks that were computed or looked up. */
  hashes: Array<BlockHash> = []
  /** Has blocks for all its tokens. */
  running = false
  finished = false
  /** To be finished at the next step's boundary. */
  stopped = false
  /** Has given its blocks away once, and what they held may be had again. */
  preempted = false
  /** Whoever brings KV that it gave away; it runs when that has come. */
  returning: object | undefined

  constructor(group: Group, choice: number, delivered: Int32Array) {
    this.group = group
    this.choice = choice
    this.length = group.spec.prompt.length + delivered.length
    this.#tokens = new Int32Array(this.length + 64)
    this.#tokens.set(group.spec.prompt)
    this.#tokens.set(delivered, group.spec.prompt.length)
  }

  /** A further choice from the end of this one's prompt, sharing its blocks; the caller counts the references. */
  fork(choice: number): Sequence {
    const fork = new Sequence(this.group, choice, new Int32Array(0))
    fork.running = this.running
    fork.computed = this.computed
    fork.table = [...this.table]
    fork.hashes = [...this.hashes]
    return fork
  }

  get outputLength(): number {
    return this.length - this.group.spec.prompt.length
  }

  get pending(): number {
    return this.length - this.computed
  }

  tokens(from: number, to: number): Int32Array {
    return this.#tokens.subarray(from, to)
  }

  append(token: number): void {
    if (this.length === this.#tokens.length) {
      const larger = new Int32Array(2 * this.length)
      larger.set(this.#tokens)
      this.#tokens = larger
    }
    this.#tokens[this.length++] = token
  }

  /** Extends the known hashes over the full blocks of the first `tokens` tokens. */
  hashUpTo(tokens: number, blockTokens: number): void {
    for (let end = (this.hashes.length + 1) * blockTokens; end <= tokens; end += blockTokens) {
      this.hashes.push(blockHash(this.hashes.at(-1) ?? this.group.spec.hashRoot, this.tokens(end - blockTokens, end)))
    }
  }

  /** Makes the content of its blocks from one place to another known, which are full and hashed. */
  seal(blocks: BlockManager, from: number, to: number): void {
    for (let place = from; place < to; place++) blocks.seal(this.table[place]!, this.hashes[place]!, this.group.spec.trace, place)
  }
}
