/**
 * Puts what a worker computes into the KV store, in the background and by hash only: a block that was evicted before its
 * turn, or a store that does not answer, costs a later miss and nothing else.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes, spanOf } from "../runtime/trace-context.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { Have, Put } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Worker } from "../engine/worker.ts"
import { poolSource } from "../transfer/pool.ts"
import { TransferSender } from "../transfer/transfer-sender.ts"

const pollMs = 20

interface Stored {
  readonly hash: BlockHash
  /** Traceparent of the request that it was computed for. */
  readonly trace: string | undefined
  readonly depth: number
}

export class StoreWriter {
  #queue: Array<Stored> = []
  #parked = 0 // the first of the queue, which do not wait for prompts
  #wake: (() => void) | undefined
  #state: "new" | "works" | "fails" = "new"

  /** A block's content became known. Beyond the bound the oldest in the queue is forgotten. */
  stored(hash: BlockHash, trace?: string, depth = 0): void {
    this.#queue.push({ hash, trace, depth })
    if (this.#queue.length > limits.storeQueueBlocks) this.#queue.splice(Math.min(this.#parked, limits.storeQueueBlocks), 1)
    this.#wake?.()
    this.#wake = undefined
  }

  /** Those of these that are not written yet are next, the last one first: they are evicted in this order. */
  park(hashes: ReadonlyArray<BlockHash>): void {
    const places = new Map(hashes.map((hash, place) => [hash, place]))
    const waiting = this.#queue.slice(this.#parked)
    const parked = waiting.filter(({ hash }) => places.has(hash)).sort((a, b) => places.get(b.hash)! - places.get(a.hash)!)
    this.#queue = [...this.#queue.slice(0, this.#parked), ...parked, ...waiting.filter(({ hash }) => !places.has(hash))]
    this.#parked += parked.length
  }

  /** Writes until the Scope closes. */
  run(options: { readonly link: Link; readonly namespace: string; readonly buses: Buses; readonly worker: Pick<Worker, "engine" | "formatId" | "kv"> }): Effect.Effect<void, never, Scope.Scope> {
    const { link, buses, namespace, worker } = options
    const hop = { hop: "kv-store", deadlineMs: limits.storeDeadlineMs }
    const { engine, formatId, kv } = worker
    const to = subject(namespace, "kv-store", anyId, Put.verb)
    const putBatch = Effect.gen({ self: this }, function* () {
      yield* this.#nonEmpty()
      // What somebody waits for goes first, where it does not go on for ever.
      for (let waitedMs = 0; this.#parked === 0 && engine.hasPrompts && waitedMs < limits.storeYieldMs; waitedMs += pollMs) yield* Effect.sleep(pollMs)
      const batch = this.#queue.splice(0, limits.storeBatchBlocks)
      this.#parked = Math.max(0, this.#parked - batch.length)
      const { present } = yield* link.ask(Have, subject(namespace, "kv-store", anyId, Have.verb), { formatId, hashes: packHashes(batch.map(({ hash }) => hash)) }, hop)
      const absent = batch.filter((_, i) => present[i] !== true)
      if (absent.length > 0) yield* put(absent).pipe(Effect.withSpan(spans.kvStorePut, spanOfBatch(absent)))
    })
    /** The blocks are held in the pool while they are sent, and no longer: others may wait for them. */
    const put = (absent: ReadonlyArray<Stored>) =>
      Effect.gen(function* () {
        const held = yield* Effect.acquireRelease(Effect.sync(() => engine.hold(absent.map(({ hash }) => hash))), ({ release }) => Effect.sync(release))
        if (held.hashes.length === 0) return // evicted before their turn
        const depthOf = new Map(absent.map(({ hash, depth }) => [hash, depth]))
        const asked = { formatId, hashes: packHashes(held.hashes), layout: kv, depths: held.hashes.map((hash) => depthOf.get(hash) ?? 0) }
        const { wanted, transferId, creditBytes } = yield* link.ask(Put, to, asked, hop)
        const places = held.hashes.flatMap((_, i) => (wanted[i] === true ? [i] : []))
        yield* Effect.annotateCurrentSpan(attributes.movedBlocks, places.length)
        if (places.length === 0) return
        const source = poolSource(kv, held.at(places))
        const sender = yield* Effect.acquireRelease(
          Effect.sync(() => new TransferSender({ ...buses, namespace, transferId, source, creditBytes, hop: "kv-store" })),
          (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: is leaving`, hop: link.sender }))),
        )
        places.forEach((_, place) => sender.send({ firstLayer: 0, layers: kv.layers, firstBlock: place, blocks: 1 }))
        sender.finish([])
        yield* Effect.tryPromise({ try: () => sender.done, catch: (error) => Fault.from(error, "kv-store") })
      }).pipe(
        Effect.scoped,
        Effect.timeoutOrElse({ duration: limits.storePutDeadlineMs, orElse: () => Effect.fail(new Fault({ code: "deadline_exceeded", message: `${link.sender}: the KV store took longer than ${limits.storePutDeadlineMs} ms`, hop: "kv-store" })) }),
      )
    /** A child of the request of its first block, linked to those of the others. */
    const spanOfBatch = (absent: ReadonlyArray<Stored>) => {
      const [parent, ...others] = [...new Set(absent.map(({ trace }) => trace))].flatMap((trace) => spanOf(trace) ?? [])
      return {
        kind: "client" as const,
        ...(parent === undefined ? { root: true } : { parent }),
        links: others.map((span) => ({ span, attributes: {} })),
        attributes: { ...messageAttributes(link, to), [attributes.wantedBlocks]: absent.length },
      }
    }
    // One line for a run of failures. Where nobody has ever served it, the topology has no store, which is no failure.
    const tell = (fault: Fault) => {
      if (this.#state === "fails" || (this.#state === "new" && fault.code === "unavailable")) return
      this.#state = "fails"
      console.error(`${link.sender}: the KV store does not get what is computed here, until it is back: ${fault.message}`)
    }
    const quietly = putBatch.pipe(
      Effect.matchEffect({
        onSuccess: () => Effect.sync(() => void (this.#state = "works")),
        onFailure: (fault) => Effect.andThen(Effect.sync(() => tell(fault)), Effect.sleep(limits.heartbeatIntervalMs)),
      }),
    )
    return Effect.asVoid(Effect.forkScoped(Effect.forever(quietly)))
  }

  #nonEmpty(): Effect.Effect<void> {
    return Effect.callback<void>((resume) => {
      if (this.#queue.length > 0) return resume(Effect.void)
      this.#wake = () => resume(Effect.void)
    })
  }
}
