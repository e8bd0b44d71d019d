/**
 * The scheduler actor: owns the view of the cluster and the queue of requests that have no place yet. First come, first
 * served, after those that have begun already; beyond the queue's bound a request is refused before work is wasted on it.
 */
import { Clock, Deferred, Effect, Exit, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { actor, onAsk, onTell } from "../runtime/actor.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { KvMissed } from "../messages/prefill.ts"
import { Configure, Heartbeat, KvEvents, Leave, Place, Prefilled, Release, type PlaceMessage, type Placement } from "../messages/scheduler.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Members } from "../presence/members.ts"
import { ClusterState } from "./cluster-state.ts"
import { isPolicyName, policies, type PolicyName } from "./policy.ts"

export interface SchedulerOptions {
  readonly link: Link
  readonly namespace: string
  readonly policy: PolicyName
  /** Most requests that wait for a place. */
  readonly queue: number
  /** Who serves: to a later scheduler this one gives way. */
  readonly members?: Pick<Members, "onCome">
}

interface Waiting {
  readonly request: PlaceMessage
  readonly placed: Deferred.Deferred<Placement, Fault>
}

/** Runs the scheduler until the Scope closes. */
export const schedulerActor = (options: SchedulerOptions): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function* () {
    const { link, namespace } = options
    const state = new ClusterState({ silenceMs: limits.heartbeatSilenceMs, leaseMs: limits.placementLeaseMs })
    const asking = new Set<string>()
    let { policy, queue } = options
    let waiting: ReadonlyArray<Waiting> = []

    const fault = (code: "overloaded" | "unavailable" | "invalid_request", message: string, param?: string) =>
      new Fault({ code, message: `${link.sender}: ${message}`, hop: link.sender, param, ...(code === "overloaded" ? { retryAfterMs: limits.retryAfterMs } : {}) })

    /** A placement, a refusal, or undefined: there is no room now. */
    const decide = (request: PlaceMessage, nowMs: number): Placement | Fault | undefined => {
      const decode = state.candidates("decode", request)
      const prefillers = state.candidates("prefill", request)
      // Every worker can compute a prompt: where none is left whose role it is, those that decode do both.
      const prefill = prefillers.length > 0 ? prefillers : decode
      if (prefill.length === 0 || decode.length === 0) return fault("unavailable", `no worker ${prefill.length === 0 ? "prefills" : "decodes"} now`)
      const largest = Math.max(...decode.map(({ load }) => load.maxBatch))
      if (request.choices > largest) return fault("invalid_request", `n: ${request.choices} choices are more than the ${largest} sequences that a worker decodes at once`, "n")
      const roomy = decode.filter((worker) => state.hasSlot(worker, request.choices))
      // A worker of both roles that has no room to decode takes no prompt either: its KV would have to leave at once.
      const able = prefill.filter((worker) => state.beginsSoon(worker) && (roomy.includes(worker) || !worker.roles.includes("decode")))
      // What was moved lacks a few tokens of its KV at most, which decode computes itself.
      const computing = request.movedFrom === undefined ? able : roomy
      if (roomy.length === 0 || computing.length === 0) return undefined
      const chosen = policies[policy](request, state, { prefill: computing, decode: roomy })
      const missing = Math.max(0, request.tokens - chosen.prefixBlocks * chosen.prefill.load.blockTokens)
      const computeTokens = request.movedFrom === undefined ? missing : Math.min(missing, chosen.prefill.load.blockTokens)
      const queuedTokens = state.queuedTokens(chosen.prefill.id)
      state.charge({ requestId: request.requestId, attempt: request.attempt, prefill: chosen.prefill.id, decode: chosen.decode.id, choices: request.choices, computeTokens, placedAtMs: nowMs })
      const holder = state.holder(request, chosen.prefill.id, chosen.prefixBlocks)
      const epochs = { prefill: chosen.prefill.epoch, decode: chosen.decode.epoch }
      return { prefill: chosen.prefill.id, decode: chosen.decode.id, holder, prefixBlocks: chosen.prefixBlocks, estimates: { queuedTokens, computeTokens }, epochs, epoch: link.epoch }
    }

    /** As `decide`; a request that breaks it is refused, since those behind it would wait for ever. */
    const decideOrRefuse = (request: PlaceMessage, nowMs: number): Placement | Fault | undefined => {
      try {
        return decide(request, nowMs)
      } catch (error) {
        console.error(`${link.sender}: ${request.requestId} cannot be placed: ${error instanceof Error ? error.message : String(error)}`)
        return Fault.from(undefined, link.sender)
      }
    }

    const settle = ({ placed }: Waiting, decision: Placement | Fault) => Deferred.done(placed, decision instanceof Fault ? Exit.fail(decision) : Exit.succeed(decision))

    const drain = Effect.gen(function* () {
      const nowMs = yield* Clock.currentTimeMillis
      for (let first = waiting[0]; first !== undefined; first = waiting[0]) {
        const decision = decideOrRefuse(first.request, nowMs)
        if (decision === undefined) return
        waiting = waiting.slice(1)
        yield* settle(first, decision)
      }
    })

    const spanAttributes = messageAttributes(link, subject(namespace, "scheduler", anyId, Place.verb))

    const place = (request: PlaceMessage) =>
      Effect.gen(function* () {
        const arrivedAtMs = performance.now()
        const entry: Waiting = { request, placed: yield* Deferred.make<Placement, Fault>() }
        const newcomers = waiting.findIndex((other) => other.request.begun !== true)
        waiting = request.begun === true && newcomers >= 0 ? [...waiting.slice(0, newcomers), entry, ...waiting.slice(newcomers)] : [...waiting, entry]
        yield* drain
        const isNew = request.begun !== true
        if (isNew && waiting.length > queue && waiting.includes(entry)) {
          waiting = waiting.filter((other) => other !== entry)
          return yield* Effect.fail(fault("overloaded", `${waiting.length} requests wait for a place already`))
        }
        const placement = yield* Deferred.await(entry.placed).pipe(Effect.onInterrupt(() => Effect.sync(() => void (waiting = waiting.filter((other) => other !== entry)))))
        yield* Effect.annotateCurrentSpan({
          [attributes.placedPrefill]: placement.prefill,
          [attributes.placedDecode]: placement.decode,
          [attributes.prefixBlocks]: placement.prefixBlocks,
          [attributes.queueWaitMs]: performance.now() - arrivedAtMs,
        })
        return placement
      }).pipe(Effect.withSpan(spans.schedulerPlace, { kind: "server", attributes: { ...spanAttributes, [attributes.policy]: policy, [attributes.requestId]: request.requestId, [attributes.attempt]: request.attempt } }))

    const release = (key: { readonly requestId: string; readonly attempt: number }) =>
      Effect.gen(function* () {
        state.release(key)
        const gone = waiting.filter(({ request }) => request.requestId === key.requestId && request.attempt <= key.attempt)
        waiting = waiting.filter((entry) => !gone.includes(entry))
        for (const entry of gone) yield* settle(entry, new Fault({ code: "cancelled", message: `${link.sender}: the request was given up`, hop: link.sender }))
        yield* drain
      })

    const configure = (wanted: { readonly policy?: string | undefined; readonly queue?: number | undefined; readonly admission?: string | undefined }) =>
      Effect.gen(function* () {
        if (wanted.policy !== undefined && !isPolicyName(wanted.policy)) return yield* Effect.fail(fault("invalid_request", `policy: ${wanted.policy} is not one of ${Object.keys(policies).join(", ")}`, "policy"))
        if (wanted.admission !== undefined && wanted.admission !== "none") return yield* Effect.fail(fault("invalid_request", `admission: ${wanted.admission} is not available; none is`, "admission"))
        const applied = [...(wanted.policy !== undefined && wanted.policy !== policy ? ["policy" as const] : []), ...(wanted.queue !== undefined && wanted.queue !== queue ? ["queue" as const] : [])]
        policy = wanted.policy ?? policy
        queue = wanted.queue ?? queue
        yield* drain
        return { applied }
      })

    const askMissed = (worker: string, epoch: number) =>
      Effect.suspend(() => {
        if (asking.has(worker)) return Effect.void
        asking.add(worker)
        const known = state.workers.get(worker)?.nextEventId ?? -1
        return link.ask(KvMissed, subject(namespace, "prefill", worker, KvMissed.verb), known < 0 ? {} : { from: known }, { hop: `prefill ${worker}` }).pipe(
          Effect.map(({ nextId, delta }) => state.kvEvents({ worker, epoch, firstId: Math.max(0, known), nextId, delta })),
          // Every event shows the same gap: what fails is not asked for again at once.
          Effect.tapError(() => Effect.sleep(limits.heartbeatIntervalMs)),
          Effect.ignore,
          Effect.ensuring(Effect.sync(() => asking.delete(worker))),
        )
      })

    const scope = yield* Effect.scope
    const here = (verb: string) => [{ subject: subject(namespace, "scheduler", anyId, verb) }]
    const sweep = Effect.gen(function* () {
      yield* Effect.sleep(limits.heartbeatIntervalMs)
      state.sweep(yield* Clock.currentTimeMillis)
      yield* drain
    }).pipe(
      // Without its sweep the scheduler would place on the dead for ever.
      Effect.catchDefect((error) => Effect.sync(() => console.error(`${link.sender}: sweep: ${error instanceof Error ? error.message : String(error)}`))),
    )
    yield* Effect.forkScoped(Effect.forever(sweep))
    const { leave } = yield* actor(link, [
      onAsk(Place, here(Place.verb), place, { concurrent: true }),
      onTell(Release, here(Release.verb), release),
      onAsk(Configure, here(Configure.verb), configure),
      onTell(Prefilled, here(Prefilled.verb), (key) => Effect.andThen(Effect.sync(() => state.prefilled(key)), drain)),
      onTell(Leave, here(Leave.verb), ({ worker, epoch }) => Effect.sync(() => state.leave(worker, epoch))),
      onTell(Heartbeat, here(Heartbeat.verb), (message) =>
        Effect.gen(function* () {
          const stale = state.heartbeat(message, yield* Clock.currentTimeMillis)
          if (stale) yield* Effect.forkIn(askMissed(message.worker, message.epoch), scope)
          yield* drain
        }),
      ),
      onTell(KvEvents, here(KvEvents.verb), (message) => Effect.suspend(() => (state.kvEvents(message) ? Effect.asVoid(Effect.forkIn(askMissed(message.worker, message.epoch), scope)) : Effect.void))),
    ])
    const stepDown = Effect.gen(function* () {
      leave("everything")
      const asked = waiting
      waiting = []
      for (const entry of asked) yield* settle(entry, new Fault({ code: "stale", message: `${link.sender}: epoch ${link.epoch} is over`, hop: link.sender }))
    })
    yield* Effect.acquireRelease(
      Effect.sync(() => options.members?.onCome((kind, _, epoch) => void (kind === "scheduler" && epoch > link.epoch && Effect.runFork(stepDown)))),
      (stop) => Effect.sync(() => stop?.()),
    )
  })
