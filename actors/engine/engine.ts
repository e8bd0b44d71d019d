/**
 * The engine: sequences over a pool of KV blocks, run step by step on the kernels. Plain code without bus or Effect; it is
 * driven by calls between steps and speaks to its callers through sinks.
 *
 * A generation: `reserve` (waits for blocks) -> `sink.reserved` -> `prefill` -> first tokens to the prefill sink -> the
 * others to the decode sink -> `ended`. `cancel` takes effect at the next step's boundary. Choices that go on with tokens
 * delivered elsewhere each have their own blocks; those that have none yet begin later, through the decode sink.
 */
import { limits } from "../../config/limits.ts"
import type { Engine as Kernels } from "../../kernels/index.ts"
import type { MeasuredCosts } from "../cost/measured-costs.ts"
import { Fault } from "../runtime/fault.ts"
import type { TokenEvent } from "../messages/decode.ts"
import type { BlockHash } from "../messages/hashes.ts"
import type { ChunkRange } from "../messages/kv-chunk.ts"
import { BlockHolds, type HeldBlocks } from "./block-holds.ts"
import { BlockManager, type BlockEvents } from "./block-manager.ts"
import { checkGeneration } from "./check-generation.ts"
import type { Budget } from "./composer.ts"
import { Generations, type EngineCounters } from "./generations.ts"
import { returningKv, type MissingKv, type ReturningKv } from "./missing-kv.ts"
import { PoolBlocks } from "./pool-blocks.ts"
import type { DecodeSink, GenerationSpec, PrefillSink, Sequence } from "./sequence.ts"
import { SequenceQueue } from "./sequence-queue.ts"
import { StepLoop } from "./step-loop.ts"

export interface EngineOptions {
  /** Names the engine in faults, for example "worker w0". */
  readonly name: string
  /** Most sequences at once; `resize` changes it. */
  readonly maxBatch: number
  readonly events?: BlockEvents
  readonly budget?: Partial<Budget>
  /** Hears what steps take. */
  readonly costs?: Pick<MeasuredCosts, "prefilled">
  /** A sequence gives its blocks away, which have these contents, first block first. */
  readonly onPreempt?: (hashes: ReadonlyArray<BlockHash>) => void
  /** It has blocks again; what it lacks is computed once `settle` is called, which has to come, and soon. */
  readonly onReturn?: (missing: ReturningKv) => void
}

/** What a generation's sinks hear, where it is not they who stopped it. */
export type CancelReason = Pick<Fault, "code" | "message">

/** What the engine needs of kernels' Engine. */
export type StepKernels = Pick<Kernels, "info" | "createSampler" | "freeSampler" | "step" | "exportLayers" | "importLayers" | "canCopy" | "copyLayers" | "copyBlock">

export class Engine {
  readonly blocks: BlockManager
  readonly blockTokens: number
  readonly #kernels: StepKernels
  readonly #options: EngineOptions
  readonly #holds: BlockHolds
  readonly #queue: SequenceQueue
  readonly #generations: Generations
  readonly #loop: StepLoop
  /** Settles when a step has failed, or a block is lost: the engine is of no use any more, and its owner makes a new one. */
  readonly broken: Promise<Error>
  readonly counters: EngineCounters = { steps: 0, promptTokens: 0, cachedTokens: 0, outputTokens: 0, computeMs: 0, prefillMs: 0, prefillTokens: 0, restoredTokens: 0 }

