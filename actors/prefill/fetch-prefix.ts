/**
 * Fetches blocks that a sequence lacks, from the KV store or from another worker that holds them, where that is estimated to be
 * faster than to compute them. Never an error: what does not come in time is computed.
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
import type { MissingKv } from "../engine/missing-kv.ts"
import type { Worker } from "../engine/worker.ts"
import { prefillMs } from "../cost/prefill-cost.ts"
import { poolSink } from "../transfer/pool.ts"
import { TransferReceiver } from "../transfer/transfer-receiver.ts"
import { planPrefix, type PrefixOffer } from "./prefix-plan.ts"

export interface FetchPrefixOptions {
  readonly link: Link
  readonly buses: Buses
  readonly namespace: string
  readonly worker: Pick<Worker, "engine" | "formatId" | "kv" | "costs">
  readonly missing: MissingKv
  /** Another worker that is thought to hold leading blocks. */
  readonly holder?: Holder | undefined
}

interface Run {
  /** Who has them: where it is asked, and its name in faults. */
  readonly to: string
  readonly hop: string
  /** Place of the first among what is missing. */
  readonly first: number
  readonly hashes: ReadonlyArray<BlockHash>
}

interface Offer extends PrefixOffer {
  /** How its first blocks come. */
  readonly runsOf: (blocks: number) => ReadonlyArray<Run>
}

