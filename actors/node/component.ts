/**
 * The parts that a topology runs: each is the same program whether it shares this process over the memory bus or has one
 * of its own over NATS.
 */
import { availableParallelism } from "node:os"
import { join } from "node:path"
import { Effect, type Scope } from "effect"
import type { Env } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import type { Topology } from "../../config/topology.ts"
import { deviceFacts, numericsVersion, readGguf, type Gguf } from "../../kernels/index.ts"
import type { Buses } from "../runtime/bus.ts"
import { Link } from "../runtime/link.ts"
import { kvFormatId } from "../engine/worker.ts"
import { kvStoreActor, type RunningStore } from "../kv-store/kv-store.ts"
import { announce } from "../presence/announce.ts"
import { Members } from "../presence/members.ts"
import { checkChunkFits } from "../transfer/chunk-limit.ts"
import { ChatTemplate } from "../request/chat-template.ts"
import { requestActor } from "../request/request.ts"
import { Tokenizer } from "../request/tokenizer.ts"
import { isPolicyName } from "../scheduler/policy.ts"
import { schedulerActor } from "../scheduler/scheduler.ts"
import type { ResolvedModel } from "./fetch-model.ts"
import { planKv } from "./kv-plan.ts"
import { worker, WorkerError, type RunningWorker } from "./worker.ts"

export interface Component {
  readonly kind: "kv-store" | "scheduler" | "worker" | "request"
  readonly id: string
}

export interface ComponentContext {
  readonly topology: Topology
  readonly model: ResolvedModel
  /** `namespaceIn` its topology and model. */
  readonly namespace: string
  readonly env: Env
  readonly buses: Buses
  /** The node of a cluster that it is part of. */
  readonly agent?: string | undefined
  /** Called with a worker that serves, where it runs in this process. */
  readonly onWorker?: (running: RunningWorker) => void
}

/** Everything that a topology runs, in the order of starting: what others need comes first. */
export const componentsOf = (topology: Topology): ReadonlyArray<ReadonlyArray<Component>> => {
  const numbered = (kind: Component["kind"], letter: string, count: number): ReadonlyArray<Component> => Array.from({ length: count }, (_, i) => ({ kind, id: `${letter}${i}` }))
  return [
    [...numbered("kv-store", "k", topology.kvStore.replicas), { kind: "scheduler", id: "s0" }],
    topology.workers.map(({ name }) => ({ kind: "worker", id: name })),
    numbered("request", "r", topology.request.replicas),
  ]
}

const attempt = <A>(run: () => A) => Effect.try({ try: run, catch: (error) => new WorkerError(error instanceof Error ? error.message : String(error)) })

/** Runs a component of this epoch until it breaks or the Scope closes; `ready` says that it serves. */
export const runComponent = (component: Component, epoch: number, context: ComponentContext, ready: Effect.Effect<void>): Effect.Effect<never, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const { kind, id } = component
    const { topology, model, namespace, buses } = context
    const link = new Link(buses.control, `${kind} ${id}`, epoch)
    let store: RunningStore | undefined
    if (kind === "worker") return yield* runWorker(id, epoch, context, ready)
    if (kind === "kv-store") {
      const { memory, disk, eviction, replicas } = topology.kvStore
      const folder = join(disk.path === "auto" ? join(context.env.home, "kv", topology.cluster) : disk.path, id)
      const members = replicas > 1 ? yield* Members.listen(buses.control, namespace) : undefined
      store = yield* kvStoreActor({ link, buses, namespace, id, memoryBytes: memory, eviction, members, disk: disk.size > 0 ? { folder, bytes: disk.size } : undefined })
    } else if (kind === "scheduler") {
      const { policy, queue } = topology.scheduler
      if (!isPolicyName(policy)) return yield* Effect.fail(new WorkerError(`scheduler.policy: ${policy} is not available`))
      yield* schedulerActor({ link, namespace, policy, queue, members: yield* Members.listen(buses.control, namespace) })
    } else {
      const gguf = yield* readModel(model)
      const plans = yield* attempt(() => planWorkers(gguf, topology))
      const served = yield* attempt(() => {
        const tokenizer = new Tokenizer(gguf.metadata)
        const template = new ChatTemplate(gguf.metadata, tokenizer)
        const contextTokens = Math.max(...plans.map((plan) => plan.contextTokens))
        return { tokenizer, template, modelDigest: model.sha256, formatId: formatOf(context, Math.max(0, topology.workers.findIndex(({ roles }) => roles.includes("decode")))), blockTokens: topology.workers[0]!.kv.blockTokens, contextTokens, sharesPrefixes: topology.kvStore.shared }
      })
      yield* requestActor({ link, namespace, id, model: served, members: yield* Members.listen(buses.control, namespace) })
    }
    yield* announce({ link, namespace, kind, id, store: store?.figures, agent: context.agent })
    yield* ready
    return yield* Effect.never
  })

