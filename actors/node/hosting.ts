/**
 * The components that run by this process, embedded or as processes of their own: each in a Scope of its own, under a
 * supervisor that restarts it with what it was told last.
 */
import { Cause, Effect, Exit, Option, Scope } from "effect"
import type { Env } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import { anyId, namespaceOf, subject } from "../messages/subjects.ts"
import { Configure as ConfigureScheduler } from "../messages/scheduler.ts"
import { Configure, Drain, type Drained } from "../messages/worker.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import { Link } from "../runtime/link.ts"
import { supervise } from "../runtime/supervisor.ts"
import type { NatsAddress } from "../../config/topology.ts"
import { AdoptedChild } from "./adopted-child.ts"
import { endProcess, startTimeOf, type ChildRecord, type ChildRecords } from "./child-records.ts"
import { componentProcess } from "./component-process.ts"
import { runComponent } from "./component.ts"
import { isTwiceForAMoment } from "./plan.ts"
import { keyOf, type PlannedComponent } from "./system.ts"
import { topologyOf, type Wanted } from "./wanted.ts"
import { WorkerError, type RunningWorker } from "./worker.ts"

export interface HostingOptions {
  readonly env: Env
  readonly buses: Buses
  /** The server that processes connect to, where there is one now. */
  readonly nats: () => NatsAddress | undefined
  /** On a cluster's node: its name, and where it writes down what it runs, so that a later agent adopts it. */
  readonly node?: { readonly name: string; readonly records: ChildRecords }
}

interface Hosted {
  planned: PlannedComponent
  /** What it was told last, and is told again when it restarts. */
  wanted: Wanted
  readonly scope: Scope.Closeable
  /** Where it is in this process; one that is being restarted is the last one that ran. */
  worker: RunningWorker | undefined
  /** Brings what is written down of its process up to date. */
  recorded?: () => void
}

/** Requests first, so that they end while what they hold can still be freed. */
const stopOrder: ReadonlyArray<PlannedComponent["kind"]> = ["request", "worker", "scheduler", "kv-store"]

export class Hosting {
  readonly #options: HostingOptions
  readonly #hosted = new Map<string, Hosted>()
  /** Started, and not yet in their places: a successor beside what it replaces. */
  readonly #starting = new Set<Hosted>()
  readonly #link: Link

  private constructor(options: HostingOptions) {
    this.#options = options
    this.#link = new Link(options.buses.control, "reconciler", Date.now())
  }

  /** Stops everything, kind by kind, when the Scope closes. */
  static readonly make = (options: HostingOptions): Effect.Effect<Hosting, never, Scope.Scope> =>
    Effect.acquireRelease(
      Effect.sync(() => new Hosting(options)),
      (hosting) => hosting.#stopAll(),
    )

