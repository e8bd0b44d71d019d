/**
 * The prefill actor: computes prompts into the reservations that decode has opened. It looks for the longest prefix that
 * is known anywhere first, computes the rest, and sends the first token of each choice itself. Where decode is another
 * worker, its KV leaves layer by layer while the next layers are computed.
 */
import { hostname } from "node:os"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { actor, onAsk, onStream } from "../runtime/actor.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream-writer.ts"
import { currentTraceparent, messageAttributes } from "../runtime/trace-context.ts"
import { encodeToken, type Transfer } from "../messages/decode.ts"
import { packHashes } from "../messages/hashes.ts"
import { Get } from "../messages/kv-store.ts"
import { encodePrefillFrame, KvMissed, Prefill, type PrefillMessage } from "../messages/prefill.ts"
import type { KvDelta } from "../messages/scheduler.ts"
import { subject } from "../messages/subjects.ts"
import { unpackTokens } from "../messages/tokens.ts"
import { generationOf } from "../engine/generation.ts"
import type { PrefillSink } from "../engine/sequence.ts"
import { formatsMeet, type Receiving, type Worker } from "../engine/worker.ts"
import { poolSource } from "../transfer/pool.ts"
import { TransferSender, type SentTransfer } from "../transfer/transfer-sender.ts"
import { fetchPrefix } from "./fetch-prefix.ts"
import { servePrefix } from "./serve-prefix.ts"

export interface PrefillActorOptions {
  readonly link: Link
  readonly buses: Buses
  readonly namespace: string
  readonly worker: Worker
  /** What its prefix index gained and lost lately. */
  readonly events: { readonly nextId: number; readonly since: (from: number) => KvDelta | undefined }
}

interface Counts {
  cachedTokens: number
  computedTokens: number
}

