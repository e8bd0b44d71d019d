/**
 * A worker: one device, its weights and KV pool, and the prefill and decode actors over one engine. Both are always there:
 * roles say where the scheduler places, and change while it runs. It runs until its engine breaks; its supervisor then makes a
 * new one under a later epoch.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { Engine as Kernels, type EngineOptions } from "../../kernels/index.ts"
import type { Buses } from "../runtime/bus.ts"
import { Link } from "../runtime/link.ts"
import { Heartbeat, Leave, type HeartbeatMessage, type Role } from "../messages/scheduler.ts"
import { anyId, subject } from "../messages/subjects.ts"
import { MeasuredCosts } from "../cost/measured-costs.ts"
import { announce } from "../presence/announce.ts"
import { Members } from "../presence/members.ts"
import { decodeActor } from "../decode/decode.ts"
import { StoreWriter } from "../decode/store-writer.ts"
import { Engine } from "../engine/engine.ts"
import type { Worker } from "../engine/worker.ts"
import { parking } from "../prefill/parking.ts"
import { prefillActor } from "../prefill/prefill.ts"
import { workerActor } from "../worker/worker-actor.ts"
import { KvEventLog } from "./kv-event-log.ts"

export interface WorkerOptions {
  readonly buses: Buses
  readonly namespace: string
  readonly id: string
  readonly roles: ReadonlyArray<Role>
  readonly maxBatch: number
  readonly formatId: string
  readonly mixedKv: boolean
  readonly kernels: EngineOptions
  /** The node of a cluster that it is part of. */
  readonly agent?: string | undefined
}

/** The worker could not be made: a model that cannot be loaded, memory that is not there. */
export class WorkerError extends Error {
  readonly _tag = "WorkerError"
}

/** What `/actors` and tests see of a running worker. */
export interface RunningWorker {
  readonly worker: Worker
  readonly kernels: Kernels
}

const asError = (error: unknown): WorkerError => new WorkerError(error instanceof Error ? error.message : String(error))

/** Runs a worker of this epoch until it breaks. `serving` is called when its actors listen. */
export const worker = (options: WorkerOptions, epoch: number, serving: (running: RunningWorker) => Effect.Effect<void>): Effect.Effect<never, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const { buses, namespace, id, roles, maxBatch, formatId } = options
    const link = (role: string) => new Link(buses.control, `${role} ${id}`, epoch)
    const kernels = yield* Effect.acquireRelease(Effect.tryPromise({ try: () => Kernels.load(options.kernels), catch: asError }), (loaded) => Effect.promise(() => loaded.close()))
    const device = options.kernels.device ?? "cpu"
    // How much of a GPU is whose is settled now, and for good.
    if (device !== "cpu") process.stderr.write(`worker ${id}: ${kernels.info.device}\n`)
    const events = new KvEventLog()
    const storeWriter = new StoreWriter()
    const costs = new MeasuredCosts()
    const { onPreempt, onReturn } = yield* parking({ link: link("prefill"), buses, namespace, worker: () => made, storeWriter })
    const engine = yield* Effect.acquireRelease(
      Effect.sync(
        () =>
          new Engine(kernels, {
            name: `worker ${id}`,
            maxBatch,
            costs,
            onPreempt,
            onReturn,
            events: {
              stored: (hash, trace, depth) => {
                events.stored(hash)
                storeWriter.stored(hash, trace, depth)
              },
              removed: (hash) => events.removed(hash),
            },
          }),
      ),
      (made) => Effect.promise(() => made.close()),
    )
    const { layers, blockTokens, layerBlockBytes, kvDtype: dtype } = kernels.info
    const made: Worker = {
      id,
      epoch,
      roles,
      engine,
      formatId,
      mixedKv: options.mixedKv,
      kv: { layers, dtype, blockTokens, layerBlockBytes },
      costs,
      receiving: new Map(),
      totals: { completed: 0, failed: 0, fallbacks: 0, bytes: 0, ms: 0 },
    }
    // A worker that only decodes still computes a prompt whose prefill has failed, and every one sends what others ask of its pool.
    yield* prefillActor({ link: link("prefill"), buses, namespace, worker: made, events })
    yield* decodeActor({ link: link("decode"), buses, namespace, worker: made })
    yield* storeWriter.run({ link: link("store-writer"), buses, namespace, worker: made })
    yield* events.run({ link: link("worker"), namespace, worker: id, epoch })

    const scheduler = (verb: string) => subject(namespace, "scheduler", anyId, verb)
    const prefillTokPerS = () => {
      const { prefillTokens, prefillMs } = engine.counters
      return prefillMs === 0 ? undefined : (prefillTokens * 1000) / prefillMs
    }
    const state = (): HeartbeatMessage => {
      const { sequences, waiting } = engine.load
      const load = { sequences, waiting, maxBatch: engine.maxBatch, blocks: engine.blocks.limit, freeBlocks: engine.blocks.available, blockTokens: engine.blockTokens }
      return { worker: id, epoch, roles: [...made.roles], load, prefillTokPerS: prefillTokPerS(), requests: engine.requestIds, nextEventId: events.nextId }
    }
    const beat = Effect.ignore(Effect.suspend(() => link("worker").tell(Heartbeat, scheduler(Heartbeat.verb), state())))
    yield* Effect.addFinalizer(() => Effect.ignore(link("worker").tell(Leave, scheduler(Leave.verb), { worker: id, epoch })))
    // A scheduler that begins knows nobody, and would refuse or misplace what it is asked before the next beat.
    const members = yield* Members.listen(buses.control, namespace)
    yield* Effect.acquireRelease(
      Effect.sync(() => members.onCome((kind) => void (kind === "scheduler" && Effect.runFork(beat)))),
      (stop) => Effect.sync(stop),
    )
    yield* beat
    yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(limits.heartbeatIntervalMs), beat)))
    const announced = yield* announce({
      link: link("worker"),
      namespace,
      kind: "worker",
      id,
      agent: options.agent,
      worker: () => {
        const { sequences, waiting, preemptions } = engine.load
        return {
          roles: [...made.roles],
          device,
          load: { sequences, waiting, maxBatch: engine.maxBatch, preemptions },
          kv: { blocks: engine.blocks.limit, freeBlocks: engine.blocks.available, blockTokens, bytesPerToken: kernels.info.blockBytes / blockTokens, dtype, format: formatId },
          prefillTokPerS: prefillTokPerS(),
          transfers: made.totals,
        }
      },
    })
    const { threads } = kernels.info
    yield* workerActor({ link: link("worker"), namespace, worker: made, loaded: { threads, device }, members, announced: Effect.andThen(beat, announced) })
    yield* serving({ worker: made, kernels })
    return yield* Effect.flatMap(Effect.promise(() => engine.broken), (error) => Effect.fail(asError(error)))
  })
