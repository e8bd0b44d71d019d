/**
 * The commands of an operator of a cluster: apply, status and drain, over NATS.
 */
import { Effect, Exit, Scope } from "effect"
import { setTimeout as sleep } from "node:timers/promises"
import { limits } from "../config/limits.ts"
import { natsOfRole, type NatsAddress } from "../config/topology.ts"
import { ClusterControl, type ClusterStatus, type NodeStatus } from "../actors/cluster/cluster-control.ts"
import { everyGeneration, inboxPrefix, namespaceOf, nodesNamespace, topologyBucket } from "../actors/messages/subjects.ts"
import { Members } from "../actors/presence/members.ts"
import { NatsBucket } from "../actors/runtime/nats-bucket.ts"
import { NatsBus } from "../actors/runtime/nats-bus.ts"

export interface ClusterOptions {
  readonly cluster: string
  readonly nats: NatsAddress
}

const say = (line: string): void => void process.stdout.write(`${line}\n`)

/** Runs with the cluster at hand, every node that lives heard. */
const withCluster = async <A>({ cluster, nats: written }: ClusterOptions, run: (control: ClusterControl) => Promise<A>): Promise<A> => {
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
    return await run(new ClusterControl(cluster, bucket, nodes))
  } finally {
    await Effect.runPromise(Scope.close(scope, Exit.void))
  }
}

export interface ApplyOptions extends ClusterOptions {
  readonly text: string
  readonly path: string
  readonly dryRun: boolean
  /** The revision that it replaces; undefined: whatever is there. */
  readonly ifRevision: number | undefined
}

/** Wants a topology, and tells how far the nodes are until all do it or one cannot. Resolves to the exit code. */
export const applyToCluster = ({ text, path, dryRun, ifRevision, ...options }: ApplyOptions): Promise<number> =>
  withCluster(options, async (control) => {
    const plan = await control.plan(text, path)
    say(["the plan", ...(plan.length === 0 ? ["nothing to change"] : plan).map((line) => `  ${line}`)].join("\n"))
    if (dryRun) return 0
    const revision = await control.want(text, path, ifRevision)
    say(`wanted from now on: revision ${revision}`)
    let last = ""
    for (const endMs = performance.now() + limits.assignmentDeadlineMs; performance.now() < endMs; await sleep(limits.heartbeatIntervalMs)) {
      const status = await control.status()
      if (status.wanted !== undefined && status.wanted.revision > revision) {
        process.stderr.write(`somebody else has applied revision ${status.wanted.revision} meanwhile: that is what the nodes follow now\n`)
        return 1
      }
      if (status.nodes.length === 0) say("no node lives: start one with the command node; it will follow")
      if (status.nodes.length === 0) return 1
      const heard = (node: NodeStatus) => status.assignedRevision === revision && node.follows
      const now = status.nodes.map((node) => `  ${node.name}: ${heard(node) ? node.state : "has not heard of it yet"}${node.detail === undefined ? "" : ` (${node.detail})`}`).join("\n")
      if (now !== last) say(now)
      last = now
      const failed = status.nodes.find((node) => heard(node) && node.state === "failed")
      if (failed !== undefined) {
        process.stderr.write(`failed on ${failed.name}: ${failed.detail}; what is done stays, and it is tried again\n`)
        return 1
      }
      if (!status.settled) continue
      for (const { kind, id, why } of status.unplaceable) process.stderr.write(`unplaceable: ${kind} ${id}: ${why}\n`)
      if (status.unplaceable.length === 0) say("done")
      return status.unplaceable.length === 0 ? 0 : 1
    }
    process.stderr.write(`not done within ${limits.assignmentDeadlineMs / 1000} s; the nodes go on with it: see status\n`)
    return 1
  })

/** Prints what is wanted, and what runs where. Resolves to the exit code: 1 where it is not the same. */
export const showCluster = ({ json, ...options }: ClusterOptions & { readonly json: boolean }): Promise<number> =>
  withCluster(options, async (control) => {
    const status = await control.status()
    if (json) say(JSON.stringify(status))
    else say(linesOf(status).join("\n"))
    return status.settled && status.unplaceable.length === 0 ? 0 : 1
  })

/** Takes a node or a worker out, or back in. */
export const drainInCluster = ({ name, undo, ...options }: ClusterOptions & { readonly name: string; readonly undo: boolean }): Promise<number> =>
  withCluster(options, async (control) => {
    const kind = await control.drain(name, undo)
    say(undo ? `${kind} ${name} is used again` : kind === "node" ? `what runs on node ${name} goes elsewhere; drain ${name} --undo takes it back` : `worker ${name} has no roles from now on; drain ${name} --undo gives them back`)
    return 0
  })

const linesOf = ({ cluster, leader, wanted, assignedRevision, nodes, components, unplaceable, drainedWorkers, settled }: ClusterStatus): ReadonlyArray<string> => {
  const labels = (held: Readonly<Record<string, string>>) => Object.entries(held).map(([name, value]) => `${name}=${value}`).join(",") || "no labels"
  return [
    `cluster ${cluster}: ${wanted === undefined ? "nothing is wanted yet" : `revision ${wanted.revision} of ${wanted.path} is wanted${assignedRevision === wanted.revision ? "" : `, ${assignedRevision ?? "nothing"} is assigned`}`}; ${settled ? "settled" : "changing"}; ${leader === undefined ? "nobody leads" : `${leader} leads`}`,
    ...nodes.map(({ name, machine, pid, cores, labels: held, gateway, state, detail, drained, components: runs }) =>
      [
        `node ${name} (${machine}, process ${pid}, ${cores} cores, ${labels(held)}${gateway === undefined ? "" : `, ${gateway}`}): ${drained ? "drained, " : ""}${state}${detail === undefined ? "" : `: ${detail}`}`,
        ...(runs.length === 0 ? [] : [`  runs ${runs.join(", ")}`]),
      ].join("\n"),
    ),
    ...components.filter(({ kind, id, node }) => !nodes.some(({ name, components: runs }) => name === node && runs.includes(`${kind} ${id}`))).map(({ kind, id, node }) => `${kind} ${id} does not run on ${node} yet`),
    ...drainedWorkers.map((name) => `worker ${name} is drained`),
    ...unplaceable.map(({ kind, id, why }) => `${kind} ${id} cannot be placed: ${why}`),
  ]
}
