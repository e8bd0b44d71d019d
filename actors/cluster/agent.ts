/**
 * A machine as part of a cluster: it says that it is there, runs what the assignment places on it, and leads the cluster when
 * nobody else does.
 */
import { availableParallelism, totalmem } from "node:os"
import { join } from "node:path"
import { Effect, type Scope } from "effect"
import type { Env } from "../../config/env.ts"
import { takeLock } from "../../config/folder-lock.mjs"
import type { TopologyOverrides } from "../../config/load-topology.ts"
import { limits } from "../../config/limits.ts"
import type { ModelSpec } from "../../config/models.ts"
import { natsOfRole, type NatsAddress } from "../../config/topology.ts"
import { everyGeneration, inboxPrefix, namespaceOf, nodesNamespace, topologyBucket } from "../messages/subjects.ts"
import { openBuses } from "../node/buses.ts"
import { ChildRecords } from "../node/child-records.ts"
import { summaryOf, type OnChange } from "../node/change.ts"
import type { ResolvedModel } from "../node/fetch-model.ts"
import { Hosting } from "../node/hosting.ts"
import type { NodeParts } from "../node/node.ts"
import { Reconciler, type Front } from "../node/reconciler.ts"
import { ServedGenerations } from "../node/served-generations.ts"
import { Uplink } from "../node/uplink.ts"
import { busLabel } from "../node/wanted.ts"
import { WorkerError } from "../node/worker.ts"
import { announce } from "../presence/announce.ts"
import { Members } from "../presence/members.ts"
import type { ClusterBucket } from "../runtime/cluster-bucket.ts"
import { Link } from "../runtime/link.ts"
import { NatsBucket } from "../runtime/nats-bucket.ts"
import { clusterKeys } from "./cluster-keys.ts"
import { Follower } from "./follower.ts"
import { leave } from "./leave.ts"
import { leadership } from "./leadership.ts"
import { Lease } from "./lease.ts"
import { until } from "./until.ts"

export interface AgentOptions {
  /** Of this machine in the cluster; no other has it. */
  readonly name: string
  readonly labels: Readonly<Record<string, string>>
  readonly cluster: string
  readonly nats: NatsAddress
  readonly env: Env
  readonly overrides: TopologyOverrides
  readonly fetchModel: (spec: ModelSpec) => Promise<ResolvedModel>
  /** The gateway of this node; undefined: it has none. Closed before anything stops. */
  readonly front: ((parts: AgentParts) => Effect.Effect<AgentFront, never, Scope.Scope>) | undefined
  readonly onChange?: OnChange
  readonly say: (line: string) => void
}

export interface AgentFront extends Front {
  /** Lets no request in any more; returns when the last one has ended. */
  readonly leave: () => Effect.Effect<void>
  readonly close: () => Effect.Effect<void>
  /** Where it answers, once it does. */
  readonly url: () => string | undefined
  /** Those that it sends requests to, or has some in. */
  readonly generations: () => ReadonlyArray<string>
}

export interface AgentParts extends NodeParts {
  readonly bucket: ClusterBucket
  /** The nodes that live. */
  readonly nodes: Members
  /** There once the agent runs. */
  readonly follower: () => Follower | undefined
}

export interface RunningAgent {
  readonly follower: Follower
  readonly reconciler: Reconciler
  readonly adopted: ReadonlyArray<string>
  /** Gives what runs here to other nodes, where there are any; it is to end afterwards. */
  readonly leave: Effect.Effect<void>
}

const noFront: AgentFront = { switchTo: () => {}, listen: () => Effect.void, untilIdle: () => Effect.void, leave: () => Effect.void, close: () => Effect.void, url: () => undefined, generations: () => [] }

const attempt = <A>(run: () => Promise<A>) => Effect.tryPromise({ try: run, catch: (error) => new WorkerError(error instanceof Error ? error.message : String(error)) })

/**
 * Runs until the Scope closes. Its end is written here, from the last to the first: it leads no more, follows no more, says
 * that it leaves, then the gateway, the components kind by kind, NATS, the bucket.
 */
