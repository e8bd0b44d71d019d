/**
 * The command `up`: a topology's actors and the gateway in front of them, in this process, until a signal. It follows the file.
 */
import { Effect } from "effect"
import { basename, relative } from "node:path"
import type { LoadedTopology, TopologyOverrides } from "../config/load-topology.ts"
import type { ModelSpec } from "../config/models.ts"
import type { ResolvedModel } from "../actors/node/fetch-model.ts"
import type { RunningWorker } from "../actors/node/worker.ts"
import { printedChanges } from "./printed-changes.ts"
import { serve } from "./serve.ts"
import { TopologyFile } from "./topology-file.ts"
import { untilSignalled } from "./until-signalled.ts"

export interface UpOptions {
  readonly loaded: LoadedTopology
  readonly overrides: TopologyOverrides
  readonly fetchModel: (spec: ModelSpec) => Promise<ResolvedModel>
}

const say = (line: string): void => void process.stdout.write(`${line}\n`)

/** What the workers of this process run on; those of others say it at /actors. */
const details = (workers: ReadonlyMap<string, RunningWorker>): string => {
  const [first] = workers.values()
  if (first === undefined) return ""
  const { isa, threads, blocks, blockTokens, blockBytes } = first.kernels.info
  const each = workers.size > 1 ? " in each worker" : ""
  return ` (${isa}; ${threads} threads and KV for ${blocks * blockTokens} tokens, at most ${((blocks * blockBytes) / 2 ** 30).toFixed(1)} GiB,${each || " in its worker"})`
}

/** Runs until SIGINT, SIGTERM or SIGHUP, which may come while it still starts, and resolves to the exit code after an orderly shutdown. */
export const up = async ({ loaded, overrides, fetchModel }: UpOptions): Promise<number> => {
  const startedAtMs = performance.now() - process.uptime() * 1000
  const file = new TopologyFile({ loaded, overrides, fetchModel, say })
  const main = Effect.gen(function* () {
    const model = yield* Effect.tryPromise({ try: () => fetchModel(loaded.model), catch: (error) => error as Error })
    const serving = yield* serve({ topology: loaded.topology, model, revision: loaded.revision, access: file.access, onChange: printedChanges(basename(loaded.path)) })
    const generation = serving.reconciler.actual.generation?.id ?? ""
    yield* file.follow(serving.reconciler)
    say(`Penstock serves ${model.name} at ${serving.url}${details(serving.hosting.workers(generation))}`)
    say(`ready after ${((performance.now() - startedAtMs) / 1000).toFixed(1)} s; edit ${relative(process.cwd(), loaded.path)} to change what runs; stop with Ctrl-C`)
    return yield* Effect.never
  })
  return untilSignalled(main)
}
