/** How a command of an operator reaches a cluster, over NATS. */
import { Effect, Exit, Scope } from "effect"
import { setTimeout as sleep } from "node:timers/promises"
import { limits } from "../config/limits.ts"
import { natsOfRole, type NatsAddress } from "../config/topology.ts"
import { ClusterControl } from "../actors/cluster/cluster-control.ts"
import { everyGeneration, inboxPrefix, namespaceOf, nodesNamespace, topologyBucket } from "../actors/messages/subjects.ts"
import { Members } from "../actors/presence/members.ts"
import type { Bus } from "../actors/runtime/bus.ts"
import { NatsBucket } from "../actors/runtime/nats-bucket.ts"
import { NatsBus } from "../actors/runtime/nats-bus.ts"

export interface ClusterOptions {
  readonly cluster: string
  readonly nats: NatsAddress
}

export interface ReachedCluster {
  readonly control: ClusterControl
  readonly bus: Bus
  /** Those that live. */
  readonly nodes: Members
}

/** Runs with the cluster at hand, every node that lives heard. */
export const withCluster = async <A>({ cluster, nats: written }: ClusterOptions, run: (reached: ReachedCluster) => Promise<A>): Promise<A> => {
  const scope = Effect.runSync(Scope.make())
  const name = `operator ${process.pid}`
  const inbox = inboxPrefix(namespaceOf(cluster, everyGeneration), "node", `operator-${process.pid}`)
  const nats = natsOfRole(written, "node") // who operates a cluster may do what its nodes may
  const acquire = <R>(open: () => Promise<R>, close: (opened: R) => Promise<void>) =>
    Effect.runPromise(Scope.provide(Effect.acquireRelease(Effect.tryPromise({ try: open, catch: (error) => error as Error }), (opened) => Effect.promise(() => close(opened))), scope))
  try {
    const bucket = await acquire(() => NatsBucket.connect({ ...nats, name, bucket: topologyBucket(cluster), inboxPrefix: inbox }), (opened) => opened.close())
    const bus = await acquire(() => NatsBus.connect({ ...nats, name, inboxPrefix: inbox }), (opened) => opened.close())
    const nodes = await Effect.runPromise(Scope.provide(Members.listen(bus, nodesNamespace(cluster), limits.nodeLossMs), scope))
    await sleep(2 * limits.heartbeatIntervalMs)
    return await run({ control: new ClusterControl(cluster, bucket, nodes), bus, nodes })
  } finally {
    await Effect.runPromise(Scope.close(scope, Exit.void))
  }
}
