/**
 * Fetches the blocks of a reservation that its pool lacks but the KV store has. Never an error: what does not come in time
 * is computed.
 */
import { randomUUID } from "node:crypto"
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { Get, Have } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Worker } from "../engine/worker.ts"
import { poolSink } from "../transfer/pool.ts"
import { TransferReceiver } from "../transfer/transfer-receiver.ts"

export interface FetchPrefixOptions {
  readonly link: Link
  readonly buses: Buses
  readonly cluster: string
  readonly worker: Pick<Worker, "engine" | "formatId" | "kv">
  /** Of the generation in its engine. */
  readonly id: string
}

interface Run {
  /** Id of the store that has them. */
  readonly store: string
  /** Place of the first among what is missing. */
  readonly first: number
  readonly hashes: Array<BlockHash>
}

const runsOf = (hashes: ReadonlyArray<BlockHash>, at: ReadonlyArray<string> | undefined): ReadonlyArray<Run> => {
  const runs: Array<Run> = []
  hashes.forEach((hash, i) => {
    const store = at?.[i] ?? anyId
    const last = runs.at(-1)
    if (last?.store === store) last.hashes.push(hash)
    else runs.push({ store, first: i, hashes: [hash] })
  })
  return runs.slice(0, limits.storeRuns)
}

/** Returns the number of blocks fetched. */
export const fetchPrefix = ({ link, buses, cluster, worker, id: ofGeneration }: FetchPrefixOptions): Effect.Effect<number> =>
  Effect.suspend(() => {
    const { engine, formatId, kv } = worker
    const { from, hashes } = engine.missingBlocks(ofGeneration)
    if (hashes.length === 0) return Effect.succeed(0)
    const store = (id: string, verb: string) => subject(cluster, "kv-store", id, verb)
    const hop = { hop: "kv-store", deadlineMs: limits.storeDeadlineMs }
    /** Blocks of one store that follow each other come in one transfer. */
    const fetchRun = ({ store: id, first, hashes }: Run) =>
      Effect.gen(function* () {
        const transferId = randomUUID().replaceAll("-", "")
        const firstBlock = from + first
        const receiver = yield* Effect.acquireRelease(
          Effect.sync(() => new TransferReceiver({ ...buses, cluster, transferId, sink: poolSink(worker, ofGeneration), firstBlock, blocks: hashes.length, creditBytes: limits.kvWindowBytes, hop: "kv-store" })),
          (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: the prefix is not wanted any more`, hop: link.sender }))),
        )
        const asked = { formatId, hashes: packHashes(hashes), layout: kv, transferId, firstBlock, creditBytes: limits.kvWindowBytes }
        const { sent } = yield* link.ask(Get, store(id, Get.verb), asked, hop)
        if (!sent) return false
        yield* Effect.tryPromise({ try: () => receiver.done, catch: (error) => Fault.from(error, "kv-store") })
        return true
      }).pipe(Effect.orElseSucceed(() => false))
    return Effect.gen(function* () {
      const { present, at } = yield* link.ask(Have, store(anyId, Have.verb), { formatId, hashes: packHashes(hashes), toFetch: true }, hop)
      const leading = present.findIndex((here) => !here)
      const runs = runsOf(hashes.slice(0, leading < 0 ? present.length : leading), at)
      const came = yield* Effect.forEach(runs, fetchRun, { concurrency: "unbounded" })
      const lost = came.indexOf(false)
      const found = runs.slice(0, lost < 0 ? runs.length : lost).reduce((sum, run) => sum + run.hashes.length, 0)
      return found > 0 && engine.acceptPrefix(ofGeneration, from, found) ? found : 0
    }).pipe(
      Effect.scoped,
      Effect.timeout(limits.storeDeadlineMs),
      Effect.catch(() => Effect.succeed(0)),
      Effect.tap((fetched) => Effect.annotateCurrentSpan(attributes.movedBlocks, fetched)),
      Effect.withSpan(spans.kvStoreGet, { kind: "client", attributes: { ...messageAttributes(link, store(anyId, Get.verb)), [attributes.wantedBlocks]: hashes.length } }),
    )
  })
