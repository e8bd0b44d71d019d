/**
 * The step loop: at each boundary it admits and composes what may run, has the kernels run it, and hands out what came of it.
 * It sleeps while there is nothing to run, counts its blocks when it is idle, and ends with the first step that fails, or a
 * block that is lost.
 */
import { limits } from "../../config/limits.ts"
import type { Engine as Kernels, StepResult } from "../../kernels/index.ts"
import type { BlockManager } from "./block-manager.ts"
import { composeBatch, readOutput, type Output } from "./batch.ts"
import { compose, type Budget, type Chunk } from "./composer.ts"
import type { MeasuredCosts } from "../cost/measured-costs.ts"
import type { EngineCounters, Generations } from "./generations.ts"
import type { PrefillSink, Sequence } from "./sequence.ts"
import type { SequenceQueue } from "./sequence-queue.ts"

export interface StepLoopOptions {
  /** Names the engine in faults. */
  readonly name: string
  readonly kernels: Pick<Kernels, "step">
  readonly blocks: BlockManager
  readonly blockTokens: number
  readonly budget: Budget
  readonly queue: SequenceQueue
  readonly generations: Generations
  readonly cancel: (id: string, why: { readonly code: "moved"; readonly message: string }) => void
  readonly counters: EngineCounters
  /** Hears what prompts take. */
  readonly costs?: Pick<MeasuredCosts, "prefilled"> | undefined
  /** A sequence that was preempted has blocks again, and has not begun. */
  readonly onReturn?: ((sequence: Sequence) => void) | undefined
  /** Throws where a block is lost or counted wrong. */
  readonly check: () => void
}

export class StepLoop {
  readonly #options: StepLoopOptions
  #stepping = false
  #closed = false
  #wake: (() => void) | undefined
  #unchecked = false // since the last step
  #lost: { readonly error: unknown } | undefined
  readonly #ended: Promise<void>
  /** Settles when a step has failed. */
  readonly broken: Promise<Error>
  #break: (error: Error) => void = () => {}

  constructor(options: StepLoopOptions) {
    this.#options = options
    this.broken = new Promise((resolve) => (this.#break = resolve))
    this.#ended = this.#run()
  }

  /** The kernels are running a step. */
  get stepping(): boolean {
    return this.#stepping
  }

  get closed(): boolean {
    return this.#closed
  }

  /** There may be something to run. */
  notify(): void {
    this.#wake?.()
    this.#wake = undefined
  }

  /** Ends after the step in flight. */
  async close(): Promise<void> {
    this.#closed = true
    this.notify()
    await this.#ended
  }

  async #run(): Promise<void> {
    const { queue, generations, budget, name } = this.#options
    await Promise.resolve() // the constructor's caller finishes first
    while (!this.#closed) {
      try {
        generations.reap()
        this.#fit()
        this.#announce(queue.admit())
        const { preemptions } = queue
        const chunks = queue.ensureBlocks(compose(queue.ready(), budget))
        if (chunks.length > 0) await this.#step(chunks)
        // Where all have given way, the oldest of them fits again at once.
        else if (queue.preemptions === preemptions) await this.#sleep()
      } catch (error) {
        this.#stepping = false
        this.#closed = true
        generations.unusable = true
        generations.failAll("disconnected", `${name}: a step failed`)
        this.#break(error instanceof Error ? error : new Error(String(error)))
      }
    }
  }

  /** What the bounds do not allow any more: the youngest give their blocks back, and what will never fit is for another worker. */
  #fit(): void {
    const { queue, cancel } = this.#options
    queue.giveBack()
    for (const { group } of queue.misfits()) cancel(group.spec.id, { code: "moved", message: "it does not fit here any more" })
  }

