/** Time to the first token of the disaggregated topology against the single one, both running, asked in turn. */
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import { loadTopology } from "../../config/load-topology.ts"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { serve } from "../serve.ts"
import { median, rounded } from "./figures.ts"
import type { TimeBudget } from "./time-budget.ts"

export interface FirstToken {
  readonly singleMs: number
  readonly disaggregatedMs: number
  readonly ratio: number
}

interface Asked {
  readonly firstMs: number
  readonly secondMs: number
}

/** Pairs of a length are measured for this long, or such a share of the bench's time where that is less, and at least `leastPairs` of them. */
const budgetMs = { 512: 7_000, 2048: 11_000 } as const
const share = { warmUp: 0.25, 512: 0.35, 2048: 0.8 } as const
const leastPairs = 2
/** For what a request leaves to be done in the background. */
const restMs = 150
/** Short requests before: V8 interprets what it has run less often, and the disaggregated topology runs it in six processes. */
const warmUps = 150
const leastWarmUps = 20
/** Enough that no prompt finds an earlier one's blocks where they should be free. */
const blocks = 1_024

/** Asks for two tokens of a prompt that nobody asked for before. */
const ask = async (url: string, model: string, tokens: number): Promise<Asked> => {
  const prompt = Array.from({ length: tokens }, () => 100 + Math.floor(Math.random() * 10_000))
  const startedAtMs = performance.now()
  const response = await fetch(`${url}/v1/completions`, { method: "POST", body: JSON.stringify({ model, prompt, max_tokens: 2, temperature: 0, ignore_eos: true, stream: true, return_token_ids: true }) })
  if (!response.ok || response.body === null) throw new Error(`${response.status} ${await response.text()}`)
  const atMs: Array<number> = []
  let text = ""
  for await (const bytes of response.body as unknown as AsyncIterable<Uint8Array>) {
    text += Buffer.from(bytes).toString()
    while (atMs.length < (text.match(/"token_ids":\[\d/g) ?? []).length) atMs.push(performance.now())
  }
  if (atMs.length !== 2) throw new Error(`expected two tokens, found ${text}`)
  return { firstMs: atMs[0]! - startedAtMs, secondMs: atMs[1]! - atMs[0]! }
}

const rest = () => new Promise((resolve) => setTimeout(resolve, restMs))

interface Pair {
  readonly single: Asked
  readonly disaggregated: Asked
}

const pairs = async (single: () => Promise<Asked>, disaggregated: () => Promise<Asked>, longestMs: number): Promise<ReadonlyArray<Pair>> => {
  const startedAtMs = performance.now()
  const measured: Array<Pair> = []
  // One that would not end in time is not begun.
  while (measured.length < leastPairs || (performance.now() - startedAtMs) * (1 + 1 / measured.length) < longestMs) {
    const asked: Partial<Record<"single" | "disaggregated", Asked>> = {}
    // Who is first takes turns too.
    for (const which of measured.length % 2 === 0 ? (["single", "disaggregated"] as const) : (["disaggregated", "single"] as const)) {
      asked[which] = await (which === "single" ? single() : disaggregated())
      await rest()
    }
    measured.push({ single: asked.single!, disaggregated: asked.disaggregated! })
  }
  return measured
}

const summary = (measured: ReadonlyArray<Pair>): FirstToken => ({
  singleMs: rounded(median(measured.map(({ single }) => single.firstMs))),
  disaggregatedMs: rounded(median(measured.map(({ disaggregated }) => disaggregated.firstMs))),
  ratio: rounded(median(measured.map(({ single, disaggregated }) => disaggregated.firstMs / single.firstMs))),
})

/** Runs both topologies and asks both. */
export const firstTokens = (model: ResolvedModel, time: TimeBudget): Effect.Effect<{ readonly ttft: FirstToken; readonly ttft2048: FirstToken; readonly secondTokenMs: number }, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const start = (preset: string) => {
      const { topology } = loadTopology(fileURLToPath(new URL(`../../config/topologies/${preset}.yaml`, import.meta.url)), { host: "127.0.0.1", port: 0 })
      const workers = topology.workers.map((worker) => ({ ...worker, kv: { ...worker.kv, blocks } }))
      return Effect.map(serve({ topology: { ...topology, workers, kvStore: { ...topology.kvStore, disk: { path: "auto", size: 0 } } }, model }), ({ url }) => (tokens: number) => ask(url, model.name, tokens))
    }
    const single = yield* start("single")
    const disaggregated = yield* start("disaggregated")
    return yield* Effect.promise(async () => {
      const [startedAtMs, warmUpMs] = [performance.now(), time.share(share.warmUp)]
      for (let i = 0; i < warmUps && (i < leastWarmUps || performance.now() - startedAtMs < warmUpMs); i++) await Promise.all([single(16), disaggregated(16)])
      for (let i = 0; i < 2; i++) {
        await single(512)
        await disaggregated(512)
      }
      const short = await pairs(() => single(512), () => disaggregated(512), time.share(share[512], budgetMs[512]))
      const long = await pairs(() => single(2048), () => disaggregated(2048), time.share(share[2048], budgetMs[2048]))
      return { ttft: summary(short), ttft2048: summary(long), secondTokenMs: rounded(median(short.map(({ disaggregated: { secondMs } }) => secondMs))) }
    })
  })
