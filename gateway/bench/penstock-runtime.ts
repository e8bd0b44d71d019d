/** Penstock's own engine under `bench kernels`: the kernels alone, without actors, scheduling or tokenizer. */
import { Engine, type EngineOptions, type SamplerOptions } from "../../kernels/index.ts"
import { answering, chunkTokens, contextTokens, longestPrompt, mostSequences, mostSteps, type KernelsOrder, type KernelsReport, type OpenOptions, type Runtime } from "./kernels-order.ts"

const blockTokens = 16
const blocksFor = (tokens: number): number => Math.ceil(tokens / blockTokens)

/** Most sequences that decode, and the context of each. */
export interface DecodeShape {
  readonly mostSequences: number
  readonly contextTokens: number
}
const usualShape: DecodeShape = { mostSequences, contextTokens }
const sequenceBlocksOf = (shape: DecodeShape): number => blocksFor(shape.contextTokens + 1 + mostSteps)

const greedy: SamplerOptions = {
  temperature: 0, topK: 0, topP: 1, minP: 0, repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0,
  logitBias: [], suppressedTokens: [], minTokens: 0, seed: 0, choice: 0,
}

class PenstockRuntime implements Runtime {
  readonly #engine: Engine
  readonly #shape: DecodeShape
  /** Blocks of the decoding sequences; what is prefilled or scored lies behind them. */
  readonly #long: Int32Array
  #context: ReadonlyArray<number> | undefined

  constructor(engine: Engine, shape: DecodeShape) {
    this.#engine = engine
    this.#shape = shape
    const first = shape.mostSequences * sequenceBlocksOf(shape)
    this.#long = Int32Array.from({ length: engine.info.blocks - first }, (_, i) => first + i)
  }

  /** Computes a prompt in chunks; the last step draws a token. */
  async #prompt(tokens: ReadonlyArray<number>, table: Int32Array): Promise<void> {
    const sampler = this.#engine.createSampler(greedy, Int32Array.from(tokens), new Int32Array(0))
    for (let start = 0; start < tokens.length; start += chunkTokens) {
      const chunk = Int32Array.from(tokens.slice(start, start + chunkTokens))
      const last = start + chunk.length === tokens.length
      await this.#engine.step({
        tokens: chunk,
        segments: Int32Array.of(chunk.length, start, 0, table.length),
        blockTables: table,
        outputs: last ? Int32Array.of(chunk.length - 1, sampler, -1, -1) : new Int32Array(0),
      })
    }
    this.#engine.freeSampler(sampler)
  }

  async prefill(prompt: ReadonlyArray<number>): Promise<number> {
    const startedAtMs = performance.now()
    await this.#prompt(prompt, this.#long)
    return performance.now() - startedAtMs
  }

  async decode(context: ReadonlyArray<number>, sequences: number, steps: number): Promise<number> {
    const sequenceBlocks = sequenceBlocksOf(this.#shape)
    if (this.#context?.join() !== context.join()) {
      await this.#prompt(context, Int32Array.from({ length: sequenceBlocks }, (_, i) => i))
      for (let to = sequenceBlocks; to < this.#shape.mostSequences * sequenceBlocks; to++) this.#engine.copyBlock(to % sequenceBlocks, to)
      this.#context = context
    }
    const all = [...Array(sequences).keys()]
    const samplers = all.map(() => this.#engine.createSampler(greedy, Int32Array.from(context), new Int32Array(0)))
    const blockTables = Int32Array.from({ length: sequences * sequenceBlocks }, (_, i) => i)
    const outputs = Int32Array.from(samplers.flatMap((sampler, row) => [row, sampler, -1, -1]))
    // Another token for each sequence, so that none of them says the same.
    let tokens: Int32Array = Int32Array.from(all, (sequence) => context[sequence]!)
    const startedAtMs = performance.now()
    for (let step = 0; step < steps; step++) {
      const segments = Int32Array.from(all.flatMap((sequence) => [1, context.length + step, sequence * sequenceBlocks, sequenceBlocks]))
      tokens = (await this.#engine.step({ tokens, segments, blockTables, outputs })).tokens
    }
    const tookMs = performance.now() - startedAtMs
    for (const sampler of samplers) this.#engine.freeSampler(sampler)
    return tookMs
  }

  async score(tokens: ReadonlyArray<number>, longestMs: number = Number.POSITIVE_INFINITY): Promise<ReadonlyArray<number>> {
    const logprobs: Array<number> = []
    const startedAtMs = performance.now()
    for (let start = 0; start + 1 < tokens.length; start += chunkTokens) {
      // A chunk that would not end in time is not begun; one takes as long as those before it, and attends to more.
      const chunks = start / chunkTokens
      if (chunks > 0 && (performance.now() - startedAtMs) * (1 + 1 / chunks) > longestMs) break
      const targets = tokens.slice(start + 1, start + 1 + chunkTokens)
      const result = await this.#engine.step({
        tokens: Int32Array.from(tokens.slice(start, start + targets.length)),
        segments: Int32Array.of(targets.length, start, 0, this.#long.length),
        blockTables: this.#long,
        outputs: Int32Array.from(targets.flatMap((target, row) => [row, -1, target, 0])),
      })
      logprobs.push(...result.logprobs)
    }
    return logprobs
  }
}

/** On the CPU, or on the device that is said. */
export const openPenstock = (on: Pick<EngineOptions, "device" | "cudaAddon"> = {}, shape = usualShape) => async ({ path, threads, isa, scored }: OpenOptions, _: void, prompt: ReadonlyArray<number>): Promise<Runtime> => {
  const blocks = shape.mostSequences * sequenceBlocksOf(shape) + blocksFor(Math.max(longestPrompt, scored))
  const runtime = new PenstockRuntime(await Engine.load({ path, blocks, blockTokens, threads, ...(isa === undefined ? {} : { isa }), maxRows: chunkTokens, maxOutputs: chunkTokens, ...on }), shape)
  await runtime.prefill(prompt)
  return runtime
}

export const servingPenstock = (): ((order: KernelsOrder) => Promise<KernelsReport>) => answering(() => Promise.resolve(), openPenstock())