  get components(): ReadonlyArray<PlannedComponent> {
    return Array.from(this.#hosted.values(), ({ planned }) => planned)
  }

  /** Workers of a generation in this process, by name. */
  workers(generation: string): ReadonlyMap<string, RunningWorker> {
    return new Map([...this.#hosted.values()].flatMap(({ planned, worker }) => (worker === undefined || planned.generation !== generation ? [] : [[planned.id, worker] as const])))
  }

  /**
   * Takes over what an earlier agent of this node has left running, and ends what does not answer or does not belong here.
   * Returns the names of what goes on.
   */
  adopt(cluster: string): Effect.Effect<ReadonlyArray<string>> {
    const { node, nats } = this.#options
    const fits = ({ wanted, nats: address }: ChildRecord) => wanted.topology.cluster === cluster && JSON.stringify(address) === JSON.stringify(nats())
    return Effect.map(
      Effect.forEach(
        node?.records.all() ?? [],
        (record) =>
          Effect.gen({ self: this }, function* () {
            const { planned, wanted } = record
            const child = fits(record) && !this.#hosted.has(keyOf(planned)) ? yield* Effect.promise(() => AdoptedChild.adopt(record)) : undefined
            const hosted = child === undefined ? undefined : yield* Effect.option(this.#launch(planned, wanted, child))
            if (hosted !== undefined && Option.isSome(hosted)) {
              this.#hosted.set(keyOf(planned), hosted.value)
              return [`${planned.kind} ${planned.id}`]
            }
            if (hosted === undefined) yield* Effect.promise(() => endProcess(record))
            node?.records.forget(record.pid)
            return []
          }),
        { concurrency: "unbounded" },
      ),
      (names) => names.flat(),
    )
  }

  /** Returns when it serves. Nothing of it is left where it cannot. */
  start(planned: PlannedComponent, wanted: Wanted): Effect.Effect<void, WorkerError> {
    return Effect.map(this.#launch(planned, wanted), (hosted) => void this.#hosted.set(keyOf(planned), hosted))
  }

  stop(planned: PlannedComponent): Effect.Effect<void> {
    return Effect.gen({ self: this }, function* () {
      const hosted = this.#hosted.get(keyOf(planned))
      if (hosted === undefined) return
      yield* this.#end(hosted)
      this.#hosted.delete(keyOf(planned))
    })
  }

  /** As a plan's `restart`: those without anything of their own are there twice for a moment. */
  restart(planned: PlannedComponent, wanted: Wanted): Effect.Effect<void, WorkerError> {
    const old = this.#hosted.get(keyOf(planned))
    if (old === undefined) return this.start(planned, wanted)
    return Effect.gen({ self: this }, function* () {
      if (isTwiceForAMoment(planned)) {
        const next = yield* this.#launch(planned, wanted)
        this.#hosted.set(keyOf(planned), next)
        return yield* this.#end(old)
      }
      // What nobody else can take is not waited for: it goes on when the worker is back.
      const { generation, id } = planned
      const others = this.components.filter((other) => other.kind === "worker" && other.generation === generation && other.id !== id)
      if (others.some(({ roles }) => roles.includes("decode"))) yield* this.drain(old.planned)
      yield* this.#end(old)
      this.#hosted.delete(keyOf(planned))
      yield* this.start(planned, wanted)
    })
  }

  /** Changes roles and live settings of one that runs. */
  configure(planned: PlannedComponent, wanted: Wanted): Effect.Effect<void, WorkerError> {
    const hosted = this.#hosted.get(keyOf(planned))
    if (hosted === undefined) return Effect.fail(new WorkerError(`${planned.kind} ${planned.id} does not run`))
    return Effect.gen({ self: this }, function* () {
      yield* planned.kind === "worker" ? this.#configureWorker(planned, hosted) : this.#configureScheduler(planned, hosted)
      hosted.planned = { ...planned, pool: hosted.planned.pool }
      hosted.wanted = wanted
      hosted.recorded?.()
    }).pipe(Effect.mapError((error) => new WorkerError(error.message)))
  }

  /** Has those of a generation start again, should they have to, as this topology says. */
  follow(generation: string, wanted: Wanted): void {
    for (const hosted of this.#hosted.values()) {
      if (hosted.planned.generation !== generation) continue
      hosted.wanted = wanted
      hosted.recorded?.()
    }
  }

  /** Takes all roles from a worker; what it decodes goes on elsewhere. One that does not answer has nothing that could. */
  drain(planned: PlannedComponent): Effect.Effect<Drained | undefined> {
    return Effect.gen({ self: this }, function* () {
      const hosted = this.#hosted.get(keyOf(planned))
      if (hosted === undefined) return undefined
      hosted.planned = { ...hosted.planned, roles: [] }
      hosted.recorded?.()
      const [hop, deadlineMs] = [`worker ${planned.id}`, limits.drainDeadlineMs]
      const asked = this.#link.ask(Drain, this.#subjectOf(hosted, Drain.verb), { deadlineMs }, { hop, deadlineMs: deadlineMs + limits.askDeadlineMs })
      return yield* Effect.orElseSucceed(asked, () => undefined)
    })
  }

  #subjectOf({ planned: { kind, id, generation }, wanted: { topology } }: Hosted, verb: string): string {
    // Schedulers are asked as one.
    const [to, at] = kind === "worker" ? [kind, id] as const : ["scheduler", anyId] as const
    return subject(namespaceOf(topology.cluster, generation), to, at, verb)
  }

  #configureWorker({ id, roles, live }: PlannedComponent, hosted: Hosted): Effect.Effect<void, Fault | WorkerError> {
    const blocks = live["blocks"] === "auto" ? hosted.planned.pool?.blocks : Number(live["blocks"])
    return Effect.flatMap(
      this.#link.ask(Configure, this.#subjectOf(hosted, Configure.verb), { roles: [...roles], maxBatch: Number(live["maxBatch"]), ...(blocks === undefined ? {} : { blocks }) }, { hop: `worker ${id}` }),
      ({ restart }) => (restart.length === 0 ? Effect.void : Effect.fail(new WorkerError(`worker ${id}: ${restart.join(", ")} cannot be changed while it runs`))),
    )
  }

  #configureScheduler({ id, live }: PlannedComponent, hosted: Hosted): Effect.Effect<void, Fault> {
    return Effect.asVoid(this.#link.ask(ConfigureScheduler, this.#subjectOf(hosted, ConfigureScheduler.verb), { policy: String(live["policy"]), queue: Number(live["queue"]) }, { hop: `scheduler ${id}` }))
  }

  #launch(planned: PlannedComponent, wanted: Wanted, adopted?: AdoptedChild): Effect.Effect<Hosted, WorkerError> {
    return Effect.gen({ self: this }, function* () {
      const hosted: Hosted = { planned, wanted, scope: yield* Scope.make("parallel"), worker: undefined }
      this.#starting.add(hosted)
      const late = new WorkerError(`${planned.kind} ${planned.id} did not serve within ${limits.componentStartDeadlineMs / 1000} s`)
      const started = Scope.provide(this.#supervised(hosted, adopted), hosted.scope).pipe(Effect.timeoutOrElse({ duration: limits.componentStartDeadlineMs, orElse: () => Effect.fail(late) }))
      yield* Effect.onExit(started, (exit) => (Exit.isSuccess(exit) ? Effect.void : this.#end(hosted)))
      this.#starting.delete(hosted)
      return hosted
    })
  }

  #supervised(hosted: Hosted, adopted?: AdoptedChild): Effect.Effect<void, WorkerError, Scope.Scope> {
    const { env, buses, node } = this.#options
    const { kind, id, generation, host } = hosted.planned
    let first = adopted // only once: what follows it is new
    let epoch = Math.max(Date.now(), hosted.wanted.epochs?.[`${kind} ${id}`] ?? 0, adopted?.hello.epoch ?? 0)
    return supervise(`${kind} ${id}`, (ready) => {
      const { planned, wanted } = hosted
      const { model } = wanted
      const topology = topologyOf(wanted.topology, planned)
      const namespace = namespaceOf(topology.cluster, generation)
      const hasPool = (blocks: number | undefined) => {
        if (blocks !== undefined) hosted.planned = { ...hosted.planned, pool: { asked: planned.live["blocks"] ?? "auto", blocks } }
      }
      if (host === "embedded") {
        const onWorker = (running: RunningWorker) => {
          hosted.worker = running
          hasPool(running.kernels.info.blocks)
        }
        return runComponent({ kind, id }, epoch++, { topology, model, namespace, env, buses, onWorker }, ready)
      }
      const nats = this.#options.nats()
      if (nats === undefined) return Effect.fail(new WorkerError(`${kind} ${id}: there is no NATS server to reach it by`))
      const order = { component: { kind, id }, topology, model, namespace, nats, epoch: epoch++ }
      if (node === undefined) return componentProcess(order, ready, { onBlocks: hasPool })
      const { name, records } = node
      const taken = first
      first = undefined
      const control = taken?.control ?? records.newControl()
      return componentProcess({ ...order, agent: name, control }, ready, {
        adopted: taken,
        onBlocks: (blocks) => {
          hasPool(blocks)
          hosted.recorded?.()
        },
        onStarted: (pid) => {
          const startedAt = startTimeOf(pid)
          hosted.recorded = () => void (startedAt !== undefined && records.keep({ pid, startedAt, control, planned: hosted.planned, wanted: hosted.wanted, nats }))
          hosted.recorded()
        },
        onEnded: (pid) => {
          hosted.recorded = undefined
          records.forget(pid)
        },
      })
    })
  }

  /** Frees all it owns, and waits no longer than a shutdown may take. */
  #end(hosted: Hosted): Effect.Effect<void> {
    this.#starting.delete(hosted)
    return Effect.ignore(Effect.timeout(Scope.close(hosted.scope, Exit.void), limits.shutdownDeadlineMs))
  }

  #stopAll(): Effect.Effect<void> {
    const all = [...this.#hosted.values(), ...this.#starting]
    return Effect.forEach(
      stopOrder,
      (kind) => Effect.forEach(all.filter(({ planned }) => planned.kind === kind), (hosted) => this.#end(hosted), { concurrency: "unbounded", discard: true }),
      { discard: true },
    )
  }
}

/** Why a step failed, in its own words. */
export const reasonOf = (cause: Cause.Cause<unknown>): string => {
  const failure = Option.getOrUndefined(Cause.findErrorOption(cause))
  return failure instanceof Error ? failure.message : Cause.pretty(cause)
}
