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
import { packHashes } from "../messages/hashes.ts"
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

/** Returns the number of blocks fetched. */
export const fetchPrefix = ({ link, buses, cluster, worker, id }: FetchPrefixOptions): Effect.Effect<number> =>
  Effect.suspend(() => {
    const { engine, formatId, kv } = worker
    const { from, hashes } = engine.missingBlocks(id)
    if (hashes.length === 0) return Effect.succeed(0)
    const store = (verb: string) => subject(cluster, "kv-store", anyId, verb)
    const hop = { hop: "kv-store", deadlineMs: limits.storeDeadlineMs }
    return Effect.gen(function* () {
      const { present } = yield* link.ask(Have, store(Have.verb), { formatId, hashes: packHashes(hashes) }, hop)
      const leading = present.findIndex((here) => !here)
      const found = hashes.slice(0, leading < 0 ? present.length : leading)
      if (found.length === 0) return 0
      const transferId = randomUUID().replaceAll("-", "")
      const receiver = yield* Effect.acquireRelease(
        Effect.sync(() => new TransferReceiver({ ...buses, cluster, transferId, sink: poolSink(worker, id), firstBlock: from, blocks: found.length, creditBytes: limits.kvWindowBytes, hop: "kv-store" })),
        (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: the prefix is not wanted any more`, hop: link.sender }))),
      )
      const asked = { formatId, hashes: packHashes(found), layout: kv, transferId, firstBlock: from, creditBytes: limits.kvWindowBytes }
      const { sent } = yield* link.ask(Get, store(Get.verb), asked, hop)
      if (!sent) return 0
      yield* Effect.tryPromise({ try: () => receiver.done, catch: (error) => Fault.from(error, "kv-store") })
      return engine.acceptPrefix(id, from, found.length) ? found.length : 0
    }).pipe(
      Effect.scoped,
      Effect.timeout(limits.storeDeadlineMs),
      Effect.catch(() => Effect.succeed(0)),
      Effect.tap((fetched) => Effect.annotateCurrentSpan(attributes.movedBlocks, fetched)),
      Effect.withSpan(spans.kvStoreGet, { kind: "client", attributes: { ...messageAttributes(link, store(Get.verb)), [attributes.wantedBlocks]: hashes.length } }),
    )
  })
