/**
 * Brings up what a topology says runs here, but for the gateway, and takes it down in the opposite order. On the memory bus
 * every component shares this process; on NATS each has its own, under a supervisor here.
 */
import { Effect, Exit, Scope } from "effect"
import { readEnv } from "../../config/env.ts"
import type { NatsAddress, Topology } from "../../config/topology.ts"
import type { Bus } from "../runtime/bus.ts"
import { supervise } from "../runtime/supervisor.ts"
import { Members } from "../presence/members.ts"
import { joinNats, openBuses } from "./buses.ts"
import { componentProcess } from "./component-process.ts"
import { componentsOf, contextTokensOf, runComponent, type Component } from "./component.ts"
import type { ResolvedModel } from "./fetch-model.ts"
import { namespaceIn } from "./generation.ts"
import { superviseNatsServer } from "./nats-server.ts"
import { WorkerError, type RunningWorker } from "./worker.ts"

export interface NodeOptions {
  readonly topology: Topology
  readonly model: ResolvedModel
}

export interface RunningNode {
  /** The gateway's connection. */
  readonly bus: Bus
  /** Where its actors speak. */
  readonly namespace: string
  /** Workers in this process, by name; one that is being restarted is the last one that ran. */
  readonly workers: ReadonlyMap<string, RunningWorker>
  /** Who serves, here and in other processes. */
  readonly members: Members
  /** Most tokens of a sequence. */
  readonly contextTokens: number
}

/** Runs a topology's components until the Scope closes. */
export const node = (options: NodeOptions): Effect.Effect<RunningNode, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const { topology, model } = options
    const env = readEnv()
    const namespace = namespaceIn(options)
    const nats = yield* natsAddress(topology)
    const buses = yield* openBuses(topology.cluster)
    if (nats !== undefined) yield* joinNats(buses, topology.cluster, nats)
    const members = yield* Members.listen(buses.control, namespace)
    const workers = new Map<string, RunningWorker>()
    const start = (component: Component) => {
      let epoch = Date.now()
      return supervise(`${component.kind} ${component.id}`, (ready) =>
        nats === undefined
          ? runComponent(component, epoch++, { topology, model, namespace, env, buses, onWorker: (running) => workers.set(component.id, running) }, ready)
          : componentProcess({ component, topology, model, namespace, nats }, ready),
      )
    }
    // All start at once; each stage has a Scope of its own, so that they end one after the other, requests first.
    const stages = yield* Effect.forEach(componentsOf(topology), (components) =>
      Effect.map(Effect.acquireRelease(Scope.make("parallel"), (scope) => Scope.close(scope, Exit.void)), (scope) => ({ scope, components })),
    )
    yield* Effect.forEach(
      stages.flatMap(({ scope, components }) => components.map((component) => ({ scope, component }))),
      ({ scope, component }) => Scope.provide(start(component), scope),
      { concurrency: "unbounded", discard: true },
    )
    yield* members.untilServing(componentsOf(topology).flat())
    return { bus: buses.control, namespace, workers, members, contextTokens: yield* contextTokensOf(options) }
  })

/** The server to connect to: of the topology, or one that is supervised here; undefined on the memory bus. */
const natsAddress = ({ bus }: Topology): Effect.Effect<NatsAddress | undefined, WorkerError, Scope.Scope> => {
  if (bus === "memory") return Effect.succeed(undefined)
  if (!("spawn" in bus.nats)) return Effect.succeed(bus.nats)
  return superviseNatsServer({}).pipe(Effect.mapError((error) => new WorkerError(error.message)))
}
