/** The command `status` of a cluster: what is wanted, and what runs where. */
import { Effect } from "effect"
import type { ClusterStatus } from "../actors/cluster/cluster-control.ts"
import { namespaceOf } from "../actors/messages/subjects.ts"
import { Members } from "../actors/presence/members.ts"
import { workersOf, type Present } from "./actors-route.ts"
import { changeLines, workerTable } from "./status-lines.ts"
import { withCluster, type ClusterOptions, type ReachedCluster } from "./with-cluster.ts"

const say = (line: string): void => void process.stdout.write(`${line}\n`)

/** Prints what is wanted, and what runs where. Resolves to the exit code: 1 where it is not the same. */
export const showCluster = ({ json, ...options }: ClusterOptions & { readonly json: boolean }): Promise<number> =>
  withCluster(options, async (reached) => {
    const workers = workersOf(await Effect.runPromise(whoServes(options.cluster, reached)))
    const status = await reached.control.status()
    if (json) say(JSON.stringify({ ...status, workers }))
    else say([...clusterLines(status), "", workerTable(workers, topologyOf(reached, status), status.drainedWorkers), "", ...changeLines(status.changes)].join("\n"))
    return status.settled && status.unplaceable.length === 0 ? 0 : 1
  })

/** What serves in the generations that some node runs a part of, as it says itself. */
const whoServes = (cluster: string, { bus, nodes }: ReachedCluster): Effect.Effect<ReadonlyArray<Present>> => {
  const running = nodes.all.flatMap(({ machine }) => machine?.components ?? [])
  const servesIn = (generation: string) =>
    Effect.gen(function* () {
      const members = yield* Members.listen(bus, namespaceOf(cluster, generation))
      yield* members.untilServing(running.filter((component) => component.generation === generation))
      return members.all.map((member): Present => ({ ...member, generation }))
    })
  const generations = [...new Set(running.map(({ generation }) => generation))]
  return Effect.map(Effect.forEach(generations, (generation) => Effect.scoped(servesIn(generation)), { concurrency: "unbounded" }), (members) => members.flat())
}

/** Undefined where this version cannot read what another one has applied: the rest is shown. */
const topologyOf = ({ control }: ReachedCluster, { wanted }: ClusterStatus) => {
  try {
    return wanted === undefined ? undefined : control.check(wanted.text, wanted.path).topology
  } catch {
    return undefined
  }
}

const stateOf = (wanted: ClusterStatus["wanted"], unplaceable: ClusterStatus["unplaceable"], settled: boolean): string => {
  if (wanted === undefined) return "waiting for the first apply"
  if (!settled) return "changing"
  return unplaceable.length === 0 ? "settled" : `settled, but ${unplaceable.length} without a place`
}

const clusterLines = ({ cluster, leader, wanted, assignedRevision, nodes, components, unplaceable, drainedWorkers, settled }: ClusterStatus): ReadonlyArray<string> => {
  const labels = (held: Readonly<Record<string, string>>) => Object.entries(held).map(([name, value]) => `${name}=${value}`).join(",") || "no labels"
  return [
    `cluster ${cluster}: ${wanted === undefined ? "nothing is wanted yet" : `revision ${wanted.revision} of ${wanted.path} is wanted${assignedRevision === wanted.revision ? "" : `, ${assignedRevision ?? "nothing"} is assigned`}`}; ${stateOf(wanted, unplaceable, settled)}; ${leader === undefined ? "nobody leads" : `${leader} leads`}`,
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
