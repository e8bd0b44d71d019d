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
import { rounded } from "./figures.ts"
import { table } from "../table.ts"
import { started } from "./serve-client.ts"
import { conversations, historyTokens, openLoad, probe, sharedPrompt, streams, type ConversationFigures, type LoadFigures, type SharedPromptFigures } from "./serve-loads.ts"
import { restart, storeHit, type Skipped, type StoreFigures } from "./serve-store.ts"
import { TimeBudget } from "./time-budget.ts"

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

/** Each repeats, once at least, for this share of what is left of the bench's time, and for so long at most. */
const share = { load1: 0.1, conversation1: 0.2, load8: 0.2, sharedPrompt: 0.15, conversation8: 0.3, openLoad: 0.3, storeHit: 0.5 } as const
const mostMs = { conversation1: 6_000, sharedPrompt: 3_000, storeHit: 5_000 } as const
/** One round of these: as many as there is time for. */
const conversationsAtOnce = { least: 2, most: 8 } as const
const openRequests = { least: 3, most: 12 } as const
const systemPromptShare = 0.75
/** Share of the requests a second of eight streams that the open load has. */
const openShare = 0.7

const within = ({ least, most }: { readonly least: number; readonly most: number }, count: number): number => Math.min(most, Math.max(least, Math.floor(count)))

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
    const time = new TimeBudget()
    const folder = yield* Effect.acquireRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "penstock-bench-"))),
      (made) => Effect.sync(() => rmSync(made, { recursive: true, force: true })),
    )
    const topology = benchTopology(file, folder)
    const { blockTokens } = topology.workers[0]!.kv
    const whole = yield* Effect.scoped(
      Effect.flatMap(started(topology, model), (client) =>
        Effect.promise(async () => {
          const history = historyTokens(await probe(client))
          const load1 = await streams(client, 1, 6, time.share(share.load1))
          const conversation1 = await conversations(client, { history, turns, streams: 1, blockTokens, budgetMs: time.share(share.conversation1, mostMs.conversation1) })
          const load8 = await streams(client, 8, 2, time.share(share.load8))
          const shared = await sharedPrompt(client, history * systemPromptShare, time.share(share.sharedPrompt, mostMs.sharedPrompt))
          const count = within(conversationsAtOnce, time.share(share.conversation8) / conversation1.ttftMs[0]!)
          const conversation8 = await conversations(client, { history, turns, streams: count, blockTokens, budgetMs: 0 })
          const requestsPerS = rounded(load8.requestsPerS * openShare)
          const open = await openLoad(client, requestsPerS, within(openRequests, (time.share(share.openLoad) / 1000) * requestsPerS))
          return { history, conversation1, conversation8, sharedPrompt: shared, load1, load8, openLoad: open }
        }),
      ),
    )
    const { history, conversation1, conversation8, sharedPrompt: shared, ...loads } = whole
    const hit = yield* storeHit(topology, model, history, time.share(share.storeHit, mostMs.storeHit))
    const again = yield* restart(topology, model, history)
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
    conversation(`turn 2 after ${conversation1.historyTokens} tokens`, conversation1),
    conversation(`the same, ${conversation8.streams} at a time`, conversation8),
    [`shared system prompt, ${shared.users} users`, ms(shared.othersMs), `${ms(shared.firstMs)} (its first user)`, String(shared.ratio)],
    store("found in the KV store", hit),
    store("after a restart", again),
  ])
  const loads = table([["short chats", "answers", "first token p50", "p99", "requests/s"], load("1 stream", load1), load("8 streams", load8), load("coming evenly", open)])
  return `${firsts}\n\n${loads}`
}
