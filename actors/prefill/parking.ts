/**
 * What becomes of KV that a preempted sequence gives away: it is parked in the KV store, where that is estimated to be faster
 * than computing it again, and fetched from there when the sequence has blocks again, if it still is. Full blocks go to the
 * store anyway; to park them is to write them before they are evicted.
 */
import { Effect, FiberSet, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { prefillMs } from "../cost/prefill-cost.ts"
import { transferMs } from "../cost/transfer-cost.ts"
import type { BlockHash } from "../messages/hashes.ts"
import { spanOf } from "../runtime/trace-context.ts"
import type { StoreWriter } from "../decode/store-writer.ts"
import type { ReturningKv } from "../engine/missing-kv.ts"
import type { KvLayout } from "../engine/worker.ts"
import type { MeasuredCosts } from "../cost/measured-costs.ts"
import { fetchPrefix, type FetchPrefixOptions } from "./fetch-prefix.ts"

/** Whether so many blocks, the first of a sequence, come back from the store sooner than they are computed. */
export const isWorthParking = (blocks: number, { blockTokens, layers, layerBlockBytes }: KvLayout, costs: Pick<MeasuredCosts, "prefill" | "transfer">): boolean => {
  const { prefill } = costs
  if (blocks === 0 || prefill === undefined) return blocks > 0
  const computeMs = prefillMs(prefill, { newTokens: blocks * blockTokens, prefixTokens: 0 }, limits.stepTokens)
  return transferMs(costs.transfer("store"), { memory: blocks * layers * layerBlockBytes, disk: 0 }) < computeMs
}

export interface Parking {
  /** A sequence gives blocks with these contents away. */
  readonly onPreempt: (hashes: ReadonlyArray<BlockHash>) => void
  /** It has blocks again. */
  readonly onReturn: (missing: ReturningKv) => void
}

export interface ParkingOptions extends Pick<FetchPrefixOptions, "link" | "buses" | "namespace"> {
  readonly worker: () => FetchPrefixOptions["worker"]
  readonly storeWriter: StoreWriter
}

/** What is being fetched when the Scope closes is given up. */
export const parking = ({ link, buses, namespace, worker, storeWriter }: ParkingOptions): Effect.Effect<Parking, never, Scope.Scope> =>
  Effect.map(FiberSet.makeRuntime<never>(), (run) => ({
    onPreempt: (hashes) => {
      const { kv, costs } = worker()
      if (isWorthParking(hashes.length, kv, costs)) storeWriter.park(hashes)
    },
    onReturn: (missing) => {
      const parent = spanOf(missing.trace)
      const fetched = fetchPrefix({ link, buses, namespace, worker: worker(), missing })
      run(
        (parent === undefined ? fetched : Effect.withParentSpan(fetched, parent)).pipe(
          Effect.tap((blocks) => Effect.sync(() => void (worker().engine.counters.restoredTokens += blocks * worker().kv.blockTokens))),
          Effect.ensuring(Effect.sync(missing.settle)),
        ),
      )
    },
  }))
