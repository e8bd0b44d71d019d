/**
 * `bench kernels --device cuda:N`: whole forwards on a GPU, and what share of its memory's bandwidth they read at, to be compared with
 * the roofline in kernels/README.md. Figures are medians of short runs.
 */
import { availableParallelism } from "node:os"
import { Effect, type Scope } from "effect"
import type { Env } from "../../config/env.ts"
import { deviceFacts, readGguf, type DeviceFacts } from "../../kernels/index.ts"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { Tokenizer } from "../../actors/request/tokenizer.ts"
import { median, rounded } from "./figures.ts"
import { table } from "../table.ts"
import { answering, longestPrompt, type KernelsOrder } from "./kernels-order.ts"
import { openPenstock } from "./penstock-runtime.ts"
import { BenchError } from "./peer.ts"
import { distinctTokens, numberOf, work } from "./work.ts"

const runsOfEach = 5
/** As in the roofline. */
const contextTokens = 1_024
const mostSequences = 64
const workloads = [
  { name: "prefill512TokPerS", says: "prefill, 512 tokens", prompt: 512 },
  { name: "prefill2048TokPerS", says: "prefill, 2,048 tokens", prompt: 2_048 },
  { name: "decode1TokPerS", says: "decode, batch 1", sequences: 1, steps: 32 },
  { name: "decode8TokPerS", says: "decode, batch 8", sequences: 8, steps: 32 },
  { name: "decode16TokPerS", says: "decode, batch 16", sequences: 16, steps: 32 },
  { name: "decode64TokPerS", says: "decode, batch 64", sequences: mostSequences, steps: 32 },
] as const

export interface DeviceFigures {
  readonly model: string
  readonly device: DeviceFacts
  readonly contextTokens: number
  readonly rows: ReadonlyArray<{ readonly name: string; readonly says: string; readonly tokPerS: number; /** Of the memory's bandwidth; undefined where the driver does not tell that. */ readonly bandwidthShare: number | undefined }>
}

/** Throws where there is no such device, saying what was found and is needed. */
export const deviceFigures = (model: ResolvedModel, options: { readonly device: string; readonly env: Env }): Effect.Effect<DeviceFigures, Error, Scope.Scope> =>
  Effect.tryPromise({
    try: async () => {
      const { device, env } = options
      const facts = deviceFacts(device, env.cudaAddon)
      const gguf = await readGguf(model.path)
      const context = numberOf(gguf.metadata, "context_length")
      if (context < longestPrompt) throw new BenchError(`bench kernels: expected a model with a context of ${longestPrompt} tokens at least, found ${context}`)
      const { vocabulary } = new Tokenizer(gguf.metadata)
      const { layerBytes, headBytes, kvBytes } = work(gguf)
      const answer = answering(() => Promise.resolve(), openPenstock({ device, cudaAddon: env.cudaAddon }, { mostSequences, contextTokens }))
      const ask = (order: KernelsOrder) => answer(order) as Promise<number>
      await ask({ type: "open", open: { path: model.path, threads: env.threads ?? availableParallelism(), isa: env.isa, from: undefined, scored: 0 }, prompt: distinctTokens(16, vocabulary, 1) })
      const rows: Array<DeviceFigures["rows"][number]> = []
      for (const workload of workloads) {
        const tookMs: Array<number> = []
        for (let run = -1; run < runsOfEach; run++) {
          const ms = await ask("prompt" in workload ? { type: "prefill", prompt: distinctTokens(workload.prompt, vocabulary, run + 3) } : { type: "decode", context: distinctTokens(contextTokens, vocabulary, 2), sequences: workload.sequences, steps: workload.steps })
          if (run >= 0) tookMs.push(ms) // the first warms up
        }
        const ms = median(tookMs)
        const tokens = "prompt" in workload ? workload.prompt : workload.sequences * workload.steps
        const bytes = "prompt" in workload ? (layerBytes * workload.prompt) / 512 + headBytes : workload.steps * (layerBytes + headBytes + workload.sequences * (contextTokens + workload.steps / 2) * kvBytes)
        rows.push({ name: workload.name, says: workload.says, tokPerS: rounded((tokens * 1000) / ms), bandwidthShare: facts.bytesPerS === 0 ? undefined : rounded((bytes * 1000) / ms / facts.bytesPerS) })
      }
      return { model: model.name, device: facts, contextTokens, rows }
    },
    catch: (error) => error as Error,
  })

export const deviceTable = ({ model, device, rows }: DeviceFigures): string =>
  [
    `${model}, ${device.name}, ${device.processors} processors, ${rounded(device.bytesPerS / 1e9)} GB/s; decode at a context of ${contextTokens} tokens a sequence`,
    table([["", "tokens a second", "share of bandwidth"], ...rows.map(({ says, tokPerS, bandwidthShare }) => [says, String(tokPerS), bandwidthShare === undefined ? "" : `${(bandwidthShare * 100).toFixed(1)} %`])]),
  ].join("\n")