  constructor(kernels: StepKernels, options: EngineOptions) {
    const { name, maxBatch } = options
    const { counters } = this
    const { blockTokens } = kernels.info
    const blocks = new BlockManager(kernels.info.blocks, options.events)
    const onPreempt = ({ hashes, computed }: Sequence) => options.onPreempt?.(hashes.slice(0, Math.floor(computed / blockTokens)))
    const queue = new SequenceQueue({ blocks, blockTokens, maxBatch, copyBlock: (from, to) => kernels.copyBlock(from, to), onPreempt })
    const generations = new Generations({ name, kernels, blocks, queue, counters })
    const budget: Budget = { tokens: limits.stepTokens, mixedTokens: limits.mixedStepTokens, outputs: limits.stepOutputs, ...options.budget }
    this.#kernels = kernels
    this.#options = options
    this.blocks = blocks
    this.blockTokens = blockTokens
    this.#queue = queue
    this.#generations = generations
    const onReturn = (sequence: Sequence) => {
      const missing = options.onReturn === undefined ? undefined : returningKv(sequence, { name, kernels, blocks, blockTokens, notify: () => this.#loop.notify() })
      if (missing !== undefined) options.onReturn?.(missing)
    }
    const cancel = (id: string, why: CancelReason) => this.cancel(id, why)
    const check = () => this.checkInvariants()
    this.#loop = new StepLoop({ name, cancel, check, kernels, blocks, blockTokens, budget, queue, generations, counters, costs: options.costs, onReturn })
    this.#holds = new BlockHolds(blocks, kernels, () => this.#loop.notify()) // a reservation may wait for what is released
    this.broken = this.#loop.broken
  }

  get load(): { readonly sequences: number; readonly waiting: number; readonly preemptions: number } {
    return { sequences: this.#queue.running.length, waiting: this.#queue.waiting.length, preemptions: this.#queue.preemptions }
  }

  /** Whether somebody waits for a prompt: for its turn, its computation, or its KV on the way in or out. */
  get hasPrompts(): boolean {
    return this.#generations.all.some((group) => !group.prefillDone || group.held)
  }

  get maxBatch(): number {
    return this.#queue.maxBatch
  }

  /** Blocks are on their way from the pool to others. */
  get isSending(): boolean {
    return [...this.#holds.tables].length > 0
  }

  /** What is decoded here or is to be, in order of arrival: its choices that are not finished, and the blocks that these take now. */
  get decoding(): Array<{ readonly id: string; readonly choices: number; readonly blocks: number }> {
    return this.#generations.all.flatMap((group) => {
      if (group.cancelled || group.spec.prefillOnly === true) return []
      const unfinished = group.sequences.filter(({ finished }) => !finished)
      return [{ id: group.spec.id, choices: unfinished.length + group.unforked, blocks: unfinished.reduce((sum, { length }) => sum + Math.ceil(length / this.blockTokens), 0) }]
    })
  }

  get requestIds(): Array<string> {
    return this.#generations.all.map(({ spec }) => spec.requestId)
  }

  /**
   * Takes other bounds; of the pool, up to what was allocated. What runs keeps its slot; where there are too few blocks for it,
   * cached ones are evicted and the youngest recomputed later. What can never fit again is failed as `moved`.
   */
  resize({ maxBatch, blocks }: { readonly maxBatch?: number | undefined; readonly blocks?: number | undefined }): void {
    if (maxBatch !== undefined) this.#queue.maxBatch = maxBatch
    if (blocks !== undefined) this.blocks.limit = blocks
    this.#loop.notify()
  }

  /**
   * Takes blocks for a generation, now or when some are free; `sink.reserved` tells. Throws a Fault when it can never fit:
   * its tokens are more than the context or the pool holds, or its choices more than a batch does.
   */
  reserve(spec: GenerationSpec, sink: DecodeSink): void {
    const { name } = this.#options
    const { contextLength, vocabulary } = this.#kernels.info
    if (this.#loop.closed) throw new Fault({ code: "shutting_down", message: `${name} is stopping`, hop: name })
    if (this.#generations.get(spec.id) !== undefined) throw new Fault({ code: "invalid_request", message: `transfer ${spec.id} exists already`, hop: name })
    checkGeneration(spec, { name, maxBatch: this.maxBatch, contextLength, vocabulary, poolTokens: this.blocks.limit * this.blockTokens })
    try {
      this.#generations.add(spec, sink)
    } catch (error) {
      throw new Fault({ code: "invalid_request", message: error instanceof Error ? error.message : String(error), hop: name })
    }
    this.#loop.notify()
  }

  /** Begins to compute a reserved generation's prompt. Throws a Fault when there is no such reservation. */
  prefill(id: string, sink: PrefillSink): void {
    const group = this.#generations.get(id)
    if (group === undefined || group.cancelled) throw new Fault({ code: "unavailable", message: `${this.#options.name} has no reservation ${id}`, hop: this.#options.name })
    if (group.prefill !== undefined) throw new Fault({ code: "invalid_request", message: `the prompt of ${id} is being computed already`, hop: this.#options.name })
    group.prefill = sink
    group.reportedBlocks = this.computedBlocks(id)
    this.#loop.notify()
  }

  /** Tokens of prompts that are being computed, or wait for it, before that of a generation that has not begun. */
  get queuedTokens(): number {
    return this.#generations.all.reduce((sum, { prefill, prefillDone, sequences }) => sum + (prefill === undefined || prefillDone ? 0 : sequences.reduce((pending, sequence) => pending + sequence.pending, 0)), 0)
  }

  /** What a reserved generation lacks; where its choices have parted, what the n-th of them does, beyond what is known here by now. */
  missingKv(id: string, nth = 0): MissingKv {
    const { from, hashes } = this.missingBlocks(id, nth)
    const group = this.#generations.get(id)
    return {
      trace: group?.spec.trace,
      tokens: group?.sequences[nth]?.length ?? 0,
      from,
      hashes,
      blocks: this.reserved(id, nth),
      accept: (blocks) => this.acceptPrefix(id, from, blocks, nth),
    }
  }

  /** Choices of a generation that have blocks of their own. */
  partedChoices(id: string): number {
    return this.#generations.get(id)?.sequences.length ?? 0
  }

  /** The blocks that a reserved generation lacks: their place in its table, and their hashes. */
  missingBlocks(id: string, nth = 0): { readonly from: number; readonly hashes: ReadonlyArray<BlockHash> } {
    const sequence = this.#generations.get(id)?.sequences[nth]
    if (sequence === undefined || !sequence.running || sequence.group.spec.promptLogprobs) return { from: 0, hashes: [] }
    if (nth > 0) this.#queue.takeKnown(sequence)
    const from = Math.floor(sequence.computed / this.blockTokens)
    const full = Math.floor((sequence.length - 1) / this.blockTokens)
    sequence.hashUpTo(full * this.blockTokens, this.blockTokens)
    return { from, hashes: sequence.hashes.slice(from, full) }
  }

  /** Takes blocks whose KV has been imported as the next of a reservation's prefix. False when it is not wanted any more. */
  acceptPrefix(id: string, from: number, blocks: number, nth = 0): boolean {
    const group = this.#generations.get(id)
    const sequence = group?.sequences[nth]
    if (group?.waitsForKv !== true || sequence?.running !== true) return false
    if (sequence.computed !== from * this.blockTokens || (from + blocks) * this.blockTokens >= sequence.length) return false
    sequence.computed += blocks * this.blockTokens
    if (nth === 0) group.cachedTokens += blocks * this.blockTokens
    sequence.seal(this.blocks, from, from + blocks)
    return true
  }

  /** Holds those of the blocks with these contents that are here, so that they can be written out until their release. */
  hold(hashes: ReadonlyArray<BlockHash>): HeldBlocks {
    return this.#holds.hold(hashes)
  }

  /** Leading blocks of a generation whose KV is in the pool. */
  computedBlocks(id: string): number {
    return Math.floor((this.#generations.get(id)?.sequences[0]?.computed ?? 0) / this.blockTokens)
  }

  /** Blocks that a generation's tokens fill, the last one perhaps in part. */
  neededBlocks(id: string): number {
    return Math.ceil((this.#generations.get(id)?.sequences[0]?.length ?? 0) / this.blockTokens)
  }

  /** Blocks of a generation, to be read as they are computed, as long as it is there. */
  computed(id: string): PoolBlocks {
    return new PoolBlocks(this.#kernels, (range) => this.#blocksOf(id, range))
  }

  /** Blocks of a reservation, or of its n-th choice, to take KV until it begins or is gone. */
  reserved(id: string, nth = 0): PoolBlocks {
    return new PoolBlocks(this.#kernels, (range) => {
      if (this.#generations.get(id)?.waitsForKv !== true) throw this.#gone(id)
      return this.#blocksOf(id, range, nth)
    })
  }

  /**
   * Takes over a reservation whose KV has come whole, with the first tokens that were drawn where it was computed. Throws a Fault
   * when it is gone, or these are not the first token of each choice.
   */
  adopt(id: string, first: ReadonlyArray<TokenEvent>): void {
    const group = this.#generations.get(id)
    if (group === undefined || !group.waitsForKv || group.sequences[0]?.running !== true) throw this.#gone(id)
    this.#generations.adopt(group, first)
    this.#loop.notify()
  }

  #gone(id: string): Fault {
    return new Fault({ code: "unavailable", message: `${this.#options.name} has no reservation ${id} that waits for KV`, hop: this.#options.name })
  }

  #blocksOf(id: string, { firstBlock, blocks }: ChunkRange, nth = 0): Int32Array {
    const table = this.#generations.get(id)?.sequences[nth]?.table ?? []
    if (firstBlock + blocks > table.length) throw this.#gone(id)
    return Int32Array.from(table.slice(firstBlock, firstBlock + blocks))
  }

  /** Ends one choice, whose text is complete: now, or at the end of the step in flight. */
  finish(id: string, choice: number): void {
    const group = this.#generations.get(id)
    if (group?.prefill === undefined) return void group?.finishedEarly.add(choice) // by its first token, before the KV has come
    const sequence = group.sequences.find((sequence) => sequence.choice === choice)
    if (sequence === undefined) return
    sequence.stopped = true
    this.#loop.notify()
  }

  /** Tells that a paused generation's reader takes tokens again. */
  resume(): void {
    this.#loop.notify()
  }

  /**
   * Stops a generation and frees its blocks: now, or at the end of the step in flight. Its sinks hear why at once, so that
   * the one that did not ask for it does not wait for ever, and nothing after that. Its full blocks stay cached.
   */
  cancel(id: string, why: CancelReason = { code: "cancelled", message: "the generation was cancelled" }): void {
    const group = this.#generations.get(id)
    if (group === undefined || group.cancelled) return
    group.cancelled = true
    if (!this.#loop.stepping) this.#generations.drop(group)
    const fault = new Fault({ code: why.code, message: `${this.#options.name}: ${why.message}`, hop: this.#options.name })
    group.prefill?.failed(fault)
    group.sink.failed(fault)
    this.#loop.notify()
  }

  /** Fails every generation, waits for the step in flight, and ends. The kernels are the caller's to close. */
  async close(): Promise<void> {
    await this.#loop.close()
    this.#generations.failAll("shutting_down", `${this.#options.name} is stopping`)
  }

  /** Throws when a block is lost or counted wrong. */
  checkInvariants(): void {
    this.blocks.check([...this.#generations.all.flatMap(({ sequences }) => sequences.map(({ table }) => table)), ...this.#holds.tables])
  }
}
