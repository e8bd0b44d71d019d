/**
 * What `bench kernels` tells a runtime to do, one thing at a time, each runtime in a process of its own. Penstock's engine and
 * its peers answer the same orders, so that nothing but the runtime differs.
 */

/** Tokens of the prompt whose first answer token ends `loadToFirstTokenMs`. */
export const firstPromptTokens = 16
/** Tokens that each sequence has before it decodes. */
export const contextTokens = 512
/** Sequences decoded at once: at most this. */
export const mostSequences = 16
/** Tokens of the longest prompt. */
export const longestPrompt = 2_048
/** Most tokens that are drawn in one run. */
export const mostSteps = 64
/** Most rows of a step: a chunk of a prompt, as Penstock is served (`limits.stepTokens`), and llama.cpp's own default. */
export const chunkTokens = 512

export type KernelsOrder =
  /** Loads the model and draws a token after this prompt; answers with the milliseconds of both. Once, and first. */
  | { readonly type: "open"; readonly open: OpenOptions; readonly prompt: ReadonlyArray<number> }
  /** Computes a prompt that was not seen before and draws one token; answers with its milliseconds. */
  | { readonly type: "prefill"; readonly prompt: ReadonlyArray<number> }
  /** Draws `steps` tokens after the first, all sequences in one batch, each after a context of its own as long as `context`; answers with the milliseconds of those steps. */
  | { readonly type: "decode"; readonly context: ReadonlyArray<number>; readonly sequences: number; readonly steps: number }
  /** Answers with the log probability of each token but the first, given those before it; of fewer, whole chunks, where `longestMs` are over before. */
  | { readonly type: "score"; readonly tokens: ReadonlyArray<number>; readonly longestMs?: number | undefined }

export interface OpenOptions {
  readonly path: string
  readonly threads: number
  readonly isa: "reference" | "avx2" | "avx512" | undefined
  /** Where the peer's package is; undefined where Node finds it by itself. */
  readonly from: string | undefined
  /** The longest context that `score` needs. */
  readonly scored: number
}

export type KernelsReport = number | ReadonlyArray<number>

/** What a runtime can do; the body of a process of the bench. */
export interface Runtime {
  prefill(prompt: ReadonlyArray<number>): Promise<number>
  decode(context: ReadonlyArray<number>, sequences: number, steps: number): Promise<number>
  score(tokens: ReadonlyArray<number>, longestMs?: number): Promise<ReadonlyArray<number>>
}

/** Answers orders with a runtime that `open` has loaded; `prepare` comes before the clock starts. */
export const answering = <Prepared>(prepare: (options: OpenOptions) => Promise<Prepared>, open: (options: OpenOptions, prepared: Prepared, prompt: ReadonlyArray<number>) => Promise<Runtime>) => {
  let runtime: Runtime | undefined
  return async (order: KernelsOrder): Promise<KernelsReport> => {
    if (order.type === "open") {
      const prepared = await prepare(order.open)
      const startedAtMs = performance.now()
      runtime = await open(order.open, prepared, order.prompt)
      return performance.now() - startedAtMs
    }
    if (runtime === undefined) throw new Error(`${order.type}: no model is open`)
    if (order.type === "prefill") return runtime.prefill(order.prompt)
    if (order.type === "decode") return runtime.decode(order.context, order.sequences, order.steps)
    return runtime.score(order.tokens, order.longestMs)
  }
}
