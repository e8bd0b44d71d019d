/**
 * llama.cpp under `bench kernels`, through node-llama-cpp, which is no dependency of the project. Its public classes queue and
 * batch in JavaScript; the steps here go to its addon's context directly, which is the least that llama.cpp can cost from Node.
 */
import { join } from "node:path"
import { pathToFileURL } from "node:url"
import { answering, chunkTokens, contextTokens, longestPrompt, mostSequences, mostSteps, type KernelsOrder, type KernelsReport, type OpenOptions, type Runtime } from "./kernels-order.ts"

export const llamaCppVersion = "3.22.1"

type Sampler = { applyConfig(config: { readonly temperature: number }): void; dispose(): void }

/** The part of node-llama-cpp's native context that is used: llama_decode, and a sampler over rows of its logits. */
interface NativeContext {
  initBatch(size: number): void
  addToBatch(sequence: number, position: number, tokens: Uint32Array, rowsWithLogits: Uint32Array): Uint32Array
  decodeBatch(): Promise<void>
  sampleToken(row: number, sampler: Sampler): Promise<number>
  /** With the logits of the listed tokens and of the drawn one as [token, logit, …], and the sum over all of exp(logit - greatest). */
  sampleToken(row: number, sampler: Sampler, probabilities: false, confidence: false, logits: readonly [ReadonlyArray<number>, false, false, true, 0], total: true):
    Promise<readonly [token: number, probabilities: undefined, confidence: number, logits: ReadonlyArray<number>, total: number]>
  disposeSequence(sequence: number): void
  removeTokenCellsFromSequence(sequence: number, from: number, to: number): boolean
  copySequenceStateFromOtherSequence(to: number, from: number): Promise<number>
}

interface Context {
  readonly _ctx: NativeContext
  dispose(): Promise<void>
}

interface Model {
  readonly _model: object
  createContext(options: { readonly sequences: number; readonly contextSize: number; readonly batchSize: number; readonly threads: { readonly min: number; readonly ideal: number }; readonly flashAttention: boolean }): Promise<Context>
}

interface Llama {
  readonly _bindings: { readonly AddonSampler: new (model: object) => Sampler }
  loadModel(options: { readonly modelPath: string; readonly gpuLayers: 0 }): Promise<Model>
}

type Library = { getLlama(options: { readonly build: "never"; readonly gpu: false; readonly logLevel: "error"; readonly maxThreads: number }): Promise<Llama> }

/** Loads the library, from the folder of its package where one is given. The error says how it is installed. */
const load = async ({ from, threads }: OpenOptions): Promise<Llama> => {
  const specifier = from === undefined ? "node-llama-cpp" : pathToFileURL(join(from, "dist", "index.js")).href
  let library: Library
  try {
    library = (await import(specifier)) as Library
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code !== "ERR_MODULE_NOT_FOUND" && code !== "MODULE_NOT_FOUND") throw error
    throw new Error(
      `node-llama-cpp was not found${from === undefined ? "" : ` in ${from}`}. It is no dependency of Penstock; install it with\n` +
        `  npm install --no-save --ignore-scripts node-llama-cpp@${llamaCppVersion}\nor set PENSTOCK_NODE_LLAMA_CPP to the folder of the package elsewhere.`,
    )
  }
  return library.getLlama({ build: "never", gpu: false, logLevel: "error", maxThreads: threads })
}

class LlamaCppRuntime implements Runtime {
  readonly #llama: Llama
  readonly #model: Model
  readonly #options: OpenOptions
  #context: { readonly of: "prompt" | "decode"; readonly context: Context; readonly prefix: ReadonlyArray<number> } | undefined

  constructor(llama: Llama, model: Model, options: OpenOptions) {
    this.#llama = llama
    this.#model = model
    this.#options = options
  }

  /** One context at a time: prompts have one long sequence, decoding has many short ones. */
  async #use(of: "prompt" | "decode", prefix: ReadonlyArray<number> = []): Promise<NativeContext> {
    if (this.#context?.of === of && this.#context.prefix.join() === prefix.join()) return this.#context.context._ctx
    await this.#context?.context.dispose()
    const { threads, scored } = this.#options
    const sequences = of === "prompt" ? 1 : mostSequences
    const contextSize = of === "prompt" ? Math.max(longestPrompt, scored) + 1 : contextTokens + mostSteps + 1
    // Flash attention is the faster way here, and its default where it is left to choose.
    const context = await this.#model.createContext({ sequences, contextSize, batchSize: chunkTokens, threads: { min: threads, ideal: threads }, flashAttention: true })
    this.#context = { of, context, prefix }
    if (of === "decode") {
      await this.#feed(context._ctx, prefix)
      for (let to = 1; to < mostSequences; to++) await context._ctx.copySequenceStateFromOtherSequence(to, 0)
    }
    return context._ctx
  }