export const agent = (options: AgentOptions): Effect.Effect<RunningAgent, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const { name, cluster, nats, env, say } = options
    const epoch = Date.now()
    const folder = join(env.home, "run", cluster, name)
    yield* Effect.acquireRelease(
      attempt(() => takeLock(join(folder, "lock"), { deadlineMs: limits.agentLockDeadlineMs })),
      (release) => Effect.sync(release),
    )
    const records = yield* Effect.acquireRelease(
      Effect.sync(() => new ChildRecords(folder)),
      (made) => Effect.sync(() => made.close()),
    )
    const bucket = yield* Effect.acquireRelease(
      attempt(() => NatsBucket.connect({ ...natsOfRole(nats, "node"), name: `node ${name}`, bucket: topologyBucket(cluster), inboxPrefix: inboxPrefix(namespaceOf(cluster, everyGeneration), "node", name) })),
      (opened) => Effect.promise(() => opened.close()),
    )
    const user = { kind: options.front === undefined ? ("node" as const) : ("gateway" as const), id: name }
    const buses = yield* openBuses(cluster, user)
    const uplink = yield* Uplink.make(buses, user)
    yield* uplink.join(busLabel({ bus: { nats } })!, { bus: { nats }, cluster })
    const nodes = yield* Members.listen(buses.control, nodesNamespace(cluster), limits.nodeLossMs)
    yield* refuseTwin(nodes, name)
    const generations = yield* ServedGenerations.make(buses.control)
    const hosting = yield* Hosting.make({ env, buses, nats: () => uplink.address, node: { name, records } })
    let follower: Follower | undefined
    const front = options.front === undefined ? noFront : yield* options.front({ bus: buses.control, hosting, generations, bucket, nodes, follower: () => follower })
    yield* Effect.addFinalizer(front.close)
    const adopted = yield* hosting.adopt(cluster)
    if (adopted.length > 0) say(`goes on with what an earlier agent has left: ${adopted.join(", ")}`)
    const { fetchModel, onChange, overrides } = options
    const reconciler = yield* Reconciler.start({ uplink, hosting, generations, front: { ...front, untilIdle: (generation) => until(() => !isUsed(nodes, generation)) }, ...(onChange === undefined ? {} : { onChange }) }, undefined)
    const cores = availableParallelism()
    let leaving = false
    const announced = yield* announce({
      link: new Link(buses.control, `node ${name}`, epoch),
      namespace: nodesNamespace(cluster),
      kind: "node",
      id: name,
      machine: () => ({
        labels: options.labels,
        cores,
        memoryBytes: totalmem(),
        gateway: front.url(),
        generations: front.generations(),
        components: hosting.components.map(({ kind, id, generation }) => ({ kind, id, generation })),
        ...(follower?.state ?? { state: "waiting", revision: 0 }),
        ...(leaving ? { state: "leaving" as const } : {}),
        changes: reconciler.changes.filter(({ steps, error }) => steps.length > 0 || error !== undefined).slice(0, limits.shownChanges).map(summaryOf),
      }),
    })
    follower = yield* Follower.start({ node: name, cluster, gateway: options.front !== undefined, nats, overrides, bucket, bus: buses.control, reconciler, fetchModel, say })
    const lease = new Lease({ bucket, node: name, epoch, leaseMs: limits.leaderLeaseMs, nowMs: () => performance.now() })
    const heardEpoch = ({ kind, id }: { readonly kind: string; readonly id: string }) => follower?.heard.find((said) => said.kind === kind && said.id === id)?.epoch
    yield* leadership({ node: name, bucket, lease, nodes, fetchModel, heardEpoch, say })
    const drained = attempt(() => clusterKeys.drained.read(bucket)).pipe(
      Effect.map(({ value }) => new Set(value?.nodes)),
      Effect.orElseSucceed(() => new Set<string>()),
    )
    const left = leave({ node: name, nodes, drained, announced, runsNothing: () => hosting.components.length === 0, closeFront: Effect.suspend(front.leave) })
    return { follower, reconciler, adopted, leave: Effect.andThen(Effect.sync(() => void (leaving = true)), left) }
  })

/** Whether a gateway of any node sends requests to a generation, or has some in it. */
const isUsed = (nodes: Members, generation: string): boolean => nodes.all.some(({ machine }) => machine?.generations?.includes(generation) === true)

/** Two agents of one name would take each other's components for their own. */
const refuseTwin = (nodes: Members, name: string): Effect.Effect<void, WorkerError> =>
  Effect.gen(function* () {
    yield* Effect.sleep(2 * limits.heartbeatIntervalMs)
    const twin = nodes.all.find(({ id }) => id === name)
    if (twin !== undefined) return yield* Effect.fail(new WorkerError(`the cluster has a node ${name} already (process ${twin.pid} on ${twin.node}): choose another --name, or stop that one`))
  })
