/**
 * The generations of an engine: their samplers, their choices from the first token to the last, and what their sinks hear of
 * it. Which of them run, and on which blocks, is the queue's; when, is the step loop's.
 */
import type { Engine as Kernels } from "../../kernels/index.ts"
import { Fault } from "../runtime/fault.ts"
import type { TokenEvent } from "../messages/decode.ts"
import type { readOutput } from "./batch.ts"
import type { BlockManager } from "./block-manager.ts"
import { Group, type DecodeSink, type GenerationSpec, type PrefillSink, type Sequence } from "./sequence.ts"
import type { SequenceQueue } from "./sequence-queue.ts"

/** Totals since the start. */
export interface EngineCounters {
  steps: number
  promptTokens: number
  cachedTokens: number
  outputTokens: number
  computeMs: number
  prefillMs: number
  /** What was computed in that time. */
  prefillTokens: number
  /** Of preempted sequences: what was brought back and not computed again. */
  restoredTokens: number
}

export interface GenerationsOptions {
  /** Names the engine in faults. */
  readonly name: string
  readonly kernels: Pick<Kernels, "info" | "createSampler" | "freeSampler">
  readonly blocks: BlockManager
  readonly queue: SequenceQueue
  readonly counters: EngineCounters
}

type Drawn = ReturnType<typeof readOutput>

/** Stands in for the prefill sink of a generation whose prompt was computed elsewhere. */
const adopted: PrefillSink = { scores: () => {}, token: () => {}, done: () => {}, failed: () => {} }

export class Generations {
  readonly #options: GenerationsOptions
  readonly #groups = new Map<string, Group>()
  #arrivals = 0
  /** The kernels are broken: what they hold goes with them. */
  unusable = false

  constructor(options: GenerationsOptions) {
    this.#options = options
  }

