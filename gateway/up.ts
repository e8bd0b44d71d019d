/**
 * The command `up`: a topology's actors and the gateway in front of them, in this process, until a signal. It follows the file.
 */
import { Cause, Deferred, Effect, Exit, Option } from "effect"
import { basename } from "node:path"
import type { LoadedTopology, TopologyOverrides } from "../config/load-topology.ts"
import { limits } from "../config/limits.ts"
import type { ModelSpec } from "../config/models.ts"
import type { ResolvedModel } from "../actors/node/fetch-model.ts"
import type { Change, OnChange } from "../actors/node/change.ts"
import type { RunningWorker } from "../actors/node/worker.ts"
import { serve } from "./serve.ts"
import { TopologyFile } from "./topology-file.ts"

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

/** Prints plans, their steps as they are done, and how each ends; of the first one only what fails. */
const printed = (file: string): OnChange => {
  const began = new Map<Change, number>()
  let first: Change | undefined
  return (change, step) => {
    first ??= change
    if (change === first) return
    if (step !== undefined) {
      if (step.state === "done") say(`  ${step.step}: done in ${seconds(step.ms ?? 0)}`)
      else if (step.state === "failed") say(`  ${step.step}: FAILED after ${seconds(step.ms ?? 0)}: ${step.error}`)
      return
    }
    if (change.outcome === "changing") {
      began.set(change, performance.now())
      if (change.steps.length > 0) say([`${file}: the plan`, ...change.steps.map((planned, i) => `  ${i + 1}. ${planned.step}`)].join("\n"))
      return
    }
    const tookMs = performance.now() - (began.get(change) ?? performance.now())
    began.delete(change)
    const left = change.steps.filter(({ state }) => state !== "done").map((planned) => planned.step)
    if (change.outcome === "done") say(change.steps.length === 0 ? `${file}: nothing to change` : `done after ${seconds(tookMs)}`)
    else if (change.outcome === "superseded") say(`${file}: there is a newer one; not done: ${left.join("; ") || "nothing"}`)
    else say(`failed: ${change.error}\n  what is done stays, and requests are served; not done: ${left.join("; ") || "nothing"}; it is tried again, or mend ${file}`)
  }
}

const seconds = (ms: number): string => `${(ms / 1000).toFixed(1)} s`

const signalled: Effect.Effect<string> = Effect.callback((resume) => {
  const handlers = (["SIGINT", "SIGTERM", "SIGHUP"] as const).map((signal) => {
    const handler = () => resume(Effect.succeed(signal))
    process.once(signal, handler)
    return () => process.removeListener(signal, handler)
  })
  return Effect.sync(() => handlers.forEach((remove) => remove()))
})

/** Runs until SIGINT, SIGTERM or SIGHUP, which may come while it still starts, and resolves to the exit code after an orderly shutdown. */
export const up = async ({ loaded, overrides, fetchModel }: UpOptions): Promise<number> => {
  const startedAtMs = performance.now() - process.uptime() * 1000
  const stopping = Deferred.makeUnsafe<void>()
  const file = new TopologyFile({ loaded, overrides, fetchModel, say })
  const main = Effect.gen(function* () {
    const model = yield* Effect.tryPromise({ try: () => fetchModel(loaded.model), catch: (error) => error as Error })
    const serving = yield* serve({ topology: loaded.topology, model, revision: loaded.revision, access: file.access, onChange: printed(basename(loaded.path)) })
    const generation = serving.reconciler.actual.generation?.id ?? ""
    yield* file.follow(serving.reconciler)
    say(`Penstock serves ${model.name} at ${serving.url}${details(serving.hosting.workers(generation))}`)
    say(`ready after ${((performance.now() - startedAtMs) / 1000).toFixed(1)} s; edit ${basename(loaded.path)} to change what runs; stop with Ctrl-C`)
    return yield* Effect.never
  })
  const stop = Effect.gen(function* () {
    const signal = yield* signalled
    say(`${signal}: stopping`)
    yield* Deferred.succeed(stopping, undefined)
  })
  // A shutdown that hangs is cut off: what is left is freed with the process.
  void Effect.runPromise(Deferred.await(stopping)).then(() => setTimeout(() => process.exit(1), limits.shutdownDeadlineMs).unref())
  const exit = await Effect.runPromiseExit(Effect.scoped(Effect.raceFirst(stop, main)))
  if (Exit.isSuccess(exit)) return 0
  const failure = Option.getOrUndefined(Cause.findErrorOption(exit.cause))
  process.stderr.write(`${failure === undefined ? Cause.pretty(exit.cause) : failure.message}\n`)
  return 1
}
