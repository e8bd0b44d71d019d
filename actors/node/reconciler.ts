/**
 * Makes what runs into what is wanted, and keeps it so: one loop in which the newest wanted topology wins. A step that fails
 * leaves what was done, is named, and is tried again; "done" is said only when a fresh plan has nothing left to do.
 */
import { Deferred, Effect, Exit, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { roles, type Role } from "../../config/topology.ts"
import { Hosting, reasonOf } from "./hosting.ts"
import { changeOf, reported, type Change, type OnChange } from "./change.ts"
import { atOnce, describe, plan, type Step } from "./plan.ts"
import { ServedGenerations, type ServedGeneration } from "./served-generations.ts"
import { type Settings, type System } from "./system.ts"
import type { Uplink } from "./uplink.ts"
import { generationIn, systemOf, type Wanted } from "./wanted.ts"
import { WorkerError } from "./worker.ts"

/** What stands in front of the actors. */
export interface Front {
  /** Sends new requests to this generation. */
  switchTo(generation: ServedGeneration): void
  /** Listens there, and nowhere else any more; open connections stay. */
  listen(at: Settings): Effect.Effect<void, Error>
  /** Resolves when no request runs in a generation any more. */
  untilIdle(generation: string): Effect.Effect<void>
}

export interface ReconcilerOptions {
  readonly uplink: Uplink
  readonly hosting: Hosting
  readonly generations: ServedGenerations
  readonly front: Front
  readonly onChange?: OnChange
}

interface Target {
  readonly wanted: Wanted
  readonly system: System
}

export class Reconciler {
  readonly #options: ReconcilerOptions
  #drained: ReadonlySet<string> = new Set()
  #changes: ReadonlyArray<Change> = []
  #target: Target | undefined
  /** The one that the newest change is about. */
  #changing: Target | undefined
  #newer = Deferred.makeUnsafe<void>()
  #generation: System["generation"]
  #listen: Settings | undefined

  private constructor(options: ReconcilerOptions) {
    this.#options = options
  }

  /**
   * Brings up a first topology; fails where a step of it does. From then on the loop runs until the Scope closes. Without a
   * topology it waits for one, and what runs already stays.
   */
  static readonly start = (options: ReconcilerOptions, wanted: Wanted | undefined): Effect.Effect<Reconciler, WorkerError, Scope.Scope> =>
    Effect.gen(function* () {
      const reconciler = new Reconciler(options)
      if (wanted === undefined) {
        yield* Effect.forkScoped(reconciler.#loop(undefined))
        return reconciler
      }
      reconciler.#target = { wanted, system: systemOf(wanted) }
      const change = yield* reconciler.#settle(reconciler.#target)
      if (change.outcome !== "done") return yield* Effect.fail(new WorkerError(change.error ?? "it could not be started"))
      yield* Effect.forkScoped(reconciler.#loop(reconciler.#target))
      return reconciler
    })

  get actual(): System {
    const { uplink, hosting } = this.#options
    return { bus: uplink.label, generation: this.#generation, components: hosting.components, listen: this.#listen }
  }

  get wanted(): Wanted | undefined {
    return this.#target?.wanted
  }

  get drained(): ReadonlySet<string> {
    return this.#drained
  }

  /** The last ones, newest first. */
  get changes(): ReadonlyArray<Change> {
    return this.#changes
  }

  get state(): "settled" | "changing" | "failed" {
    const outcome = this.#changing === this.#target ? this.#changes[0]?.outcome : "changing"
    return outcome === "done" ? "settled" : outcome === "failed" ? "failed" : "changing"
  }

  /** What would be done for this topology now. */
  planFor(wanted: Wanted): ReadonlyArray<string> {
    return plan(this.actual, systemOf(wanted, this.#drainedIn(wanted))).map(describe)
  }

  /** Wants this from now on; what is under way for an older one is given up at its next step. */
  want(wanted: Wanted): void {
    this.#drained = this.#drainedIn(wanted)
    this.#target = { wanted, system: systemOf(wanted, this.#drained) }
    const newer = this.#newer
    this.#newer = Deferred.makeUnsafe()
    Deferred.doneUnsafe(newer, Exit.void)
  }

  /** A worker keeps its weights and pool, and has no roles until it is undrained or leaves the topology. Throws where it cannot be. */
  drain(name: string, undo = false): void {
    const target = this.#target
    const workers = target?.wanted.topology.workers ?? []
    const worker = workers.find((one) => one.name === name)
    if (target === undefined || worker === undefined) throw new WorkerError(`there is no worker ${name}: ${workers.map((one) => one.name).join(", ")} are in the topology`)
    const others = new Set([...this.#drained].filter((other) => other !== name))
    const drained = undo ? others : new Set([...others, name])
    const lone = worker.roles.find((role) => !workers.some((one) => !drained.has(one.name) && one.roles.includes(role)))
    if (lone !== undefined) throw new WorkerError(`${name} is the only worker that can ${lone}: add another to the topology first`)
    this.#drained = drained
    this.want(target.wanted)
  }

  /** Those that are drained and still there; none where a topology would be left without a role. */
  #drainedIn({ topology: { workers } }: Wanted): ReadonlySet<string> {
    const drained = new Set([...this.#drained].filter((name) => workers.some((worker) => worker.name === name)))
    const isLeft = (role: Role) => workers.some((worker) => !drained.has(worker.name) && worker.roles.includes(role))
    return roles.every(isLeft) ? drained : new Set()
  }

  #loop(settled: Target | undefined): Effect.Effect<never> {
    return Effect.gen({ self: this }, function* () {
      let last = settled
      let retryMs: number = limits.reconcileRetryMs
      for (;;) {
        const newer = this.#newer
        const target = this.#target
        const failed = this.#changes[0]?.outcome === "failed"
        if (target === last) {
          yield* failed ? Effect.ignore(Effect.timeout(Deferred.await(newer), retryMs)) : Deferred.await(newer)
          if (this.#target === last) retryMs = Math.min(retryMs * 2, limits.reconcileRetryMaxMs)
          else retryMs = limits.reconcileRetryMs
        }
        last = this.#target!
        yield* this.#settle(last)
      }
    })
  }

  /** Carries out one plan, and says how it ended. */
  #settle(target: Target): Effect.Effect<Change> {
    return Effect.gen({ self: this }, function* () {
      const newer = this.#newer
      this.#changing = target
      const steps = plan(this.actual, target.system)
      const change = changeOf(steps, target.wanted.revision)
      this.#changes = [change, ...this.#changes].slice(0, limits.topologyChanges)
      const end = (outcome: Change["outcome"], error?: string): Change => {
        change.outcome = outcome
        if (error !== undefined) change.error = error
        this.#options.onChange?.(change)
        return change
      }
      this.#options.onChange?.(change)
      // Another one is an earlier one's, which stays as it was learnt.
      if (target.system.generation?.id === generationIn(target.wanted)) {
        const known = yield* Effect.exit(this.#options.generations.learn(generationIn(target.wanted), target.wanted))
        if (Exit.isFailure(known)) return end("failed", reasonOf(known.cause))
      }
      for (let at = 0; at < steps.length; ) {
        if (this.#target !== target) return end("superseded")
        const many = together(steps, at)
        const outcomes = yield* Effect.forEach(
          steps.slice(at, at + many),
          (step, i) => reported(change, change.steps[at + i]!, this.#carryOut(step, target, newer), this.#options.onChange),
          { concurrency: "unbounded" },
        )
        if (outcomes.includes("given up")) return end("superseded")
        const failed = change.steps.slice(at, at + many).find(({ state }) => state === "failed")
        if (failed !== undefined) return end("failed", `${failed.step}: ${failed.error}`)
        at += many
      }
      if (this.#target !== target) return end("superseded")
      const left = plan(this.actual, target.system)
      if (left.length > 0) return end("failed", `still to do: ${left.map(describe).join("; ")}`)
      yield* this.#options.generations.keep(new Set([...this.actual.components.map(({ generation }) => generation), ...(this.#generation === undefined ? [] : [this.#generation.id])]))
      const current = target.system.generation === undefined ? undefined : this.#options.generations.get(target.system.generation.id)
      if (current !== undefined) {
        if (current.id === generationIn(target.wanted)) this.#options.hosting.follow(current.id, target.wanted)
        this.#options.front.switchTo(current) // its name or its context may be another
        // They serve, and the gateway may still have to hear of the last ones.
        yield* current.members.untilServing(this.actual.components.filter((component) => component.generation === current.id))
      }
      return end("done")
    })
  }

  /** What only waits, or has not begun to serve, is given up for a newer topology; anything else is brought to its end. */
  #carryOut(step: Step, { wanted }: Target, newer: Deferred.Deferred<void>): Effect.Effect<"done" | "given up", Error> {
    const { uplink, hosting, generations, front } = this.#options
    const whole = (work: Effect.Effect<unknown, Error>) => Effect.as(work, "done" as const)
    const unlessNewer = (work: Effect.Effect<unknown, Error>) => Effect.raceFirst(whole(work), Effect.as(Deferred.await(newer), "given up" as const))
    switch (step.type) {
      case "attach-bus":
        return whole(uplink.join(step.bus, wanted.topology))
      case "detach-bus":
        return whole(uplink.leave())
      case "start":
        return unlessNewer(hosting.start(step.component, wanted))
      case "restart":
        return whole(hosting.restart(step.component, wanted))
      case "configure":
        return whole(hosting.configure(step.component, wanted))
      case "drain":
        return unlessNewer(hosting.drain(step.component))
      case "stop":
        return whole(hosting.stop(step.component))
      case "listen":
        return whole(Effect.tap(front.listen(step.listen), () => Effect.sync(() => void (this.#listen = step.listen))))
      case "retire-generation":
        return unlessNewer(Effect.ignore(Effect.timeout(front.untilIdle(step.generation), limits.requestDeadlineMs)))
      case "switch-generation":
        return whole(
          Effect.gen({ self: this }, function* () {
            const generation = generations.get(step.to)
            if (generation === undefined) return yield* Effect.fail(new WorkerError(`generation ${step.to} is not known`))
            yield* generation.members.untilServing(hosting.components.filter((component) => component.generation === step.to))
            front.switchTo(generation)
            this.#generation = { id: step.to, label: step.label }
          }),
        )
    }
  }
}

/** So many of the steps from here on are done at once: their order among themselves says nothing. */
const together = (steps: ReadonlyArray<Step>, from: number): number => {
  const kind = atOnce(steps[from]!)
  if (kind === undefined) return 1
  const end = steps.findIndex((step, i) => i > from && atOnce(step) !== kind)
  return (end === -1 ? steps.length : end) - from
}

