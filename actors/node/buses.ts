/**
 * The buses of the process that `up` runs in: its gateway and its embedded components speak over them always, whether they
 * are alone or joined to the processes of others over NATS.
 */
import { Effect, type Scope } from "effect"
import { natsOfRole, type NatsAddress } from "../../config/topology.ts"
import { everyGeneration, inboxPrefix, namespaceOf } from "../messages/subjects.ts"
import { BridgeBus } from "../runtime/bridge-bus.ts"
import type { Buses } from "../runtime/bus.ts"
import { connectBuses } from "../runtime/nats-bus.ts"
import { WorkerError } from "./worker.ts"

export interface BridgeBuses extends Buses {
  readonly control: BridgeBus
  readonly bulk: BridgeBus
}

const both = (buses: BridgeBuses, change: (bus: BridgeBus) => Promise<void>) => Promise.all([change(buses.control), change(buses.bulk)])

/** Whom a process is for others: that of `up`, unless it is a node's. */
export interface BusUser {
  readonly kind: "gateway" | "node"
  readonly id: string
}

const upUser: BusUser = { kind: "gateway", id: "g0" }

const inboxes = (cluster: string, { kind, id }: BusUser): string => inboxPrefix(namespaceOf(cluster, everyGeneration), kind, id)

/** Buses of a process that is alone at first, until the Scope closes. */
export const openBuses = (cluster: string, user: BusUser = upUser): Effect.Effect<BridgeBuses, never, Scope.Scope> =>
  Effect.acquireRelease(
    Effect.sync(() => ({ control: new BridgeBus({ inboxPrefix: inboxes(cluster, user) }), bulk: new BridgeBus({ inboxPrefix: inboxes(cluster, user) }) })),
    (buses) => Effect.promise(() => both(buses, (bus) => bus.close())),
  )

/** Joins buses to those of other processes until the Scope closes, which leaves them alone again and closes the connections. */
export const joinNats = (buses: BridgeBuses, cluster: string, nats: NatsAddress, user: BusUser = upUser): Effect.Effect<void, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const attempt = <A>(run: () => Promise<A>) => Effect.tryPromise({ try: run, catch: (error) => new WorkerError(error instanceof Error ? error.message : String(error)) })
    const uplinks = yield* Effect.acquireRelease(
      attempt(() => connectBuses({ ...natsOfRole(nats, user.kind), name: `${user.kind} ${user.id}`, inboxPrefix: inboxes(cluster, user) })),
      ({ control, bulk }) => Effect.promise(() => Promise.all([control.close(), bulk.close()])),
    )
    yield* Effect.addFinalizer(() => Effect.promise(() => both(buses, (bus) => bus.detach())))
    yield* attempt(() => Promise.all([buses.control.attach(uplinks.control), buses.bulk.attach(uplinks.bulk)]))
  })
