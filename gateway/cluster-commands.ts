/**
 * The commands of an operator that change a cluster: apply and drain, over NATS.
 */
import { setTimeout as sleep } from "node:timers/promises"
import { limits } from "../config/limits.ts"
import type { NodeStatus } from "../actors/cluster/cluster-control.ts"
import { withCluster, type ClusterOptions } from "./with-cluster.ts"

const say = (line: string): void => void process.stdout.write(`${line}\n`)

export interface ApplyOptions extends ClusterOptions {
  readonly text: string
  readonly path: string
  readonly dryRun: boolean
  /** The revision that it replaces; undefined: whatever is there. */
  readonly ifRevision: number | undefined
}

/** Wants a topology, and tells how far the nodes are until all do it or one cannot. Resolves to the exit code. */
export const applyToCluster = ({ text, path, dryRun, ifRevision, ...options }: ApplyOptions): Promise<number> =>
  withCluster(options, async ({ control }) => {
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

/** Takes a node or a worker out, or back in. */
export const drainInCluster = ({ name, undo, ...options }: ClusterOptions & { readonly name: string; readonly undo: boolean }): Promise<number> =>
  withCluster(options, async ({ control }) => {
    const { kind, unplaceable } = await control.drain(name, undo)
    say(undo ? `${kind} ${name} is used again` : kind === "node" ? `what runs on node ${name} goes elsewhere; drain ${name} --undo takes it back` : `worker ${name} has no roles from now on; drain ${name} --undo gives them back`)
    for (const { kind: what, id, why } of unplaceable) process.stderr.write(`unplaceable: ${what} ${id}: ${why}\n`)
    return 0
  })