/** Returns the number of blocks fetched. */
export const fetchPrefix = ({ link, buses, namespace, worker, missing, holder }: FetchPrefixOptions): Effect.Effect<number> =>
  Effect.suspend(() => {
    const { engine, formatId, kv, costs } = worker
    const { from, hashes, tokens } = missing
    if (hashes.length === 0) return Effect.succeed(0)
    const deadlineAtMs = performance.now() + limits.storeDeadlineMs
    const leftMs = () => Math.max(1, deadlineAtMs - performance.now())
    const blockBytes = kv.layers * kv.layerBlockBytes
    /** No store is waited for longer than what it may have takes to compute. */
    const answerMs = () => {
      if (costs.prefill === undefined) return limits.storeDeadlineMs
      const computeMs = prefillMs(costs.prefill, { newTokens: hashes.length * kv.blockTokens, prefixTokens: from * kv.blockTokens }, limits.stepTokens)
      return Math.min(limits.storeDeadlineMs, Math.max(limits.storeAnswerMs, computeMs))
    }

    const fetchRun = ({ to, hop, first, hashes }: Run) =>
      Effect.gen(function* () {
        const transferId = randomUUID().replaceAll("-", "")
        const firstBlock = from + first
        const sink = poolSink(kv, missing.blocks)
        const receiver = yield* Effect.acquireRelease(
          Effect.sync(() => new TransferReceiver({ ...buses, namespace, transferId, sink, firstBlock, blocks: hashes.length, creditBytes: limits.kvWindowBytes, hop })),
          (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: the prefix is not wanted any more`, hop: link.sender }))),
        )
        const asked = { formatId, hashes: packHashes(hashes), layout: kv, transferId, firstBlock, creditBytes: limits.kvWindowBytes }
        const { sent } = yield* link.ask(Get, to, asked, { hop, deadlineMs: leftMs() })
        if (!sent) {
          receiver.close() // there is no sender to be told
          return false
        }
        yield* Effect.tryPromise({ try: () => receiver.done, catch: (error) => Fault.from(error, hop) })
        return true
      }).pipe(Effect.scoped, Effect.orElseSucceed(() => false))

    /** The number of blocks that came; what that took, or that they did not come in time, is remembered. */
    const fetch = ({ source, onDisk, runsOf }: Offer, blocks: number) =>
      Effect.suspend(() => {
        const startedAtMs = performance.now()
        const measure = (moved: number) => {
          const disk = onDisk.slice(0, moved).filter((is) => is).length * blockBytes
          costs.moved(source, { memory: moved * blockBytes - disk, disk, ms: performance.now() - startedAtMs })
        }
        const runs = runsOf(blocks)
        return Effect.forEach(runs, fetchRun, { concurrency: "unbounded" }).pipe(
          Effect.map((came) => {
            const lost = came.indexOf(false)
            const found = runs.slice(0, lost < 0 ? runs.length : lost).reduce((sum, run) => sum + run.hashes.length, 0)
            if (found > 0) measure(found)
            return found > 0 && missing.accept(found) ? found : 0
          }),
          Effect.timeoutOrElse({ duration: leftMs(), orElse: () => Effect.sync(() => (measure(blocks), 0)) }),
        )
      })

    const stored = link.ask(Have, subject(namespace, "kv-store", anyId, Have.verb), { formatId, hashes: packHashes(hashes), toFetch: true }, { hop: "kv-store", deadlineMs: answerMs() }).pipe(
      Effect.map(({ present, at, onDisk }): ReadonlyArray<Offer> => {
        const runs = runsOf(namespace, hashes.slice(0, leadingOf(present)), at)
        const blocks = runs.reduce((sum, run) => sum + run.hashes.length, 0)
        return [{ source: "store", onDisk: hashes.slice(0, blocks).map((_, i) => onDisk?.[i] === true), cost: costs.transfer("store"), runsOf: (count) => cutTo(runs, count) }]
      }),
      Effect.orElseSucceed((): ReadonlyArray<Offer> => []),
    )
    const held = hashes.slice(0, Math.max(0, (holder?.blocks ?? 0) - from))
    const ofHolder = (): ReadonlyArray<Offer> => {
      if (holder === undefined || held.length === 0) return []
      const run = { to: subject(namespace, "prefill", holder.worker, Get.verb), hop: `prefill ${holder.worker}`, first: 0, hashes: held }
      return [{ source: run.hop, onDisk: held.map(() => false), cost: costs.transfer(run.hop), runsOf: (count) => cutTo([run], count) }]
    }

    return Effect.gen(function* () {
      let offers = [...(yield* stored), ...ofHolder()]
      for (;;) {
        const need = { tokens, computedTokens: from * kv.blockTokens, blockTokens: kv.blockTokens, blockBytes, queuedTokens: engine.queuedTokens, stepTokens: limits.stepTokens }
        const { offer, blocks, planMs, computeMs } = planPrefix(need, offers, costs.prefill)
        yield* Effect.annotateCurrentSpan({
          [attributes.prefixSource]: offer?.source ?? "compute",
          ...(planMs === undefined ? {} : { [attributes.prefixPlanMs]: planMs, [attributes.prefixComputeMs]: computeMs }),
        })
        const fetched = offer === undefined ? 0 : yield* fetch(offer, blocks)
        if (offer === undefined || fetched > 0 || performance.now() >= deadlineAtMs) return fetched
        offers = offers.filter((other) => other !== offer) // it has nothing any more
      }
    }).pipe(
      Effect.tap((fetched) => Effect.annotateCurrentSpan(attributes.movedBlocks, fetched)),
      Effect.withSpan(spans.kvStoreGet, { kind: "client", attributes: { ...messageAttributes(link, subject(namespace, "kv-store", anyId, Get.verb)), [attributes.wantedBlocks]: hashes.length } }),
    )
  })

/** Blocks of one store that follow each other come in one transfer. */
const runsOf = (namespace: string, hashes: ReadonlyArray<BlockHash>, at: ReadonlyArray<string> | undefined): ReadonlyArray<Run> => {
  const runs: Array<Run & { readonly hashes: Array<BlockHash> }> = []
  hashes.forEach((hash, i) => {
    const to = subject(namespace, "kv-store", at?.[i] ?? anyId, Get.verb)
    const last = runs.at(-1)
    if (last?.to === to) last.hashes.push(hash)
    else runs.push({ to, hop: "kv-store", first: i, hashes: [hash] })
  })
  return runs.slice(0, limits.storeRuns)
}

/** The first `blocks` blocks of runs. */
const cutTo = (runs: ReadonlyArray<Run>, blocks: number): ReadonlyArray<Run> =>
  runs.flatMap((run) => (run.first >= blocks ? [] : [{ ...run, hashes: run.hashes.slice(0, blocks - run.first) }]))

const leadingOf = (present: ReadonlyArray<boolean>): number => {
  const first = present.findIndex((here) => !here)
  return first < 0 ? present.length : first
}
