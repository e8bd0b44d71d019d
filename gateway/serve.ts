/**
 * A topology's actors with the gateway in front of them, in this process, until the Scope closes.
 */
import { Effect, Layer, type Scope } from "effect"
import { readEnv } from "../config/env.ts"
import type { Topology } from "../config/topology.ts"
import { node, type NodeParts, type RunningNode } from "../actors/node/node.ts"
import type { OnChange } from "../actors/node/change.ts"
import type { Front } from "../actors/node/reconciler.ts"
import type { ResolvedModel } from "../actors/node/fetch-model.ts"
import type { WorkerError } from "../actors/node/worker.ts"
import { telemetry } from "../actors/runtime/telemetry.ts"
import { Gateway } from "./gateway.ts"
import type { TopologyAccess } from "./topology-access.ts"

export interface ServeOptions {
  readonly topology: Topology
  readonly model: ResolvedModel
  readonly revision?: string
  /** Where the topology can be read and changed over HTTP. */
  readonly access?: TopologyAccess
  readonly onChange?: OnChange
}

export interface Serving extends RunningNode {
  /** Of the address that it listens at now. */
  readonly url: string
  readonly port: number
}

/** The gateway goes first at the end, and the last spans leave last. */
export const serve = (options: ServeOptions): Effect.Effect<Serving, WorkerError, Scope.Scope> => {
  const { bus, cluster, telemetry: { otlp } } = options.topology
  // On the memory bus every component is in this process.
  const component = bus === "memory" ? { kind: "penstock", id: "up" } : { kind: "gateway", id: "g0" }
  const tracing = Layer.build(telemetry({ endpoint: readEnv().otlpEndpoint ?? otlp ?? undefined, cluster, component }))
  return Effect.flatMap(tracing, (context) => Effect.provideContext(serveTraced(options), context))
}

const serveTraced = ({ topology, model, revision, access, onChange }: ServeOptions): Effect.Effect<Serving, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    let gateway: Gateway | undefined
    const front = (parts: NodeParts) =>
      Effect.map(Gateway.make({ bus: parts.bus, members: () => membersOf(parts), ready: () => readiness(parts, gateway!), ...(access === undefined ? {} : { topology: access }) }), (made) => {
        gateway = made
        return frontOf(made)
      })
    const running = yield* node({ wanted: { topology, model, revision }, front, onChange })
    return {
      ...running,
      get url() {
        return gateway!.address!.url
      },
      get port() {
        return gateway!.address!.port
      },
    }
  })

export const frontOf = (gateway: Gateway): Front & { readonly close: () => Effect.Effect<void> } => ({
  switchTo: ({ id, namespace, model, contextTokens, sinceS }) =>
    gateway.switchTo({ id, namespace, model: { id: model.name, aliases: model.aliases, created: sinceS, ownedBy: "penstock", contextLength: contextTokens, digest: model.sha256 } }),
  listen: ({ host, port, keys }) => gateway.listen({ host: String(host), port: Number(port), keysFile: keys === "none" ? undefined : String(keys) }),
  untilIdle: (generation) => gateway.untilIdle(generation),
  close: () => gateway.close(),
})

export const membersOf = ({ generations }: NodeParts) => generations.all.map(({ id, members }) => ({ generation: id, members: members.all }))

/** Whether everything that new requests need serves: what starts or leaves beside it says nothing. */
const readiness = ({ hosting, generations }: NodeParts, gateway: Gateway): { readonly ready: boolean; readonly reason?: string } => {
  const { generation } = gateway.context
  const serving = new Set(generations.get(generation)?.members.all.map(({ kind, id }) => `${kind} ${id}`))
  const needed = hosting.components.filter((component) => component.generation === generation && component.kind !== "kv-store" && (component.kind !== "worker" || component.roles.length > 0))
  const missing = needed.map(({ kind, id }) => `${kind} ${id}`).filter((name) => !serving.has(name))
  for (const role of ["prefill", "decode"]) if (!needed.some(({ roles }) => roles.some((held) => held === role))) missing.push(`a worker for ${role}`)
  return missing.length === 0 ? { ready: true } : { ready: false, reason: `what does not serve now: ${missing.join(", ")}` }
}