  get all(): ReadonlyArray<Group> {
    return [...this.#groups.values()]
  }

  get(id: string): Group | undefined {
    return this.#groups.get(id)
  }

  /** Takes up a generation, which waits for its blocks. Throws what the kernels refuse its sampling with. */
  add(spec: GenerationSpec, sink: DecodeSink): void {
    const group = new Group(spec, this.#arrivals++, sink)
    const first = group.sequences[0]
    // The kernels check the options once for all choices, now: in the middle of a step they would fail everybody.
    if (first !== undefined && spec.maxTokens > 0) this.samplerOf(first, first.choice)
    this.#groups.set(spec.id, group)
    this.#options.queue.enqueue(group.sequences)
  }

  /** Goes on with a generation whose KV has come whole. Throws a Fault where `first` are not the first token of each choice. */
  adopt(group: Group, first: ReadonlyArray<TokenEvent>): void {
    const { name, kernels, blocks } = this.#options
    const { spec } = group
    const leader = group.sequences[0]!
    const drawn = new Set(first.map(({ choice }) => choice))
    const fits = ({ choice, token }: TokenEvent) => choice < spec.choices && token >= 0 && token < kernels.info.vocabulary
    if (first.length !== (spec.maxTokens === 0 ? 0 : spec.choices) || drawn.size !== first.length || !first.every(fits)) {
      throw new Fault({ code: "internal", message: `${name}: the first tokens of ${spec.id} are not one of each of its ${spec.choices} choices`, hop: name })
    }
    leader.computed = leader.length
    leader.hashUpTo(leader.length, kernels.info.blockTokens)
    leader.seal(blocks, 0, Math.floor(leader.length / kernels.info.blockTokens))
    const choices = Array.from({ length: group.unforked }, (_, i) => i + 1)
    for (const choice of choices) this.fork(leader, choice)
    group.samplers.forEach((_, choice) => this.freeSampler(group, choice)) // they are made again with what was drawn
    group.prefill = adopted
    group.prefillDone = true
    for (const { choice, token, finish } of first) {
      const sequence = group.sequences.find((other) => other.choice === choice)
      sequence?.append(token)
      if (sequence !== undefined && (finish !== "" || group.finishedEarly.has(choice))) this.finish(sequence)
    }
  }

  samplerOf(sequence: Sequence, choice: number): number {
    const { spec, samplers } = sequence.group
    return (samplers[choice] ??= this.#options.kernels.createSampler(
      { ...spec.sampling, suppressedTokens: spec.suppressedTokens, choice },
      spec.prompt,
      sequence.tokens(spec.prompt.length, sequence.length).slice(),
    ))
  }

  freeSampler(group: Group, choice: number): void {
    const sampler = group.samplers[choice]
    if (sampler === undefined || this.unusable) return
    this.#options.kernels.freeSampler(sampler)
    delete group.samplers[choice]
  }

  /** Another choice of a sequence's request, on the same blocks. */
  fork(sequence: Sequence, choice: number): Sequence {
    const fork = this.#options.queue.fork(sequence, choice)
    sequence.group.sequences.push(fork)
    return fork
  }

  /** A token that a choice has drawn. */
  draw(sequence: Sequence, drawn: Drawn): void {
    const { group } = sequence
    const index = sequence.outputLength
    sequence.append(drawn.token)
    this.#options.counters.outputTokens++
    const finish = this.#finishOf(group, drawn.token, sequence.outputLength, sequence.length)
    const event = { ...drawn, choice: sequence.choice, index, finish } as const
    if (group.prefillDone) group.sink.token(event)
    else group.prefill?.token(event)
    if (finish !== "") this.finish(sequence)
  }

  /** The first token of a choice that is decoded elsewhere. */
  drawFirst({ group, outputLength, length }: Sequence, choice: number, drawn: Drawn): void {
    group.drawn = true
    group.prefill?.token({ ...drawn, choice, index: outputLength, finish: this.#finishOf(group, drawn.token, outputLength + 1, length + 1) })
  }

  #finishOf({ spec }: Group, token: number, outputLength: number, length: number): TokenEvent["finish"] {
    if (spec.stopTokens.has(token)) return "stop"
    return outputLength >= spec.maxTokens || length >= this.#options.kernels.info.contextLength ? "length" : ""
  }

  finish(sequence: Sequence): void {
    this.#options.queue.remove(sequence)
    sequence.finished = true
    this.freeSampler(sequence.group, sequence.choice)
  }

  /** After the step that drew the first token of every choice that has blocks: the prompt's part is over. */
  finishPrefill(group: Group): void {
    if (group.cancelled || !this.#groups.has(group.spec.id)) return
    const hasDrawn = (sequence: Sequence) => sequence.finished || sequence.outputLength > (group.spec.delivered[sequence.choice]?.length ?? 0)
    const begun = group.drawn || (group.sequences.some(hasDrawn) && group.sequences.every((sequence) => !sequence.running || hasDrawn(sequence)))
    const scoredOnly = group.spec.maxTokens === 0 && group.sequences.every(({ pending }) => pending === 0)
    if (!group.prefillDone && (begun || scoredOnly)) {
      group.prefillDone = true
      this.#options.counters.promptTokens += group.spec.prompt.length
      this.#options.counters.cachedTokens += group.cachedTokens
      group.prefill?.done(group.cachedTokens, group.computedTokens)
    }
    if (group.spec.prefillOnly === true) return // its blocks stay until they are taken over
    if (scoredOnly || group.sequences.every(({ finished }) => finished)) {
      this.drop(group)
      group.sink.ended()
    }
  }

  /** At a step's boundary: what was cancelled or stopped while it ran. */
  reap(): void {
    for (const group of this.all) {
      for (const sequence of group.sequences) if (sequence.stopped && !sequence.finished) this.finish(sequence)
      if (group.cancelled) this.drop(group)
      else this.finishPrefill(group)
    }
  }

  /** Forgets a generation and frees what it holds. */
  drop(group: Group): void {
    this.#groups.delete(group.spec.id)
    this.#options.queue.removeGroup(group)
    group.samplers.forEach((_, choice) => this.freeSampler(group, choice))
  }

  failAll(code: "disconnected" | "shutting_down", message: string): void {
    const fault = new Fault({ code, message, hop: this.#options.name })
    for (const group of this.all) {
      this.drop(group)
      if (group.cancelled) continue
      group.prefill?.failed(fault)
      group.sink.failed(fault)
    }
  }
}
