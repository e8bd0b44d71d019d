/**
 * A topology with its model, and the system that it wants.
 */
import { basename } from "node:path"
import type { Topology } from "../../config/topology.ts"
import { componentsOf } from "./component.ts"
import type { ResolvedModel } from "./fetch-model.ts"
import { generationOf } from "./generation.ts"
import { type PlannedComponent, type Settings, type System } from "./system.ts"

export interface Wanted {
  readonly topology: Topology
  readonly model: ResolvedModel
  /** Names the text that it was read from, where there is one. */
  readonly revision?: string | undefined
  /** On a cluster: what of the whole system this process runs, and when. */
  readonly part?: (whole: System) => System
  /** On a cluster: the least epoch of a component, by kind and id. */
  readonly epochs?: Readonly<Record<string, number>>
}

/** How people read where the bus is; the same for the same server, asked in the same way. */
export const busLabel = ({ bus }: Pick<Topology, "bus">): string | undefined => {
  if (bus === "memory") return undefined
  if ("spawn" in bus.nats) return "a nats-server of its own"
  const { url, tls, ...files } = bus.nats
  const asked = Object.entries({ ...files, ...tls }).flatMap(([name, path]) => (path === undefined ? [] : [`${name} ${basename(path)}`]))
  return [url, ...asked].join(", ")
}

/** @param drained workers that shall have no roles, whatever the topology says */
export const systemOf = ({ topology, model, part = (whole) => whole }: Wanted, drained: ReadonlySet<string> = new Set()): System => {
  const { workers, scheduler, kvStore, gateway } = topology
  const { dtype, blockTokens } = workers[0]!.kv
  const generation = generationOf({ modelDigest: model.sha256, dtype, blockTokens })
  const bus = busLabel(topology)
  const settings = (kind: PlannedComponent["kind"], id: string): Pick<PlannedComponent, "roles" | "live" | "fixed"> => {
    const worker = kind === "worker" ? workers.find(({ name }) => name === id) : undefined
    if (worker !== undefined) {
      const { roles, maxBatch, kv, device, threads } = worker
      return { roles: drained.has(id) ? [] : roles, live: { maxBatch, blocks: kv.blocks }, fixed: { device, threads } }
    }
    if (kind === "scheduler") return { roles: [], live: { policy: scheduler.policy, queue: scheduler.queue, admission: scheduler.admission }, fixed: {} }
    const { memory, disk, eviction, replicas, shared } = kvStore
    if (kind === "request") return { roles: [], live: {}, fixed: { ...poolsOf(topology), prefixes: shared ? "shared" : "of each tenant" } }
    return { roles: [], live: {}, fixed: { memory, disk: disk.size, path: disk.path, eviction, peers: replicas > 1 ? "others" : "none" } }
  }
  return part({
    bus,
    generation: { id: generation, label: `${model.name} (KV in ${dtype}, blocks of ${blockTokens} tokens)` },
    listen: { host: gateway.host, port: gateway.port, keys: gateway.keys ?? "none" },
    components: componentsOf(topology)
      .flat()
      .map(({ kind, id }) => ({ generation, kind, id, host: bus === undefined ? "embedded" : "process", ...settings(kind, id) })),
  })
}

/** What a request actor refuses as too long depends on it. */
const poolsOf = ({ workers }: Topology): Settings => {
  const sizes = workers.map(({ kv }) => kv.blocks)
  return { "largest pool": sizes.includes("auto") ? "auto" : Math.max(...sizes.map(Number)) }
}

/** The generation that a topology makes with its model, whatever part of it runs here. */
export const generationIn = ({ topology, model }: Wanted): string => {
  const { dtype, blockTokens } = topology.workers[0]!.kv
  return generationOf({ modelDigest: model.sha256, dtype, blockTokens })
}

/** What a component is told to run: the topology with what was changed since, or is drained. */
export const topologyOf = (topology: Topology, planned: PlannedComponent): Topology => ({
  ...topology,
  workers: topology.workers.map((worker) =>
    planned.kind === "worker" && worker.name === planned.id
      ? { ...worker, roles: planned.roles, maxBatch: Number(planned.live["maxBatch"]), kv: { ...worker.kv, blocks: planned.live["blocks"] === "auto" ? "auto" : Number(planned.live["blocks"]) } }
      : worker,
  ),
})

/** Why a running system cannot become this one, by key: these hold for as long as the process does. */
export const fixedFor = (running: Topology, next: Topology): ReadonlyArray<string> => [
  ...(running.cluster === next.cluster ? [] : [`cluster: is ${running.cluster} for as long as this process runs: write that, or stop it and start it with ${next.cluster}`]),
  ...(running.telemetry.otlp === next.telemetry.otlp ? [] : [`telemetry.otlp: is ${running.telemetry.otlp ?? "null"} for as long as this process runs: write that, or stop it and start it again`]),
]