  /** Until there may be something to run. */
  async #sleep(): Promise<void> {
    const isIdle = this.#unchecked && this.#options.generations.all.length === 0
    const check = isIdle ? setTimeout(() => this.#check(), limits.idleCheckMs).unref() : undefined
    await new Promise<void>((resolve) => (this.#wake = resolve))
    clearTimeout(check)
    if (this.#lost !== undefined) throw this.#lost.error
  }

  #check(): void {
    try {
      this.#unchecked = false
      this.#options.check()
    } catch (error) {
      this.#lost = { error }
      this.notify()
    }
  }

  #announce(admitted: ReadonlyArray<Sequence>): void {
    for (const sequence of admitted) {
      const { group } = sequence
      if (sequence.preempted && group.prefill !== undefined) this.#options.onReturn?.(sequence)
      // One choice with blocks is enough to begin: to wait for all with some would be a deadlock in a small pool.
      if (group.reserved) continue
      group.reserved = true
      group.cachedTokens = group.sequences[0]!.computed
      group.sink.reserved(group.cachedTokens)
    }
  }

  async #step(chunks: ReadonlyArray<Chunk>): Promise<void> {
    const { kernels, generations } = this.#options
    const { batch, outputs } = composeBatch(chunks, (sequence, choice) => generations.samplerOf(sequence, choice))
    const layered = this.#completedBy(chunks).filter(({ sink }) => sink.layer !== undefined)
    this.#stepping = true
    this.#unchecked = true
    const result = await kernels.step(batch, layered.length === 0 ? undefined : (layer) => layered.forEach(({ sink, from, blocks }) => sink.layer?.(layer, from, blocks)))
    this.#stepping = false
    this.#apply(chunks, outputs, result)
  }

  /** The blocks that this step completes, and the prefill sinks that hear of them. */
  #completedBy(chunks: ReadonlyArray<Chunk>): Array<{ readonly sink: PrefillSink; readonly from: number; readonly blocks: number }> {
    const { blockTokens } = this.#options
    return chunks.flatMap(({ sequence, tokens }) => {
      const { group } = sequence
      if (group.prefill === undefined || group.prefillDone) return []
      const end = sequence.computed + tokens
      const complete = end === sequence.length ? Math.ceil(end / blockTokens) : Math.floor(end / blockTokens)
      const from = group.reportedBlocks
      group.reportedBlocks = complete
      return complete > from ? [{ sink: group.prefill, from, blocks: complete - from }] : []
    })
  }

  #apply(chunks: ReadonlyArray<Chunk>, outputs: ReadonlyArray<Output>, result: StepResult): void {
    const { blocks, blockTokens, generations } = this.#options
    this.#measure(chunks, result.computeMs)
    for (const { sequence, tokens } of chunks) {
      const sealed = Math.floor(sequence.computed / blockTokens)
      sequence.computed += tokens
      sequence.hashUpTo(sequence.computed, blockTokens)
      sequence.seal(blocks, sealed, Math.floor(sequence.computed / blockTokens))
      if (!sequence.group.prefillDone) sequence.group.computedTokens += tokens
    }
    this.#reportScores(outputs, result)
    // All choices fork before any of them draws, since one that ends at once gives its blocks back.
    const drawing = outputs.map(({ sequence, draws }) =>
      draws === undefined || draws === sequence.choice || sequence.group.spec.prefillOnly === true ? sequence : generations.fork(sequence, draws),
    )
    outputs.forEach(({ draws }, index) => {
      const sequence = drawing[index]!
      if (draws !== undefined && sequence.group.spec.prefillOnly === true) return generations.drawFirst(sequence, draws, readOutput(result, index, sequence.group.spec.logprobs))
      if (draws !== undefined && !sequence.group.cancelled && !sequence.stopped) generations.draw(sequence, readOutput(result, index, sequence.group.spec.logprobs))
    })
    for (const { sequence } of chunks) generations.finishPrefill(sequence.group)
  }

  #measure(chunks: ReadonlyArray<Chunk>, computeMs: number): void {
    const { counters, costs } = this.#options
    counters.steps++
    counters.computeMs += computeMs
    const rowsOf = (some: ReadonlyArray<Chunk>) => some.reduce((sum, { tokens }) => sum + tokens, 0)
    const rows = rowsOf(chunks)
    const prefillRows = rowsOf(chunks.filter(({ sequence }) => !sequence.group.prefillDone))
    counters.prefillTokens += prefillRows
    counters.prefillMs += (computeMs * prefillRows) / rows
    // A few rows of a prompt among those that decode say little about prompts.
    const several = chunks.filter(({ tokens }) => tokens > 1)
    const work = several.map(({ sequence, tokens }) => ({ newTokens: tokens, prefixTokens: sequence.computed }))
    if (2 * rowsOf(several) >= rows) costs?.prefilled({ work, ms: (computeMs * rowsOf(several)) / rows })
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
}
