/**
 * The engine: sequences over a pool of KV blocks, run step by step on the kernels. Plain code without bus or Effect; it is
 * driven by calls between steps and speaks to its callers through sinks.
 *
 * A generation: `reserve` (waits for blocks) -> `sink.reserved` -> `prefill` -> first tokens to the prefill sink -> the
 * others to the decode sink -> `ended`. `cancel` takes effect at the next step's boundary. Choices that go on with tokens
 * delivered elsewhere each have their own blocks; those that have none yet begin later, through the decode sink.
 */
import { limits } from "../../config/limits.ts"
import type { Engine as Kernels, StepResult } from "../../kernels/index.ts"
import { Fault } from "../runtime/fault.ts"
import type { TokenEvent } from "../messages/decode.ts"
import type { BlockHash } from "../messages/hashes.ts"
import type { ChunkRange } from "../messages/kv-chunk.ts"
import { BlockManager, type BlockEvents } from "./block-manager.ts"
import { composeBatch, readOutput, type Output } from "./batch.ts"
import { compose, type Budget, type Chunk } from "./composer.ts"
import { Group, type DecodeSink, type GenerationSpec, type PrefillSink, type Sequence } from "./sequence.ts"
import { SequenceQueue } from "./sequence-queue.ts"

export interface EngineOptions {
  /** Names the engine in faults, for example "worker w0". */
  readonly name: string
  /** Most sequences at once. */
  readonly maxBatch: number
  readonly events?: BlockEvents
  readonly budget?: Partial<Budget>
}

/** Stands in for the prefill sink of a generation whose prompt was computed elsewhere. */
const adopted: PrefillSink = { scores: () => {}, token: () => {}, done: () => {}, failed: () => {} }

/** Blocks that are kept in the pool for whoever sends them elsewhere. */
export interface HeldBlocks {
  readonly hashes: ReadonlyArray<BlockHash>
  /** Writes chunks of these of the blocks, place 0 being the first of them, and returns the CRC-32C continued from `seed`. */
  writeOf(places: ReadonlyArray<number>): (range: ChunkRange, into: Uint8Array, offset: number, seed: number) => number
  release(): void
}

/** What the engine needs of kernels' Engine. */
export type StepKernels = Pick<Kernels, "info" | "createSampler" | "freeSampler" | "step" | "exportLayers" | "importLayers" | "copyBlock">

export class Engine {
  readonly blocks: BlockManager
  readonly blockTokens: number
  readonly #kernels: StepKernels
  readonly #options: EngineOptions
  readonly #budget: Budget
  readonly #groups = new Map<string, Group>()
  readonly #held = new Set<ReadonlyArray<number>>()
  readonly #queue: SequenceQueue
  #arrivals = 0
  #stepping = false
  #closed = false
  #unusable = false
  #wake: (() => void) | undefined
  readonly #loop: Promise<void>
  /** Settles when a step has failed: the engine is of no use any more, and its owner makes a new one. */
  readonly broken: Promise<Error>
  #break: (error: Error) => void = () => {}
  /** Totals since the start. */
  readonly counters = { steps: 0, promptTokens: 0, cachedTokens: 0, outputTokens: 0, computeMs: 0, prefillMs: 0 }