/** Runs the prefill role of `worker` until the Scope closes. */
export const prefillActor = (options: PrefillActorOptions): Effect.Effect<void, never, Scope.Scope> => {
  const { link, buses, namespace, worker, events } = options
  const { engine, totals } = worker

  const place = subject(namespace, "prefill", worker.id, Prefill.verb)
  const spanAttributes = { ...messageAttributes(link, place), [attributes.worker]: worker.id }

  const prefill = (message: PrefillMessage, writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.flatMap(currentTraceparent, (trace) => {
      const { transfer, sequence } = message
      const counts: Counts = { cachedTokens: 0, computedTokens: 0 }
      const work = transfer.worker === worker.id ? hereFor(message, writer, counts) : elsewhereFor(message, writer, counts, trace)
      return work.pipe(
        Effect.ensuring(Effect.suspend(() => Effect.annotateCurrentSpan({ [attributes.cachedTokens]: counts.cachedTokens, [attributes.computedTokens]: counts.computedTokens }))),
        Effect.withSpan(spans.prefillRun, { kind: "server", attributes: { ...spanAttributes, [attributes.requestId]: sequence.requestId, [attributes.attempt]: sequence.attempt } }),
      )
    })

  /** Both roles of one worker share its pool, so that the transfer is the reservation's block table itself. */
  const hereFor = ({ sequence, transfer, holder }: PrefillMessage, writer: StreamWriter, counts: Counts) =>
    Effect.gen(function* () {
      if (transfer.epoch !== worker.epoch) return yield* Effect.fail(fault("stale", `epoch ${transfer.epoch} of ${worker.id} is over, and its reservations with it`))
      const receiving = worker.receiving.get(transfer.id)
      if (receiving?.first !== undefined) return yield* repeat(receiving, sequence, writer)
      if (receiving !== undefined) {
        totals.fallbacks++ // another worker was to compute it, and has failed
        receiving.stop()
      }
      const fetch = (nth: number) => fetchPrefix({ link, buses, namespace, worker, missing: engine.missingKv(transfer.id, nth), holder })
      yield* fetch(0)
      // Choices that have parted each lack their own, and share what the first one has got.
      const others = Array.from({ length: Math.max(0, engine.partedChoices(transfer.id) - 1) }, (_, i) => i + 1)
      yield* Effect.forEach(others, fetch, { concurrency: "unbounded", discard: true })
      yield* compute(transfer.id, writer, counts, {})
    })

  /** The other worker has failed after all its KV was here: decode goes on already, and only what was said may be lost. */
  const repeat = ({ first, prefixTokens }: Receiving, { prompt, promptLogprobs }: PrefillMessage["sequence"], writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.suspend(() => {
      if (promptLogprobs) return Effect.fail(fault("unavailable", "the scores of the prompt are lost with the worker that computed them"))
      for (const token of first ?? []) writer.write(token)
      const computedTokens = unpackTokens(prompt, "prompt").length - prefixTokens
      writer.write(encodePrefillFrame({ type: "done", cachedTokens: prefixTokens, computedTokens }))
      return Effect.void
    })

  const elsewhereFor = ({ sequence, transfer, holder }: PrefillMessage, writer: StreamWriter, counts: Counts, trace: string | undefined) =>
    Effect.gen(function* () {
      if (!formatsMeet(transfer.formatId, worker.formatId, worker.mixedKv)) return yield* Effect.fail(fault("invalid_request", `holds KV of format ${worker.formatId}, ${transfer.worker} wants ${transfer.formatId}`))
      const { id } = transfer
      yield* Effect.acquireRelease(reserve(id, sequence, trace), () => Effect.sync(() => engine.cancel(id)))
      yield* fetchPrefix({ link, buses, namespace, worker, missing: engine.missingKv(id), holder })
      yield* transferred(transfer, (sender) => {
        const { layers, blockTokens } = worker.kv
        const held = transfer.prefixTokens / blockTokens // by decode, which needs only what follows
        const send = (firstLayer: number, layers: number, from: number, blocks: number) => {
          const skipped = Math.max(0, held - from)
          if (blocks > skipped) sender.send({ firstLayer, layers, firstBlock: from + skipped, blocks: blocks - skipped })
        }
        const first: Array<Uint8Array> = []
        send(0, layers, 0, engine.computedBlocks(id))
        // Where decode shares these cores there is none that the transfer could hide on: layers leave in groups, since each time a
        // compute thread gives way, and those of the last step behind the first token.
        const shares = transfer.node === hostname()
        const together = shares ? Math.ceil(layers / limits.kvSharedCoresGroups) : 1
        let waiting = 0 // layers of this step
        let behind = () => {}
        const computed = compute(id, writer, counts, {
          layer: (layer, from, blocks) => {
            if (shares && from + blocks === engine.neededBlocks(id)) return void (behind = () => send(0, layers, from, blocks))
            waiting++
            if (waiting < together && layer < layers - 1) return
            send(layer + 1 - waiting, waiting, from, blocks)
            waiting = 0
          },
          token: (event) => void first.push(encodeToken(event)),
        })
        return Effect.andThen(
          computed,
          Effect.sync(() => {
            behind()
            sender.finish(first)
          }),
        )
      })
    }).pipe(Effect.scoped)

  /** Blocks of this worker's own for a prompt that is decoded elsewhere. */
  const reserve = (id: string, sequence: PrefillMessage["sequence"], trace: string | undefined): Effect.Effect<void, Fault> =>
    Effect.callback<void, Fault>((resume) => {
      try {
        engine.reserve({ ...generationOf(id, sequence, trace), prefillOnly: true }, {
          reserved: () => resume(Effect.void),
          token: () => {},
          ended: () => {},
          failed: (reason) => resume(Effect.fail(reason)),
          writable: () => true,
        })
      } catch (error) {
        resume(Effect.fail(Fault.from(error, link.sender)))
      }
      return Effect.sync(() => engine.cancel(id))
    })

  /** Runs `work` with an open transfer, then waits until the receiver has everything. */
  const transferred = (transfer: Transfer, work: (sender: TransferSender) => Effect.Effect<void, Fault>): Effect.Effect<void, Fault> =>
    Effect.gen(function* () {
      const sender = yield* Effect.acquireRelease(
        Effect.sync(() => new TransferSender({ ...buses, namespace, transferId: transfer.id, source: poolSource(worker.kv, engine.computed(transfer.id)), creditBytes: transfer.creditBytes, hop: `decode ${transfer.worker}` })),
        (opened) => Effect.sync(() => opened.fail(fault("cancelled", "the prefill is over"))),
      )
      yield* work(sender)
      const sent = yield* Effect.tryPromise({ try: () => sender.done, catch: (error) => Fault.from(error, link.sender) })
      count(sent)
      yield* Effect.annotateCurrentSpan({
        [attributes.transferBytes]: sent.bytes,
        [attributes.transferChunks]: sent.chunks,
        [attributes.transferResent]: sent.resent,
        [attributes.transferMbPerS]: sent.mbPerS,
        [attributes.transferWaitedMs]: sent.waitedMs,
        [attributes.transferTailMs]: sent.tailMs,
        ...breakEven(),
      })
    }).pipe(
      Effect.tapError(() => Effect.sync(() => totals.failed++)),
      Effect.withSpan(spans.kvTransfer, { attributes: { [attributes.transferFrom]: worker.id, [attributes.transferTo]: transfer.worker } }),
      Effect.scoped,
    )

  /** Measured since the start: tokens computed a second, as bytes of KV. */
  const breakEven = (): Record<string, number> => {
    const { promptTokens, cachedTokens, prefillMs } = engine.counters
    const { layers, layerBlockBytes, blockTokens } = worker.kv
    const computed = promptTokens - cachedTokens
    return prefillMs === 0 || computed === 0 ? {} : { [attributes.transferBreakEvenMbPerS]: ((computed / prefillMs) * layers * layerBlockBytes) / blockTokens / 1000 }
  }

  const count = ({ bytes, mbPerS }: SentTransfer): void => {
    totals.completed++
    totals.bytes += bytes
    if (bytes > 0) totals.ms += bytes / 1000 / mbPerS
  }

  const compute = (id: string, writer: StreamWriter, counts: Counts, also: Partial<Pick<PrefillSink, "layer" | "token">>): Effect.Effect<void, Fault> =>
    Effect.callback<void, Fault>((resume) => {
      try {
        engine.prefill(id, {
          layer: also.layer,
          scores: (scores) => writer.write(encodePrefillFrame({ type: "scores", scores })),
          token: (event) => {
            also.token?.(event)
            writer.write(encodePrefillFrame({ type: "token", event }))
          },
          done: (cachedTokens, computedTokens) => {
            Object.assign(counts, { cachedTokens, computedTokens })
            writer.write(encodePrefillFrame({ type: "done", cachedTokens, computedTokens }))
            resume(Effect.void)
          },
          failed: (reason) => resume(Effect.fail(reason)),
        })
      } catch (error) {
        resume(Effect.fail(Fault.from(error, link.sender)))
      }
      return Effect.sync(() => engine.cancel(id))
    })

  const fault = (code: "unavailable" | "stale" | "invalid_request" | "cancelled", message: string) => new Fault({ code, message: `${link.sender}: ${message}`, hop: link.sender })

  // The newest, where they are more than a message holds: a scheduler that does not know of a prefix costs time only.
  const everything = (): KvDelta => ({ cleared: true, stored: packHashes(engine.blocks.knownHashes().slice(-limits.kvEventHashes)), removed: packHashes([]) })
  const missed = ({ from }: { readonly from?: number | undefined }) =>
    Effect.sync(() => ({ nextId: events.nextId, delta: (from === undefined ? undefined : events.since(from)) ?? everything() }))

  const here = (verb: string) => [{ subject: subject(namespace, "prefill", worker.id, verb) }]
  return Effect.flatMap(servePrefix({ link, buses, namespace, worker }), (get) => actor(link, [onStream(Prefill, here(Prefill.verb), prefill), onAsk(Get, here(Get.verb), get), onAsk(KvMissed, here(KvMissed.verb), missed)]))
}
