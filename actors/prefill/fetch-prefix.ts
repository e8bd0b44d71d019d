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
import { packHashes } from "../messages/hashes.ts"
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

/** Returns the number of blocks fetched. */
export const fetchPrefix = ({ link, buses, cluster, worker, id, holder }: FetchPrefixOptions): Effect.Effect<number> =>
  Effect.suspend(() => {
    const { engine, formatId, kv } = worker
    const { from, hashes } = engine.missingBlocks(id)
    if (hashes.length === 0) return Effect.succeed(0)
    const store = (verb: string) => subject(cluster, "kv-store", anyId, verb)
    const inStore = Effect.map(
      Effect.orElseSucceed(
        link.ask(Have, store(Have.verb), { formatId, hashes: packHashes(hashes) }, { hop: "kv-store", deadlineMs: limits.storeDeadlineMs }),
        () => ({ present: [] }),
      ),
      ({ present }) => leadingOf(present),
    )
    /** All of the first `blocks` that are missing, or none. */
    const fetch = (blocks: number, hop: string, to: string) =>
      Effect.gen(function* () {
        const transferId = randomUUID().replaceAll("-", "")
        const receiver = yield* Effect.acquireRelease(
          Effect.sync(() => new TransferReceiver({ ...buses, cluster, transferId, sink: poolSink(worker, id), firstBlock: from, blocks, creditBytes: limits.kvWindowBytes, hop })),
          (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: the prefix is not wanted any more`, hop: link.sender }))),
        )
        const asked = { formatId, hashes: packHashes(hashes.slice(0, blocks)), layout: kv, transferId, firstBlock: from, creditBytes: limits.kvWindowBytes }
        const { sent } = yield* link.ask(Get, to, asked, { hop, deadlineMs: limits.storeDeadlineMs })
        if (!sent) return 0
        yield* Effect.tryPromise({ try: () => receiver.done, catch: (error) => Fault.from(error, hop) })
        return engine.acceptPrefix(id, from, blocks) ? blocks : 0
      }).pipe(
        Effect.scoped,
        Effect.orElseSucceed(() => 0),
      )
    return Effect.gen(function* () {
      const stored = yield* inStore
      const held = Math.min((holder?.blocks ?? 0) - from, hashes.length)
      const fetched = holder !== undefined && held > stored ? yield* fetch(held, `prefill ${holder.worker}`, subject(cluster, "prefill", holder.worker, Get.verb)) : 0
      return fetched === 0 && stored > 0 ? yield* fetch(stored, "kv-store", store(Get.verb)) : fetched
    }).pipe(
      Effect.timeoutOrElse({ duration: limits.storeDeadlineMs, orElse: () => Effect.succeed(0) }),
      Effect.tap((fetched) => Effect.annotateCurrentSpan(attributes.movedBlocks, fetched)),
      Effect.withSpan(spans.kvStoreGet, { kind: "client", attributes: { ...messageAttributes(link, store(Get.verb)), [attributes.wantedBlocks]: hashes.length } }),
    )
  })

const leadingOf = (present: ReadonlyArray<boolean>): number => {
  const first = present.findIndex((here) => !here)
  return first < 0 ? present.length : first
}
