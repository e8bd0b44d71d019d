/** What a prompt costs whose KV no pool holds any more, but the KV store: in its memory, and on its disk after a restart. */
import { Effect } from "effect"
import type { Topology } from "../../config/topology.ts"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { median, rounded } from "./figures.ts"
import { rest, started, type Answer, type Client } from "./serve-client.ts"
import { repeated } from "./serve-loads.ts"

export interface StoreFigures {
  readonly tokens: number
  readonly rounds: number
  readonly recomputeMs: number
  readonly hitMs: number
  /** The same prompt again, from the pool: of `hitMs` what is not fetching, and all that computing while layers arrive could hide. */
  readonly pooledMs: number
  readonly timesFaster: number
  /** Of the hits. */
  readonly cachedTokens: number
}

export interface Skipped {
  readonly skipped: string
}

/** Blocks go to the store in the background. */
const storedMs = 500
const answerTokens = 2

interface Pair {
  readonly recomputed: Answer
  readonly hit: Answer
  readonly pooled: Answer
}

const figures = (tokens: number, pairs: ReadonlyArray<Pair>): StoreFigures => ({
  tokens,
  rounds: pairs.length,
  recomputeMs: rounded(median(pairs.map(({ recomputed }) => recomputed.firstMs))),
  hitMs: rounded(median(pairs.map(({ hit }) => hit.firstMs))),
  pooledMs: rounded(median(pairs.map(({ pooled }) => pooled.firstMs))),
  timesFaster: rounded(median(pairs.map(({ recomputed, hit }) => recomputed.firstMs / hit.firstMs))),
  cachedTokens: median(pairs.map(({ hit }) => hit.cachedTokens)),
})

/** The topology with pools that hold one prompt each, so that every other prompt makes them forget it. */
const withSmallPools = (topology: Topology, tokens: number): Topology => ({
  ...topology,
  workers: topology.workers.map((worker) => ({ ...worker, kv: { ...worker.kv, blocks: Math.ceil((tokens + answerTokens) / worker.kv.blockTokens) + 2 } })),
})

/** Prompts that are new and the ones before them take turns: each makes the pool forget the other. */
export const storeHit = (topology: Topology, model: ResolvedModel, tokens: number, budgetMs: number): Effect.Effect<StoreFigures, Error> =>
  Effect.scoped(
    Effect.gen(function* () {
      const client = yield* started(withSmallPools(topology, tokens), model)
      return yield* Effect.promise(async () => {
        const ask = async (prompt: ReadonlyArray<number>) => {
          const answer = await client.complete(prompt, answerTokens)
          await rest(storedMs)
          return answer
        }
        let before = await client.tokens(tokens)
        await ask(before)
        const pairs = await repeated(budgetMs, async (): Promise<Pair> => {
          const fresh = await client.tokens(tokens)
          const recomputed = await ask(fresh)
          const hit = await ask(before)
          const pooled = await client.complete(before, answerTokens)
          before = fresh
          return { recomputed, hit, pooled }
        })
        return figures(tokens, pairs)
      })
    }),
  )

/** Whether the topology's store keeps blocks on disk. */
export const hasDisk = ({ kvStore: { disk } }: Topology): boolean => disk !== undefined && disk.size > 0

/** A prompt before and after everything has ended and begun again, beside one that is new. */
export const restart = (topology: Topology, model: ResolvedModel, tokens: number): Effect.Effect<StoreFigures | Skipped, Error> => {
  if (!hasDisk(topology)) return Effect.succeed({ skipped: "the topology has no disk tier (kvStore.disk)" })
  const running = <A>(work: (client: Client) => Promise<A>) => Effect.scoped(Effect.flatMap(started(topology, model), (client) => Effect.promise(() => work(client))))
  return Effect.gen(function* () {
    const prompt = yield* running(async (client) => {
      const asked = await client.tokens(tokens)
      await client.complete(asked, answerTokens)
      await rest(storedMs)
      return asked
    })
    return yield* running(async (client) => {
      const recomputed = await client.complete(await client.tokens(tokens), answerTokens)
      await rest(storedMs)
      const hit = await client.complete(prompt, answerTokens)
      return figures(tokens, [{ recomputed, hit, pooled: await client.complete(prompt, answerTokens) }])
    })
  })
}
