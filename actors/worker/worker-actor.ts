/**
 * The worker actor: owns what may change of a worker while it runs. It takes other roles and bounds, and where it is to decode
 * no more, it gives its generations away, a few at a time, as soon as another worker has room for them. They go on there with the KV
 * that stays in this pool, which others fetch as long as the worker runs.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { actor, onAsk } from "../runtime/actor.ts"
import type { Link } from "../runtime/link.ts"
import type { Role } from "../messages/scheduler.ts"
import { subject } from "../messages/subjects.ts"
import { Configure, Drain, type ConfigureMessage, type Drained, type Setting } from "../messages/worker.ts"
import type { Members } from "../presence/members.ts"
import type { Worker } from "../engine/worker.ts"
import { withRoomElsewhere, type Need } from "./room-elsewhere.ts"

export interface WorkerActorOptions {
  readonly link: Link
  readonly namespace: string
  readonly worker: Worker
  /** What its kernels were loaded with, and only a restart changes. */
  readonly loaded: { readonly threads: number; readonly device: string }
  readonly members: Pick<Members, "all">
  /** Says at once what the worker is now. */
  readonly announced: Effect.Effect<void>
}

const pollMs = 10

/** Answers until the Scope closes; what is decoded here then is given away before anything else ends. */
export const workerActor = (options: WorkerActorOptions): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function* () {
    const { link, namespace, worker, loaded, members, announced } = options
    const { engine } = worker
    let moved = 0
    /** What was given away since others last said what room they have. */
    let lately: ReadonlyArray<Need & { readonly atMs: number }> = []
    /** By when all is to be given away. */
    let untilMs = Number.POSITIVE_INFINITY

    const giveAway = Effect.sync(() => {
      if (worker.roles.includes("decode")) return
      const nowMs = performance.now()
      // Who waits no longer goes where there may be no room yet, and waits there.
      lately = nowMs >= untilMs ? [] : lately.filter(({ atMs }) => nowMs - atMs < limits.heartbeatIntervalMs)
      // Those that were given away last have the way of their KV for themselves.
      if (engine.isSending && lately.some(({ atMs }) => nowMs - atMs < limits.movedKvMs)) return
      const waiting = engine.decoding
      const together = Math.max(limits.movesAtOnce, Math.ceil((waiting.length * limits.movedKvMs) / Math.max(1, untilMs - nowMs)))
      const going = withRoomElsewhere([...lately, ...waiting], members.all, worker).filter((need) => "id" in need).slice(0, together)
      for (const { id } of going) engine.cancel(id, { code: "moved", message: "decodes no more" })
      lately = [...lately, ...going.map(({ choices, blocks }) => ({ choices, blocks, atMs: nowMs }))]
      moved += going.length
    })
    const change = (roles: ReadonlyArray<Role>, deadlineMs: number = limits.drainDeadlineMs) =>
      Effect.suspend(() => {
        worker.roles = roles
        const nowMs = performance.now()
        untilMs = Math.min(untilMs > nowMs ? untilMs : Number.POSITIVE_INFINITY, nowMs + deadlineMs / 2)
        // Whoever places again what is given away has to know that it is not here.
        return Effect.andThen(announced, giveAway)
      })

    const configure = ({ roles, maxBatch, blocks, threads, device }: ConfigureMessage) =>
      Effect.suspend(() => {
        const wants = <A>(wanted: A | undefined, has: A) => wanted !== undefined && wanted !== has
        const applied: Array<Setting> = []
        const restart: Array<Setting> = []
        if (wants(threads, loaded.threads)) restart.push("threads")
        if (wants(device, loaded.device)) restart.push("device")
        if (blocks !== undefined && blocks > engine.blocks.total) restart.push("blocks")
        else if (wants(blocks, engine.blocks.limit)) applied.push("blocks")
        if (wants(maxBatch, engine.maxBatch)) applied.push("maxBatch")
        if (roles !== undefined && (roles.length !== worker.roles.length || !roles.every((role) => worker.roles.includes(role)))) applied.push("roles")
        engine.resize({ maxBatch, blocks: restart.includes("blocks") ? undefined : blocks })
        return Effect.as(applied.length === 0 ? Effect.void : change(applied.includes("roles") ? roles! : worker.roles), { applied, restart })
      })

    /** Until nothing runs, and those who have taken over have had the time to fetch their KV. */
    const idle = Effect.gen(function* () {
      let quietMs = 0
      while (engine.requestIds.length > 0 || quietMs < (moved > 0 ? limits.movedKvMs : 0)) {
        yield* Effect.sleep(pollMs)
        quietMs = engine.requestIds.length > 0 || engine.isSending ? 0 : quietMs + pollMs
      }
    })
    const drain = (deadlineMs: number) =>
      Effect.gen(function* () {
        const [running, movedBefore] = [engine.requestIds.length, moved]
        yield* change([], deadlineMs)
        yield* Effect.timeoutOrElse(idle, { duration: deadlineMs, orElse: () => Effect.void })
        const [left, gone] = [engine.requestIds.length, moved - movedBefore]
        return { moved: gone, finished: Math.max(0, running - gone - left), left } satisfies Drained
      })

    const here = (verb: string) => [{ subject: subject(namespace, "worker", worker.id, verb) }]
    yield* actor(link, [onAsk(Configure, here(Configure.verb), configure), onAsk(Drain, here(Drain.verb), ({ deadlineMs }) => drain(deadlineMs), { concurrent: true })])
    yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(limits.moveSpacingMs), giveAway)))
    yield* Effect.addFinalizer(() => drain(limits.leaveDeadlineMs))
  })