  constructor(kernels: StepKernels, options: EngineOptions) {
    this.#kernels = kernels
    this.#options = options
    this.blockTokens = kernels.info.blockTokens
    this.blocks = new BlockManager(kernels.info.blocks, options.events)
    this.#budget = { tokens: limits.stepTokens, mixedTokens: limits.mixedStepTokens, outputs: limits.stepOutputs, ...options.budget }
    this.#queue = new SequenceQueue({
      blocks: this.blocks,
      blockTokens: this.blockTokens,
      maxBatch: options.maxBatch,
      copyBlock: (from, to) => kernels.copyBlock(from, to),
    })
    this.broken = new Promise((resolve) => (this.#break = resolve))
    this.#loop = this.#run()
  }

  get load(): { readonly sequences: number; readonly waiting: number; readonly preemptions: number } {
    return { sequences: this.#queue.running.length, waiting: this.#queue.waiting.length, preemptions: this.#queue.preemptions }
  }

  /** Whether somebody waits for a prompt: for its turn, its computation, or its KV on the way in or out. */
  get hasPrompts(): boolean {
    for (const group of this.#groups.values()) if (!group.prefillDone || group.held) return true
    return false
  }

  get requestIds(): Array<string> {
    return [...this.#groups.values()].map(({ spec }) => spec.requestId)
  }

  /**
   * Takes blocks for a generation, now or when some are free; `sink.reserved` tells. Throws a Fault when it can never fit:
   * its tokens are more than the context or the pool holds, or its choices more than a batch does.
   */
  reserve(spec: GenerationSpec, sink: DecodeSink): void {
    const refuse = (code: "context_length_exceeded" | "invalid_request" | "shutting_down", message: string, param?: string) => {
      throw new Fault({ code, message, hop: this.#options.name, param })
    }
    if (this.#closed) refuse("shutting_down", `${this.#options.name} is stopping`)
    if (this.#groups.has(spec.id)) refuse("invalid_request", `transfer ${spec.id} exists already`)
    if (spec.choices > this.#options.maxBatch) refuse("invalid_request", `n: ${spec.choices} choices are more than the ${this.#options.maxBatch} sequences that ${this.#options.name} decodes at once`, "n")
    const { contextLength, vocabulary } = this.#kernels.info
    const tokens = spec.prompt.length + spec.maxTokens
    const pool = this.blocks.total * this.blockTokens
    if (tokens > contextLength) refuse("context_length_exceeded", `${spec.prompt.length} prompt tokens and ${spec.maxTokens} more are over the context of ${contextLength}`)
    if (tokens > pool) refuse("context_length_exceeded", `${spec.prompt.length} prompt tokens and ${spec.maxTokens} more are over the ${pool} tokens that the KV pool of ${this.#options.name} holds`)
    for (const list of [spec.prompt, ...spec.delivered]) {
      const strange = list.find((token) => token < 0 || token >= vocabulary)
      if (strange !== undefined) refuse("invalid_request", `token ${strange} is not in the vocabulary of ${vocabulary}`, "prompt")
    }
    if (spec.prompt.length === 0) refuse("invalid_request", "the prompt has no tokens", "prompt")
    const { delivered, choices, maxTokens, suppressedTokens, sampling } = spec
    if ((delivered.length > 0 && delivered.length !== choices) || delivered.some((list) => list.length > maxTokens)) refuse("invalid_request", `delivered: expected the tokens of ${choices} choices, at most ${maxTokens} of each`, "delivered")
    if (sampling.minTokens > 0 && new Set(suppressedTokens).size >= vocabulary) refuse("invalid_request", "min_tokens: every token of the vocabulary would be suppressed", "min_tokens")
    const group = new Group(spec, this.#arrivals++, sink)
    const first = group.sequences[0]
    try {
      // The kernels check the options once for all choices, now: in the middle of a step they would fail everybody.
      if (first !== undefined && maxTokens > 0) this.#samplerOf(first, first.choice)
    } catch (error) {
      refuse("invalid_request", error instanceof Error ? error.message : String(error))
    }
    this.#groups.set(spec.id, group)
    this.#queue.enqueue(group.sequences)
    this.#notify()
  }

  /** Begins to compute a reserved generation's prompt. Throws a Fault when there is no such reservation. */
  prefill(id: string, sink: PrefillSink): void {
    const group = this.#groups.get(id)
    if (group === undefined || group.cancelled) throw new Fault({ code: "unavailable", message: `${this.#options.name} has no reservation ${id}`, hop: this.#options.name })
    if (group.prefill !== undefined) throw new Fault({ code: "invalid_request", message: `the prompt of ${id} is being computed already`, hop: this.#options.name })
    group.prefill = sink
    group.reportedBlocks = this.computedBlocks(id)
    this.#notify()
  }

  /** The blocks that a reserved generation lacks: their place in its table, and their hashes. */
  missingBlocks(id: string): { readonly from: number; readonly hashes: ReadonlyArray<BlockHash> } {
    const sequence = this.#groups.get(id)?.sequences[0]
    if (sequence === undefined || sequence.group.spec.promptLogprobs) return { from: 0, hashes: [] }
    const from = Math.floor(sequence.computed / this.blockTokens)
    const full = Math.floor((sequence.length - 1) / this.blockTokens)
    sequence.hashUpTo(full * this.blockTokens, this.blockTokens)
    return { from, hashes: sequence.hashes.slice(from, full) }
  }

  /** Takes blocks whose KV has been imported as the next of a reservation's prefix. False when it is not wanted any more. */
  acceptPrefix(id: string, from: number, blocks: number): boolean {
    const group = this.#groups.get(id)
    const sequence = group?.sequences[0]
    if (group === undefined || sequence === undefined || group.cancelled || group.prefill !== undefined || !sequence.running) return false
    if (sequence.computed !== from * this.blockTokens || (from + blocks) * this.blockTokens >= sequence.length) return false
    sequence.computed += blocks * this.blockTokens
    group.cachedTokens += blocks * this.blockTokens
    for (let place = from; place < from + blocks; place++) this.blocks.seal(sequence.table[place]!, sequence.hashes[place]!, group.spec.trace, place)
    return true
  }

  /** Holds those of the blocks with these contents that are here, so that they can be written out until their release. */
  hold(hashes: ReadonlyArray<BlockHash>): HeldBlocks {
    const found = hashes.flatMap((hash) => {
      const block = this.blocks.acquire(hash)
      return block === undefined ? [] : [{ hash, block }]
    })
    const table = found.map(({ block }) => block)
    this.#held.add(table)
    return {
      hashes: found.map(({ hash }) => hash),
      writeOf: (places) => (range, into, offset, seed) => {
        const blocks = places.slice(range.firstBlock, range.firstBlock + range.blocks).map((place) => table[place]!)
        return this.#kernels.exportLayers(Int32Array.from(blocks), range.firstLayer, range.layers, into, offset, seed)
      },
      release: () => {
        if (!this.#held.delete(table)) return
        this.blocks.release(table)
        this.#notify() // a reservation may wait for them
      },
    }
  }

  /** Leading blocks of a generation whose KV is in the pool. */
  computedBlocks(id: string): number {
    return Math.floor((this.#groups.get(id)?.sequences[0]?.computed ?? 0) / this.blockTokens)
  }

  /** Blocks that a generation's tokens fill, the last one perhaps in part. */
  neededBlocks(id: string): number {
    return Math.ceil((this.#groups.get(id)?.sequences[0]?.length ?? 0) / this.blockTokens)
  }

  /** Writes KV of a generation as a chunk's payload and returns its CRC-32C, continued from `seed`. Throws when it is gone. */
  exportLayers(id: string, range: ChunkRange, into: Uint8Array, offset: number, seed: number): number {
    return this.#kernels.exportLayers(this.#blocksOf(id, range), range.firstLayer, range.layers, into, offset, seed)
  }

  /** Takes KV of a reservation that has not begun; false where the CRC does not match. Throws when it is gone. */
  importLayers(id: string, range: ChunkRange, payload: Uint8Array, seed: number, crc: number): boolean {
    const group = this.#groups.get(id)
    if (group === undefined || group.cancelled || group.prefill !== undefined) throw this.#gone(id)
    return this.#kernels.importLayers(this.#blocksOf(id, range), range.firstLayer, range.layers, payload, 0, seed, crc)
  }

  /**
   * Takes over a reservation whose KV has come whole, with the first tokens that were drawn where it was computed. Throws a Fault
   * when it is gone, or these are not the first token of each choice.
   */
  adopt(id: string, first: ReadonlyArray<TokenEvent>): void {
    const group = this.#groups.get(id)
    const leader = group?.sequences[0]
    if (group === undefined || leader === undefined || group.cancelled || group.prefill !== undefined || !leader.running) throw this.#gone(id)
    const { spec } = group
    const drawn = new Set(first.map(({ choice }) => choice))
    const fits = ({ choice, token }: TokenEvent) => choice < spec.choices && token >= 0 && token < this.#kernels.info.vocabulary
    if (first.length !== (spec.maxTokens === 0 ? 0 : spec.choices) || drawn.size !== first.length || !first.every(fits)) {
      throw new Fault({ code: "internal", message: `${this.#options.name}: the first tokens of ${id} are not one of each of its ${spec.choices} choices`, hop: this.#options.name })
    }
    leader.computed = leader.length
    leader.hashUpTo(leader.length, this.blockTokens)
    for (let place = 0; (place + 1) * this.blockTokens <= leader.length; place++) this.blocks.seal(leader.table[place]!, leader.hashes[place]!, group.spec.trace, place)
    const choices = Array.from({ length: group.unforked }, (_, i) => i + 1)
    for (const choice of choices) this.#fork(leader, choice)
    group.samplers.forEach((_, choice) => this.#freeSampler(group, choice)) // they are made again with what was drawn
    group.prefill = adopted
    group.prefillDone = true
    for (const { choice, token, finish } of first) {
      const sequence = group.sequences.find((other) => other.choice === choice)
      sequence?.append(token)
      if (sequence !== undefined && (finish !== "" || group.finishedEarly.has(choice))) this.#finish(sequence)
    }
    this.#notify()
  }

  #gone(id: string): Fault {
    return new Fault({ code: "unavailable", message: `${this.#options.name} has no reservation ${id} that waits for KV`, hop: this.#options.name })
  }

  #blocksOf(id: string, { firstBlock, blocks }: ChunkRange): Int32Array {
    const table = this.#groups.get(id)?.sequences[0]?.table ?? []
    if (firstBlock + blocks > table.length) throw this.#gone(id)
    return Int32Array.from(table.slice(firstBlock, firstBlock + blocks))
  }

  /** Ends one choice, whose text is complete: now, or at the end of the step in flight. */
  finish(id: string, choice: number): void {
    const group = this.#groups.get(id)
    if (group?.prefill === undefined) return void group?.finishedEarly.add(choice) // by its first token, before the KV has come
    const sequence = group.sequences.find((sequence) => sequence.choice === choice)
    if (sequence === undefined) return
    sequence.stopped = true
    this.#notify()
  }

  /** Tells that a paused generation's reader takes tokens again. */
  resume(): void {
    this.#notify()
  }

  /**
   * Stops a generation and frees its blocks: now, or at the end of the step in flight. Its sinks hear it at once, so that
   * the one that did not ask for it does not wait for ever, and nothing after that.
   */
  cancel(id: string): void {
    const group = this.#groups.get(id)
    if (group === undefined || group.cancelled) return
    group.cancelled = true
    if (!this.#stepping) this.#drop(group)
    const fault = new Fault({ code: "cancelled", message: `${this.#options.name}: the generation was cancelled`, hop: this.#options.name })
    group.prefill?.failed(fault)
    group.sink.failed(fault)
    this.#notify()
  }

  /** Fails every generation, waits for the step in flight, and ends. The kernels are the caller's to close. */
  async close(): Promise<void> {
    this.#closed = true
    this.#notify()
    await this.#loop
    this.#failAll("shutting_down", `${this.#options.name} is stopping`)
  }

  /** Throws when a block is lost or counted wrong. For tests, and when idle. */
  checkInvariants(): void {
    this.blocks.check([...[...this.#groups.values()].flatMap(({ sequences }) => sequences.map(({ table }) => table)), ...this.#held])
  }

  #notify(): void {
    this.#wake?.()
    this.#wake = undefined
  }

  async #run(): Promise<void> {
    await Promise.resolve() // the constructor's caller finishes first
    while (!this.#closed) {
      try {
        this.#reap()
        this.#announce(this.#queue.admit())
        const { preemptions } = this.#queue
        const chunks = this.#queue.ensureBlocks(compose(this.#queue.ready(), this.#budget))
        if (chunks.length > 0) await this.#step(chunks)
        // Where all have given way, the oldest of them fits again at once.
        else if (this.#queue.preemptions === preemptions) await new Promise<void>((resolve) => (this.#wake = resolve))
      } catch (error) {
        this.#stepping = false
        this.#closed = true
        this.#unusable = true
        this.#failAll("disconnected", `${this.#options.name}: a step failed`)
        this.#break(error instanceof Error ? error : new Error(String(error)))
      }
    }
  }

  async #step(chunks: ReadonlyArray<Chunk>): Promise<void> {
    const { batch, outputs } = composeBatch(chunks, (sequence, choice) => this.#samplerOf(sequence, choice))
    const layered = this.#completedBy(chunks).filter(({ sink }) => sink.layer !== undefined)
    this.#stepping = true
    const result = await this.#kernels.step(batch, layered.length === 0 ? undefined : (layer) => layered.forEach(({ sink, from, blocks }) => sink.layer?.(layer, from, blocks)))
    this.#stepping = false
    this.#apply(chunks, outputs, result)
  }

  /** The blocks that this step completes, and the prefill sinks that hear of them. */
  #completedBy(chunks: ReadonlyArray<Chunk>): Array<{ readonly sink: PrefillSink; readonly from: number; readonly blocks: number }> {
    return chunks.flatMap(({ sequence, tokens }) => {
      const { group } = sequence
      if (group.prefill === undefined || group.prefillDone) return []
      const end = sequence.computed + tokens
      const complete = end === sequence.length ? Math.ceil(end / this.blockTokens) : Math.floor(end / this.blockTokens)
      const from = group.reportedBlocks
      group.reportedBlocks = complete
      return complete > from ? [{ sink: group.prefill, from, blocks: complete - from }] : []
    })
  }

  /** At a step's boundary: what was cancelled or stopped while it ran. */
  #reap(): void {
    for (const group of [...this.#groups.values()]) {
      for (const sequence of group.sequences) if (sequence.stopped && !sequence.finished) this.#finish(sequence)
      if (group.cancelled) this.#drop(group)
      else this.#finishPrefill(group)
    }
  }

  #announce(admitted: ReadonlyArray<Sequence>): void {
    for (const { group } of admitted) {
      // One choice with blocks is enough to begin: to wait for all with some would be a deadlock in a small pool.
      if (group.reserved) continue
      group.reserved = true
      group.cachedTokens = group.sequences[0]!.computed
      group.sink.reserved(group.cachedTokens)
    }
  }

  #samplerOf(sequence: Sequence, choice: number): number {
    const { spec, samplers } = sequence.group
    return (samplers[choice] ??= this.#kernels.createSampler(
      { ...spec.sampling, suppressedTokens: spec.suppressedTokens, choice },
      spec.prompt,
      sequence.tokens(spec.prompt.length, sequence.length).slice(),
    ))
  }

  #apply(chunks: ReadonlyArray<Chunk>, outputs: ReadonlyArray<Output>, result: StepResult): void {
    this.counters.steps++
    this.counters.computeMs += result.computeMs
    const rows = chunks.reduce((sum, { tokens }) => sum + tokens, 0)
    const prefillRows = chunks.reduce((sum, { sequence, tokens }) => sum + (sequence.group.prefillDone ? 0 : tokens), 0)
    this.counters.prefillMs += (result.computeMs * prefillRows) / rows
    for (const { sequence, tokens } of chunks) {
      const sealed = Math.floor(sequence.computed / this.blockTokens)
      sequence.computed += tokens
      sequence.hashUpTo(sequence.computed, this.blockTokens)
      for (let place = sealed; (place + 1) * this.blockTokens <= sequence.computed; place++) this.blocks.seal(sequence.table[place]!, sequence.hashes[place]!, sequence.group.spec.trace, place)
      if (!sequence.group.prefillDone) sequence.group.computedTokens += tokens
    }
    this.#reportScores(outputs, result)
    // All choices fork before any of them draws, since one that ends at once gives its blocks back.
    const drawing = outputs.map(({ sequence, draws }) =>
      draws === undefined || draws === sequence.choice || sequence.group.spec.prefillOnly === true ? sequence : this.#fork(sequence, draws),
    )
    outputs.forEach(({ draws }, index) => {
      const sequence = drawing[index]!
      if (draws !== undefined && sequence.group.spec.prefillOnly === true) return this.#drawFirst(sequence, draws, readOutput(result, index, sequence.group.spec.logprobs))
      if (draws !== undefined && !sequence.group.cancelled && !sequence.stopped) this.#draw(sequence, readOutput(result, index, sequence.group.spec.logprobs))
    })
    for (const { sequence } of chunks) this.#finishPrefill(sequence.group)
  }

  #fork(sequence: Sequence, choice: number): Sequence {
    const fork = this.#queue.fork(sequence, choice)
    sequence.group.sequences.push(fork)
    return fork
  }

  /** The first token of a choice that is decoded elsewhere. */
  #drawFirst({ group, outputLength, length }: Sequence, choice: number, drawn: ReturnType<typeof readOutput>): void {
    group.drawn = true
    group.prefill?.token({ ...drawn, choice, index: outputLength, finish: this.#finishOf(group, drawn.token, outputLength + 1, length + 1) })
  }

  #finishOf({ spec }: Group, token: number, outputLength: number, length: number): TokenEvent["finish"] {
    if (spec.stopTokens.has(token)) return "stop"
    return outputLength >= spec.maxTokens || length >= this.#kernels.info.contextLength ? "length" : ""
  }

  #draw(sequence: Sequence, drawn: ReturnType<typeof readOutput>): void {
    const { group } = sequence
    const index = sequence.outputLength
    sequence.append(drawn.token)
    this.counters.outputTokens++
    const finish = this.#finishOf(group, drawn.token, sequence.outputLength, sequence.length)
    const event = { ...drawn, choice: sequence.choice, index, finish } as const
    if (group.prefillDone) group.sink.token(event)
    else group.prefill?.token(event)
    if (finish !== "") this.#finish(sequence)
  }

  #finish(sequence: Sequence): void {
    const { group } = sequence
    this.#queue.remove(sequence)
    sequence.finished = true
    this.#freeSampler(group, sequence.choice)
  }

  /** After the step that drew the first token of every choice that has blocks: the prompt's part is over. */
  #finishPrefill(group: Group): void {
    if (group.cancelled || !this.#groups.has(group.spec.id)) return
    const hasDrawn = (sequence: Sequence) => sequence.finished || sequence.outputLength > (group.spec.delivered[sequence.choice]?.length ?? 0)
    const begun = group.drawn || (group.sequences.some(hasDrawn) && group.sequences.every((sequence) => !sequence.running || hasDrawn(sequence)))
    const scoredOnly = group.spec.maxTokens === 0 && group.sequences.every(({ pending }) => pending === 0)
    if (!group.prefillDone && (begun || scoredOnly)) {
      group.prefillDone = true
      this.counters.promptTokens += group.spec.prompt.length
      this.counters.cachedTokens += group.cachedTokens
      group.prefill?.done(group.cachedTokens, group.computedTokens)
    }
    if (group.spec.prefillOnly === true) return // its blocks stay until they are taken over
    if (scoredOnly || group.sequences.every(({ finished }) => finished)) {
      this.#drop(group)
      group.sink.ended()
    }
  }

  /** Log probabilities of the prompt, a run of positions a call. */
  #reportScores(outputs: ReadonlyArray<Output>, result: StepResult): void {
    for (let from = 0; from < outputs.length; ) {
      const { sequence, scores: position } = outputs[from]!
      let to = from + 1
      while (to < outputs.length && outputs[to]!.sequence === sequence && outputs[to]!.scores !== undefined) to++
      if (position !== undefined && !sequence.group.cancelled) {
        const width = Math.max(0, sequence.group.spec.logprobs)
        const tops = Array.from({ length: to - from }, (_, i) => readOutput(result, from + i, width))
        sequence.group.scoredTo = Math.max(sequence.group.scoredTo, position + to - from)
        sequence.group.prefill?.scores({
          position,
          width,
          logprobs: result.logprobs.slice(from, to),
          topTokens: Int32Array.from(tops.flatMap(({ topTokens }) => topTokens)),
          topLogprobs: Float32Array.from(tops.flatMap(({ topLogprobs }) => topLogprobs)),
        })
      }
      from = to
    }
  }

  #freeSampler(group: Group, choice: number): void {
    const sampler = group.samplers[choice]
    if (sampler === undefined || this.#unusable) return // what broken kernels hold goes with them
    this.#kernels.freeSampler(sampler)
    delete group.samplers[choice]
  }

  /** Forgets a generation and frees what it holds. */
  #drop(group: Group): void {
    this.#groups.delete(group.spec.id)
    this.#queue.removeGroup(group)
    group.samplers.forEach((_, choice) => this.#freeSampler(group, choice))
  }

  #failAll(code: "disconnected" | "shutting_down", message: string): void {
    const fault = new Fault({ code, message, hop: this.#options.name })
    for (const group of [...this.#groups.values()]) {
      this.#drop(group)
      if (group.cancelled) continue
      group.prefill?.failed(fault)
      group.sink.failed(fault)
    }
  }
}