/** Most tokens of a sequence in this topology. */
export const contextTokensOf = (context: Pick<ComponentContext, "topology" | "model">): Effect.Effect<number, WorkerError> =>
  Effect.flatMap(readModel(context.model), (gguf) => attempt(() => Math.max(...planWorkers(gguf, context.topology).map(({ contextTokens }) => contextTokens))))

const readModel = (model: ResolvedModel) => Effect.tryPromise({ try: () => readGguf(model.path), catch: (error) => new WorkerError((error as Error).message) })

/** What weights and steps leave of a GPU's memory for KV; all there could be where it is another worker's. */
const gpuBytes = (gguf: Gguf, freeBytes: number | undefined): number => {
  if (freeBytes === undefined) return Number.POSITIVE_INFINITY
  const weightBytes = gguf.tensors.reduce((sum, { bytes }) => sum + bytes, 0)
  return Math.max(0, (freeBytes - weightBytes * limits.gpuWeightShare) * limits.gpuPoolMemoryShare)
}

/** `freeBytes` are those of the GPU of worker `self`. */
const planWorkers = (gguf: Gguf, { workers }: Topology, self?: string, freeBytes?: number) =>
  workers.map(({ name, device, kv, maxBatch }) =>
    planKv(gguf, { ...kv, maxBatch, ...(device === "cpu" ? { freeBytes: process.availableMemory() / workers.length } : { gpu: true, freeBytes: gpuBytes(gguf, name === self ? freeBytes : undefined) }) }),
  )

/** Numerics of a GPU are not those of a CPU: their KV never matches. */
const formatOf = ({ topology, model }: ComponentContext, index: number): string => {
  const { device, kv: { blockTokens, dtype } } = topology.workers[index]!
  return kvFormatId({ modelDigest: model.sha256, dtype, blockTokens, numericsVersion: numericsVersion(), device: device === "cpu" ? "cpu" : "cuda" })
}

const runWorker = (id: string, epoch: number, context: ComponentContext, ready: Effect.Effect<void>) =>
  Effect.gen(function* () {
    const { topology, model, namespace, env, buses } = context
    const index = topology.workers.findIndex(({ name }) => name === id)
    const { roles, maxBatch, threads, kv, device } = topology.workers[index]!
    const gguf = yield* readModel(model)
    const facts = device === "cpu" ? undefined : yield* attempt(() => deviceFacts(device, env.cudaAddon))
    const { blocks, contextTokens, layerBlockBytes } = (yield* attempt(() => planWorkers(gguf, topology, id, facts?.freeBytes)))[index]!
    // KV leaves the process wherever there is a bus to others, at least for the store; in one process, where roles are apart.
    const movesChunks = buses.bulk.name !== "memory" || topology.workers.some((other) => other.roles.length === 1)
    if (movesChunks) yield* attempt(() => checkChunkFits(buses.bulk, { layerBlockBytes, blockTokens: kv.blockTokens }))
    const kernels = {
      path: model.path,
      blocks,
      blockTokens: kv.blockTokens,
      kvDtype: kv.dtype,
      // Every worker of the machine has all cores: the threads of one that is idle cost the others nothing.
      threads: threads === "auto" ? (env.threads ?? availableParallelism()) : threads,
      isa: env.isa,
      maxRows: limits.stepTokens,
      maxOutputs: limits.stepOutputs,
      maxContext: contextTokens,
      device,
      cudaAddon: env.cudaAddon,
    }
    const serving = (running: RunningWorker) => Effect.andThen(Effect.sync(() => context.onWorker?.(running)), ready)
    return yield* worker({ buses, namespace, id, roles, maxBatch, formatId: formatOf(context, index), mixedKv: topology.mixedKv, kernels, agent: context.agent }, epoch, serving)
  })
