/** The disaggregated topology in this process, on a memory bus of the test's: prefill here, decode there, KV in between. */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Deferred, Effect, Exit, Scope } from "effect"
import { componentsOf, runComponent, type ComponentContext } from "../../actors/node/component.ts"
import type { RunningWorker } from "../../actors/node/worker.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { readEnv } from "../../config/env.ts"
import { loadTopology } from "../../config/load-topology.ts"
import type { Engine as Kernels, KvDtype } from "../../kernels/index.ts"
import { Cluster } from "./cluster.ts"
import { FaultyBus, type FaultyBusOptions } from "./faulty-bus.ts"
import { writeTinyModel, type TinyModelOptions } from "./tiny-model.ts"

export interface PairOptions extends FaultyBusOptions {
  readonly tiny?: TinyModelOptions
  /** Blocks of each pool. */
  readonly blocks?: number
  readonly dtype?: KvDtype
  /** KV stores; one where absent. */
  readonly stores?: number
  /** Digest of the model as the prefill worker sees it. */
  readonly prefillDigest?: string
  /** KV goes over the bus, as between processes, and not from pool to pool. */
  readonly apart?: boolean
}

export interface StartedPair {
  readonly bus: FaultyBus
  readonly memory: MemoryBus
  readonly namespace: string
  readonly cluster: Cluster
  readonly prefill: RunningWorker
  readonly decode: RunningWorker
  stop(): Promise<void>
}

const copiesFromNobody = (_from: object): _from is Kernels => false

export const startPair = async (options: PairOptions): Promise<StartedPair> => {
  const folder = mkdtempSync(join(tmpdir(), "penstock-pair-"))
  const path = join(folder, "tiny.gguf")
  await writeTinyModel(path, options.tiny)
  const preset = loadTopology("config/topologies/disaggregated.yaml", { host: "127.0.0.1", port: 0 }).topology
  const workers = preset.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: options.blocks ?? 256, dtype: options.dtype ?? "f16" } }))
  const memory = new MemoryBus()
  const bus = new FaultyBus(memory, options)
  const running = new Map<string, RunningWorker>()
  const scope = Effect.runSync(Scope.make())
  const digest = "0".repeat(64)
  const namespace = "main.test"
  const kvStore = { ...preset.kvStore, replicas: options.stores ?? 1, disk: { path: join(folder, "kv"), size: 2 ** 30 } }
  for (const component of componentsOf({ ...preset, kvStore }).flat()) {
    const context: ComponentContext = {
      topology: { ...preset, workers, bus: "memory", kvStore },
      model: { name: "tiny", aliases: [], path, sha256: component.id === "p0" ? (options.prefillDigest ?? digest) : digest },
      namespace,
      env: readEnv(),
      buses: { control: bus, bulk: bus },
      onWorker: (worker) => {
        if (options.apart === true) worker.kernels.canCopy = copiesFromNobody
        running.set(component.id, worker)
      },
    }
    const ready = Deferred.makeUnsafe<void>()
    const run = runComponent(component, 1, context, Effect.asVoid(Deferred.succeed(ready, undefined)))
    await Effect.runPromise(Scope.provide(Effect.andThen(Effect.forkScoped(run), Effect.raceFirst(Deferred.await(ready), Effect.never)), scope))
  }
  const stop = async () => {
    await Effect.runPromise(Scope.close(scope, Exit.void))
    await bus.close()
    rmSync(folder, { recursive: true, force: true })
  }
  return { bus, memory, namespace, cluster: new Cluster({ bus, namespace, workers: running, stop }), prefill: running.get("p0")!, decode: running.get("d0")!, stop }
}
