/**
 * The wanted topology of a cluster, read and changed over HTTP at the gateway of any of its nodes.
 */
import type { Kept } from "../actors/cluster/cluster-keys.ts"
import { clusterKeys } from "../actors/cluster/cluster-keys.ts"
import { ClusterControl, DrainError, WantedConflict } from "../actors/cluster/cluster-control.ts"
import type { AgentParts } from "../actors/cluster/agent.ts"
import type { WantedText } from "../actors/cluster/assignment.ts"
import type { Change } from "../actors/node/change.ts"
import { WorkerError } from "../actors/node/worker.ts"
import { Fault } from "../actors/runtime/fault.ts"
import { StaleRevision, type TopologyAccess } from "./topology-access.ts"

/** @param changes of what this node runs */
export const clusterTopology = (cluster: string, { bucket, nodes, follower }: AgentParts, changes: () => ReadonlyArray<Change>): TopologyAccess => {
  const control = new ClusterControl(cluster, bucket, nodes)
  let wanted: Kept<WantedText> | undefined
  clusterKeys.wanted.watch(bucket, (kept) => (wanted = kept))
  const known = (): Kept<WantedText> => {
    if (wanted === undefined) throw new Fault({ code: "unavailable", message: "the cluster has no topology yet: give it one with penstock apply FILE --nats URL", hop: "cluster" })
    return wanted
  }
  return {
    state: () => {
      const { value, revision } = known()
      const { state, detail } = follower()?.state ?? { state: "waiting", detail: undefined }
      const assignment = follower()?.assignment
      const unplaceable = assignment?.unplaceable.map(({ kind, id, why }) => `${kind} ${id} cannot be placed: ${why}`) ?? []
      const missing = follower()?.missing.map((name) => `${name} is to serve`) ?? []
      return {
        revision: String(revision),
        path: value.path,
        text: value.text,
        topology: control.check(value.text, value.path).topology,
        state: state === "failed" ? "failed" : state === "settled" && assignment?.wantedRevision === revision && missing.length === 0 ? "settled" : "changing",
        plan: [...missing, ...unplaceable],
        changes: changes(),
        drained: assignment?.drained ?? [],
        refused: detail,
      }
    },
    put: async (text, { dryRun, ifRevision }) => {
      const { value, revision } = known()
      const plan = await control.plan(text, value.path)
      if (ifRevision !== undefined && ifRevision !== String(revision)) throw new StaleRevision(String(revision))
      if (dryRun) return { revision: String(revision), plan }
      try {
        return { revision: String(await control.want(text, value.path, ifRevision === undefined ? undefined : Number(ifRevision))), plan }
      } catch (error) {
        throw error instanceof WantedConflict ? new StaleRevision(String(error.current)) : error
      }
    },
    drain: async (name, undo) => {
      try {
        await control.drain(name, undo)
      } catch (error) {
        throw error instanceof DrainError ? new WorkerError(error.message) : error
      }
    },
  }
}
