/**
 * Fetches the blocks of a reservation that its pool lacks, from the KV store or from another worker that holds more of them.
 * Never an error: what does not come in time is computed.
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
import type { Holder } from "../messages/scheduler.ts"
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
  /** Another worker that is thought to hold leading blocks. */
  readonly holder?: Holder | undefined
}

interface Run {
  /** Who has them: where it is asked, and its name in faults. */
  readonly to: string
  readonly hop: string
  /** Place of the first among what is missing. */
  readonly first: number
  readonly hashes: Array<BlockHash>
}

/** Blocks of one store that follow each other come in one transfer. */
const runsOf = (cluster: string, hashes: ReadonlyArray<BlockHash>, at: ReadonlyArray<string> | undefined): ReadonlyArray<Run> => {
  const runs: Array<Run> = []
  hashes.forEach((hash, i) => {
    const to = subject(cluster, "kv-store", at?.[i] ?? anyId, Get.verb)
    const last = runs.at(-1)
    if (last?.to === to) last.hashes.push(hash)
    else runs.push({ to, hop: "kv-store", first: i, hashes: [hash] })
  })
  return runs.slice(0, limits.storeRuns)
}

/** Returns the number of blocks fetched. */
export const fetchPrefix = ({ link, buses, cluster, worker, id, holder }: FetchPrefixOptions): Effect.Effect<number> =>
  Effect.suspend(() => {
    const { engine, formatId, kv } = worker
    const { from, hashes } = engine.missingBlocks(id)
    if (hashes.length === 0) return Effect.succeed(0)
    const deadlineMs = limits.storeDeadlineMs
    const fetchRun = ({ to, hop, first, hashes }: Run) =>
      Effect.gen(function* () {
        const transferId = randomUUID().replaceAll("-", "")
        const firstBlock = from + first
        const receiver = yield* Effect.acquireRelease(
          Effect.sync(() => new TransferReceiver({ ...buses, cluster, transferId, sink: poolSink(worker, id), firstBlock, blocks: hashes.length, creditBytes: limits.kvWindowBytes, hop })),
          (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: the prefix is not wanted any more`, hop: link.sender }))),
        )
        const asked = { formatId, hashes: packHashes(hashes), layout: kv, transferId, firstBlock, creditBytes: limits.kvWindowBytes }
        const { sent } = yield* link.ask(Get, to, asked, { hop, deadlineMs })
        if (!sent) return false
        yield* Effect.tryPromise({ try: () => receiver.done, catch: (error) => Fault.from(error, hop) })
        return true
      }).pipe(Effect.scoped, Effect.orElseSucceed(() => false))
    const fetch = (runs: ReadonlyArray<Run>) =>
      Effect.map(Effect.forEach(runs, fetchRun, { concurrency: "unbounded" }), (came) => {
        const lost = came.indexOf(false)
        const found = runs.slice(0, lost < 0 ? runs.length : lost).reduce((sum, run) => sum + run.hashes.length, 0)
        return found > 0 && engine.acceptPrefix(id, from, found) ? found : 0
      })
    const inStore = Effect.map(
      Effect.orElseSucceed(
        link.ask(Have, subject(cluster, "kv-store", anyId, Have.verb), { formatId, hashes: packHashes(hashes), toFetch: true }, { hop: "kv-store", deadlineMs }),
        () => ({ present: [], at: undefined }),
      ),
      ({ present, at }) => runsOf(cluster, hashes.slice(0, leadingOf(present)), at),
    )
    return Effect.gen(function* () {
      const stored = yield* inStore
      const storedBlocks = stored.reduce((sum, run) => sum + run.hashes.length, 0)
      const held = hashes.slice(0, Math.max(0, (holder?.blocks ?? 0) - from))
      if (holder !== undefined && held.length > storedBlocks) {
        const fetched = yield* fetch([{ to: subject(cluster, "prefill", holder.worker, Get.verb), hop: `prefill ${holder.worker}`, first: 0, hashes: held }])
        if (fetched > 0) return fetched
      }
      return yield* fetch(stored)
    }).pipe(
      Effect.timeoutOrElse({ duration: limits.storeDeadlineMs, orElse: () => Effect.succeed(0) }),
      Effect.tap((fetched) => Effect.annotateCurrentSpan(attributes.movedBlocks, fetched)),
      Effect.withSpan(spans.kvStoreGet, { kind: "client", attributes: { ...messageAttributes(link, subject(cluster, "kv-store", anyId, Get.verb)), [attributes.wantedBlocks]: hashes.length } }),
    )
  })

const leadingOf = (present: ReadonlyArray<boolean>): number => {
  const first = present.findIndex((here) => !here)
  return first < 0 ? present.length : first
}
