/** `bench kv`: what it costs to compute a prompt in one process and to decode it in another. */
import { Effect } from "effect"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { table } from "../table.ts"
import { throughput, type Throughput } from "./kv-throughput.ts"
import { firstTokens, type FirstToken } from "./first-token.ts"
import { TimeBudget } from "./time-budget.ts"

export interface KvFigures {
  readonly kv: Throughput
  readonly ttft: FirstToken
  readonly ttft2048: FirstToken
  /** From the first to the second token of a prompt of 512, disaggregated. */
  readonly secondTokenMs: number
}

export const kvFigures = (model: ResolvedModel): Effect.Effect<KvFigures, Error> =>
  Effect.gen(function* () {
    const time = new TimeBudget()
    const kv = yield* Effect.scoped(throughput(model.path, time))
    const { ttft, ttft2048, secondTokenMs } = yield* Effect.scoped(firstTokens(model, time))
    return { kv, ttft, ttft2048, secondTokenMs }
  })

export const kvTable = ({ kv, ttft, ttft2048, secondTokenMs }: KvFigures): string => {
  const tokens = (name: string, { singleMs, disaggregatedMs, ratio }: FirstToken) => [name, `${disaggregatedMs} ms`, `${singleMs} ms (single)`, String(ratio)]
  return table([
    ["", "disaggregated", "compared with", "ratio"],
    ["KV, pool to pool", `${kv.mbPerS} MB/s`, `${kv.rawMbPerS} MB/s (raw NATS)`, String(kv.ratio)],
    tokens("first token, 512 tokens", ttft),
    tokens("first token, 2,048 tokens", ttft2048),
    ["first to second token", `${secondTokenMs} ms`, "", ""],
  ])
}
