/** What `status` prints of workers and changes, whether it is asked over HTTP or over NATS. */
import type { Topology } from "../config/topology.ts"
import type { ChangeSummary } from "../actors/messages/presence.ts"
import type { WorkerStatus } from "./actors-route.ts"
import { table } from "./table.ts"

/** Every worker as it is and as it is wanted, those too that do not run. */
export const workerTable = (workers: ReadonlyArray<WorkerStatus>, topology: Topology | undefined, drained: ReadonlyArray<string>): string => {
  const wanted = new Map(topology?.workers.map(({ name, roles }) => [name, drained.includes(name) ? "none (drained)" : roles.join(", ")]))
  const rows = workers.map(({ name, roles, agent, node, pid, load, kv, generation }) => {
    const used = kv.blocks - kv.freeBlocks
    const share = kv.blocks === 0 ? 0 : Math.round((100 * used) / kv.blocks)
    return [name, roles.join(", ") || "none", wanted.get(name) ?? "to leave", `${agent ?? node} ${pid}`, `${load.sequences} of ${load.maxBatch}`, String(load.waiting), `${used} of ${kv.blocks} (${share} %)`, generation]
  })
  const missing = [...wanted].filter(([name]) => !workers.some((worker) => worker.name === name)).map(([name, roles]) => [name, "does not run", roles, "", "", "", "", ""])
  return table([["worker", "roles", "wanted", "process", "decoding", "waiting", "KV blocks used", "generation"], ...rows, ...missing])
}

/** When, where it is one of several nodes, how it ended, and what it was. */
export const changeLines = (changes: ReadonlyArray<ChangeSummary & { readonly node?: string }>): ReadonlyArray<string> => [
  "last changes",
  ...changes.map(({ at, node, outcome, what }) => `  ${at}  ${node === undefined ? "" : `${node}: `}${outcome}, ${what}`),
]
