/**
 * `bench serve`: what a client of a topology sees, brought up here: the time to the first token of conversations, of a shared
 * system prompt and of what only the KV store holds, and the tokens a second of short chats. Every prompt is new.
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Effect, type Scope } from "effect"
import { loadTopology } from "../../config/load-topology.ts"
import type { Topology } from "../../config/topology.ts"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { rounded, table } from "./figures.ts"
import { started } from "./serve-client.ts"
import { conversations, openLoad, sharedPrompt, streams, type ConversationFigures, type LoadFigures, type SharedPromptFigures } from "./serve-loads.ts"
import { restart, storeHit, type Skipped, type StoreFigures } from "./serve-store.ts"

export interface ServeBenchOptions {
  /** A topology file. */
  readonly topology: string
  /** Of a conversation; at least 2. */
  readonly turns: number
}

export interface ServeFigures {
  readonly model: string
  readonly workers: number
  readonly conversation1: ConversationFigures
  readonly conversation8: ConversationFigures
  readonly sharedPrompt: SharedPromptFigures
  readonly storeHit: StoreFigures
  readonly restart: StoreFigures | Skipped
  /** One stream and eight that ask again as soon as they are answered, and requests that come evenly whether answered or not. */
  readonly load1: LoadFigures
  readonly load8: LoadFigures
  readonly openLoad: LoadFigures
}

/** Repeated for so long, and once at least: 45 seconds in all, on two cores that are not idle. */
const budgetMs = { conversation1: 6_000, conversation8: 1_000, sharedPrompt: 3_000, storeHit: 5_000 } as const
const users = 32
/** Share of the requests a second of eight streams that the open load has. */
const openShare = 0.7

/** As the file says, but on a free port of loopback, beside a running one of the same file, and with its disk tier in `folder`. */
const benchTopology = (file: string, folder: string): Topology => {
  const { topology } = loadTopology(file, { host: "127.0.0.1", port: 0 })
  const { disk } = topology.kvStore
  return {
    ...topology,
    cluster: `bench-${process.pid}`,
    gateway: { ...topology.gateway, keys: null },
    kvStore: { ...topology.kvStore, ...(disk === undefined ? {} : { disk: { ...disk, path: folder } }) },
  }
}

export const serveFigures = (model: ResolvedModel, { topology: file, turns }: ServeBenchOptions): Effect.Effect<ServeFigures, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const folder = yield* Effect.acquireRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "penstock-bench-"))),
      (made) => Effect.sync(() => rmSync(made, { recursive: true, force: true })),
    )
    const topology = benchTopology(file, folder)
    const { blockTokens } = topology.workers[0]!.kv
    const whole = yield* Effect.scoped(
      Effect.flatMap(started(topology, model), (client) =>
        Effect.promise(async () => {
          const load1 = await streams(client, 1, 6)
          const conversation1 = await conversations(client, { turns, streams: 1, blockTokens, budgetMs: budgetMs.conversation1 })
          const load8 = await streams(client, 8, 2)
          const shared = await sharedPrompt(client, users, budgetMs.sharedPrompt)
          const conversation8 = await conversations(client, { turns, streams: 8, blockTokens, budgetMs: budgetMs.conversation8 })
          const open = await openLoad(client, rounded(load8.requestsPerS * openShare), 12)
          return { conversation1, conversation8, sharedPrompt: shared, load1, load8, openLoad: open }
        }),
      ),
    )
    const hit = yield* storeHit(topology, model, budgetMs.storeHit)
    const again = yield* restart(topology, model)
    const { conversation1, conversation8, sharedPrompt: shared, ...loads } = whole
    return { model: model.name, workers: topology.workers.length, conversation1, conversation8, sharedPrompt: shared, storeHit: hit, restart: again, ...loads }
  })

export const serveTable = (figures: ServeFigures): string => {
  const ms = (value: number) => `${value} ms`
  const conversation = (name: string, { ttftMs: [cold, second], turn2Ratio }: ConversationFigures) => [name, ms(second!), `${ms(cold!)} (cold)`, String(turn2Ratio)]
  const store = (name: string, found: StoreFigures | Skipped) =>
    "skipped" in found ? [name, "skipped", found.skipped, ""] : [name, ms(found.hitMs), `${ms(found.recomputeMs)} (recomputed)`, String(rounded(1 / found.timesFaster))]
  const { conversation1, conversation8, sharedPrompt: shared, storeHit: hit, restart: again, load1, load8, openLoad: open } = figures
  const load = (name: string, { tokPerS, requestsPerS, ttftP50Ms, ttftP99Ms }: LoadFigures) => [name, `${tokPerS} tok/s`, ms(ttftP50Ms), ms(ttftP99Ms), String(requestsPerS)]
  const firsts = table([
    ["time to first token", "", "compared with", "ratio"],
    conversation("turn 2 of a conversation", conversation1),
    conversation("turn 2, 8 conversations", conversation8),
    ["shared system prompt", ms(shared.othersMs), `${ms(shared.firstMs)} (its first user)`, String(shared.ratio)],
    store("found in the KV store", hit),
    store("after a restart", again),
  ])
  const loads = table([["short chats", "answers", "first token p50", "p99", "requests/s"], load("1 stream", load1), load("8 streams", load8), load("coming evenly", open)])
  return `${firsts}\n\n${loads}`
}
