/**
 * Brings up what a topology says runs here, but for the gateway: store and scheduler first, then workers and request
 * actors; down in the opposite order, each when its Scope closes.
 */
import { availableParallelism } from "node:os"
import { Effect, type Scope } from "effect"
import { readEnv } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import type { Topology } from "../../config/topology.ts"
import { numericsVersion, readGguf } from "../../kernels/index.ts"
import type { Bus } from "../runtime/bus.ts"
import { Link } from "../runtime/link.ts"
import { MemoryBus } from "../runtime/memory-bus.ts"
import { supervise } from "../runtime/supervisor.ts"
import { kvFormatId } from "../engine/worker.ts"
import { kvStoreActor } from "../kv-store/kv-store.ts"
import { ChatTemplate } from "../request/chat-template.ts"
import type { ServedModel } from "../request/prepare.ts"
import { requestActor } from "../request/request.ts"
import { Tokenizer } from "../request/tokenizer.ts"
import { isPolicyName } from "../scheduler/policy.ts"
import { schedulerActor } from "../scheduler/scheduler.ts"
import type { ResolvedModel } from "./fetch-model.ts"
import { planKv } from "./kv-plan.ts"
import { worker, WorkerError, type RunningWorker } from "./worker.ts"

export interface NodeOptions {
  readonly topology: Topology
  readonly model: ResolvedModel
}

export interface RunningNode {
  readonly bus: Bus
  /** By name; a worker that is being restarted is the last one that ran. */
  readonly workers: ReadonlyMap<string, RunningWorker>
  /** Most tokens of a sequence. */
  readonly contextTokens: number
}

/** Runs a topology's actors until the Scope closes. */
export const node = (options: NodeOptions): Effect.Effect<RunningNode, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const { topology, model } = options
    const { cluster } = topology
    const env = readEnv()
    const bus = yield* Effect.acquireRelease(Effect.sync(() => new MemoryBus()), (made) => Effect.promise(() => made.close()))
    const link = (sender: string) => new Link(bus, sender, Date.now())
    const attempt = <A>(run: () => A) => Effect.try({ try: run, catch: (error) => new WorkerError(error instanceof Error ? error.message : String(error)) })

    const { policy } = topology.scheduler
    if (!isPolicyName(policy)) return yield* Effect.fail(new WorkerError(`scheduler.policy: ${policy} is not available`))
    yield* kvStoreActor({ link: link("kv-store k0"), cluster, id: "k0", memoryBytes: topology.kvStore.memory })
    yield* schedulerActor({ link: link("scheduler s0"), cluster, policy, queue: topology.scheduler.queue })

    const gguf = yield* Effect.tryPromise({ try: () => readGguf(model.path), catch: (error) => new WorkerError((error as Error).message) })
    const running = new Map<string, RunningWorker>()
    const share = topology.workers.length
    const threads = env.threads ?? Math.max(1, Math.floor(availableParallelism() / share))
    const { blockTokens, dtype } = topology.workers[0]!.kv
    const formatId = kvFormatId({ modelDigest: model.sha256, dtype, blockTokens, numericsVersion: numericsVersion(), device: "cpu" })
    const plans = yield* attempt(() =>
      topology.workers.map(({ kv, maxBatch }) => planKv(gguf, { blocks: kv.blocks, blockTokens: kv.blockTokens, maxBatch, freeBytes: process.availableMemory() / share })),
    )
    const startWorkers = Effect.forEach(
      topology.workers,
      ({ name, roles, maxBatch, threads: wanted }, index) => {
        let epoch = Date.now()
        const { blocks, contextTokens } = plans[index]!
        const kernels = {
          path: model.path,
          blocks,
          blockTokens,
          threads: wanted === "auto" ? threads : wanted,
          isa: env.isa,
          maxRows: limits.stepTokens,
          maxOutputs: limits.stepOutputs,
          maxContext: contextTokens,
        }
        return supervise(`worker ${name}`, (ready) =>
          worker({ bus, cluster, id: name, roles, maxBatch, formatId, kernels }, epoch++, (made) => Effect.andThen(Effect.sync(() => running.set(name, made)), ready)),
        )
      },
      { concurrency: "unbounded", discard: true },
    )
    // The tokenizer is built here while the weights are loaded and repacked off this thread.
    const makeModel = attempt((): ServedModel => {
      const tokenizer = new Tokenizer(gguf.metadata)
      const template = new ChatTemplate(gguf.metadata, tokenizer)
      const contextTokens = Math.max(...plans.map((plan) => plan.contextTokens))
      return { tokenizer, template, modelDigest: model.sha256, formatId, blockTokens, contextTokens }
    })
    const [, served] = yield* Effect.all([startWorkers, Effect.andThen(Effect.sleep(1), makeModel)], { concurrency: "unbounded" })
    yield* requestActor({ link: link("request r0"), cluster, id: "r0", model: served })
    return { bus, workers: running, contextTokens: served.contextTokens }
  })
