/**
 * Fetches the blocks of a reservation that its pool lacks but the KV store has. Never an error: what does not come in time
 * is computed.
 */
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { packHashes } from "../messages/hashes.ts"
import { Get } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Worker } from "../engine/worker.ts"

export interface FetchPrefixOptions {
  readonly link: Link
  readonly cluster: string
  readonly worker: Pick<Worker, "engine" | "formatId">
  readonly transferId: string
}

/** Returns the number of blocks fetched. */
export const fetchPrefix = ({ link, cluster, worker, transferId }: FetchPrefixOptions): Effect.Effect<number> =>
  Effect.suspend(() => {
    const { from, hashes } = worker.engine.missingBlocks(transferId)
    if (hashes.length === 0) return Effect.succeed(0)
    const to = subject(cluster, "kv-store", anyId, Get.verb)
    const wanted = { formatId: worker.formatId, hashes: packHashes(hashes) }
    return Effect.gen(function* () {
      const stream = yield* link.open(Get, to, wanted, { hop: "kv-store", deadlineMs: limits.storeDeadlineMs, windowFrames: 4 })
      const receive = async (signal: AbortSignal): Promise<number> => {
        signal.addEventListener("abort", () => stream.cancel("the prefill was given up"))
        let place = from
        for await (const block of stream) {
          if (!worker.engine.importBlock(transferId, place, block)) break
          place++
        }
        return place - from
      }
      return yield* Effect.tryPromise({ try: receive, catch: (error) => Fault.from(error, "kv-store") })
    }).pipe(
      Effect.timeout(limits.storeDeadlineMs),
      Effect.catch(() => Effect.succeed(0)),
      Effect.tap((fetched) => Effect.annotateCurrentSpan(attributes.movedBlocks, fetched)),
      Effect.withSpan(spans.kvStoreGet, { kind: "client", attributes: { ...messageAttributes(link, to), [attributes.wantedBlocks]: hashes.length } }),
    )
  })