  #sampler(): Sampler {
    const sampler = new this.#llama._bindings.AddonSampler(this.#model._model)
    sampler.applyConfig({ temperature: 0 })
    return sampler
  }

  /** Computes a prompt in chunks; resolves to the row that has the last token's logits. */
  async #feed(context: NativeContext, prompt: ReadonlyArray<number>): Promise<number> {
    let row = -1
    for (let start = 0; start < prompt.length; start += chunkTokens) {
      const chunk = Uint32Array.from(prompt.slice(start, start + chunkTokens))
      const last = start + chunk.length === prompt.length
      context.initBatch(chunk.length)
      const rows = context.addToBatch(0, start, chunk, last ? Uint32Array.of(chunk.length - 1) : new Uint32Array(0))
      await context.decodeBatch()
      if (last) row = rows[0]!
    }
    return row
  }

  async prefill(prompt: ReadonlyArray<number>): Promise<number> {
    const context = await this.#use("prompt")
    const sampler = this.#sampler()
    context.disposeSequence(0)
    const startedAtMs = performance.now()
    await context.sampleToken(await this.#feed(context, prompt), sampler)
    const tookMs = performance.now() - startedAtMs
    sampler.dispose()
    return tookMs
  }

  async decode(prefix: ReadonlyArray<number>, sequences: number, steps: number): Promise<number> {
    const context = await this.#use("decode", prefix)
    const all = [...Array(sequences).keys()]
    const samplers = all.map(() => this.#sampler())
    let tokens = all.map((sequence) => prefix[sequence]!)
    const startedAtMs = performance.now()
    for (let step = 0; step < steps; step++) {
      context.initBatch(sequences)
      const rows = all.map((sequence) => context.addToBatch(sequence, contextTokens + step, Uint32Array.of(tokens[sequence]!), Uint32Array.of(0))[0]!)
      await context.decodeBatch()
      tokens = await Promise.all(rows.map((row, sequence) => context.sampleToken(row, samplers[sequence]!)))
    }
    const tookMs = performance.now() - startedAtMs
    for (const sequence of all) context.removeTokenCellsFromSequence(sequence, contextTokens, contextTokens + steps)
    for (const sampler of samplers) sampler.dispose()
    return tookMs
  }

  async score(tokens: ReadonlyArray<number>): Promise<ReadonlyArray<number>> {
    return (await this.scored(tokens)).map(({ logprob }) => logprob)
  }

  /** For each token but the first: its log probability, and the token that was the most likely there. */
  async scored(tokens: ReadonlyArray<number>): Promise<ReadonlyArray<{ readonly logprob: number; readonly argmax: number }>> {
    const context = await this.#use("prompt")
    const sampler = this.#sampler()
    context.disposeSequence(0)
    const found: Array<{ readonly logprob: number; readonly argmax: number }> = []
    for (let start = 0; start + 1 < tokens.length; start += chunkTokens) {
      const targets = tokens.slice(start + 1, start + 1 + chunkTokens)
      context.initBatch(targets.length)
      const rows = context.addToBatch(0, start, Uint32Array.from(tokens.slice(start, start + targets.length)), Uint32Array.from(targets.keys()))
      await context.decodeBatch()
      for (const [i, target] of targets.entries()) {
        const [argmax, , , logits, total] = await context.sampleToken(rows[i]!, sampler, false, false, [[target], false, false, true, 0], true)
        const logitOf = (token: number): number => logits[logits.findIndex((value, at) => at % 2 === 0 && value === token) + 1] ?? Number.NaN
        found.push({ logprob: logitOf(target) - logitOf(argmax) - Math.log(total), argmax })
      }
    }
    sampler.dispose()
    return found
  }
}

/** For programs that use it in their own process; resolves once a token was drawn after `prompt`. */
export const openLlamaCpp = async (options: OpenOptions, llama: Llama, prompt: ReadonlyArray<number>): Promise<LlamaCppRuntime> => {
  const runtime = new LlamaCppRuntime(llama, await llama.loadModel({ modelPath: options.path, gpuLayers: 0 }), options)
  await runtime.prefill(prompt)
  return runtime
}

export const loadLlamaCpp = load

export const servingLlamaCpp = (): ((order: KernelsOrder) => Promise<KernelsReport>) => answering(load, openLlamaCpp)
