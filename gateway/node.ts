/**
 * The command `node`: this machine as part of a cluster, with a gateway where it is asked for, until a signal.
 */
import { Effect } from "effect"
import { readEnv } from "../config/env.ts"
import { agent, type AgentFront, type AgentOptions, type AgentParts } from "../actors/cluster/agent.ts"
import type { Change } from "../actors/node/change.ts"
import { telemetry } from "../actors/runtime/telemetry.ts"
import { clusterTopology } from "./cluster-topology.ts"
import { Gateway } from "./gateway.ts"
import { printedChanges } from "./printed-changes.ts"
import { frontOf, membersOf } from "./serve.ts"
import { untilSignalled } from "./until-signalled.ts"

const say = (line: string): void => void process.stdout.write(`${line}\n`)

export interface NodeCommand extends Omit<AgentOptions, "front" | "say" | "onChange"> {
  readonly gateway: boolean
}

const gatewayOf = (cluster: string, changes: () => ReadonlyArray<Change>) => (parts: AgentParts): ReturnType<NonNullable<AgentOptions["front"]>> =>
  Effect.map(
    Gateway.make({ bus: parts.bus, members: () => membersOf(parts), ready: () => readiness(parts), topology: clusterTopology(cluster, parts, changes) }),
    (gateway): AgentFront => ({ ...frontOf(gateway), leave: () => gateway.leave(), generations: () => gateway.generations, url: () => gateway.address?.url }),
  )

/** Whether what requests need serves, on whatever node. */
const readiness = ({ follower }: AgentParts): { readonly ready: boolean; readonly reason?: string } => {
  const running = follower()
  const unplaceable = running?.assignment?.unplaceable.map(({ kind, id }) => `${kind} ${id}`) ?? []
  const missing = [...(running?.missing ?? ["a topology"]), ...unplaceable].filter((name) => !name.startsWith("kv-store "))
  return missing.length === 0 ? { ready: true } : { ready: false, reason: `what does not serve now: ${missing.join(", ")}` }
}

/** Resolves to the exit code. */
export const runNode = ({ gateway, ...options }: NodeCommand): Promise<number> => {
  const { name, cluster } = options
  const tracing = telemetry({ endpoint: readEnv().otlpEndpoint, cluster, component: { kind: "node", id: name } })
  let leave: Effect.Effect<void> = Effect.void
  let changes: () => ReadonlyArray<Change> = () => []
  const main = Effect.gen(function* () {
    const running = yield* agent({ ...options, front: gateway ? gatewayOf(cluster, () => changes()) : undefined, onChange: printedChanges(`node ${name}`, true), say })
    changes = () => running.reconciler.changes
    leave = running.leave
    say(`node ${name} is part of the cluster ${cluster}; stop with Ctrl-C`)
    return yield* Effect.never
  })
  return untilSignalled(Effect.provide(main, tracing), Effect.suspend(() => leave))
}
