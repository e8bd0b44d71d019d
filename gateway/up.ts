/**
 * The command `up`: a topology's actors and the gateway in front of them, in this process, until a signal.
 */
import { Cause, Deferred, Effect, Exit, Layer, Option, type Scope } from "effect"
import { readEnv } from "../config/env.ts"
import { limits } from "../config/limits.ts"
import { node, type NodeOptions, type RunningNode } from "../actors/node/node.ts"
import type { WorkerError } from "../actors/node/worker.ts"
import { telemetry } from "../actors/runtime/telemetry.ts"
import { gateway, type GatewayError } from "./gateway.ts"

export interface Serving extends RunningNode {
  readonly url: string
  readonly port: number
}

/** Runs the actors and the gateway until the Scope closes: the gateway goes first, and the last spans leave at the end. */
export const serve = (options: NodeOptions): Effect.Effect<Serving, WorkerError | GatewayError, Scope.Scope> => {
  const { bus, cluster, telemetry: { otlp } } = options.topology
  // On the memory bus every component is in this process.
  const component = bus === "memory" ? { kind: "penstock", id: "up" } : { kind: "gateway", id: "g0" }
  const tracing = Layer.build(telemetry({ endpoint: readEnv().otlpEndpoint ?? otlp ?? undefined, cluster, component }))
  return Effect.flatMap(tracing, (context) => Effect.provideContext(serveTraced(options), context))
}

const serveTraced = (options: NodeOptions): Effect.Effect<Serving, WorkerError | GatewayError, Scope.Scope> =>
  Effect.gen(function* () {
    const { topology, model } = options
    const { host, port, keys } = topology.gateway
    const running = yield* node(options)
    const { members } = running
    const listening = yield* gateway({
      bus: running.bus,
      members,
      namespace: running.namespace,
      host,
      port,
      keysFile: keys ?? undefined,
      model: { id: model.name, aliases: model.aliases, created: Math.floor(Date.now() / 1000), ownedBy: "penstock", contextLength: running.contextTokens },
      ready: () => {
        const serving = members.all.filter(({ kind }) => kind === "worker").map(({ id }) => id)
        const missing = topology.workers.flatMap(({ name }) => (serving.includes(name) ? [] : [name]))
        return missing.length === 0 ? { ready: true } : { ready: false, reason: `workers that do not serve now: ${missing.join(", ")}` }
      },
    })
    return { ...running, ...listening }
  })

/** What the workers of this process run on; those of others say it at /actors. */
const details = (workers: RunningNode["workers"]): string => {
  const [first] = workers.values()
  if (first === undefined) return ""
  const { isa, threads, blocks, blockTokens, blockBytes } = first.kernels.info
  const each = workers.size > 1 ? " in each worker" : ""
  return ` (${isa}; ${threads} threads and KV for ${blocks * blockTokens} tokens, at most ${((blocks * blockBytes) / 2 ** 30).toFixed(1)} GiB,${each || " in its worker"})`
}

const signalled: Effect.Effect<string> = Effect.callback((resume) => {
  const handlers = (["SIGINT", "SIGTERM", "SIGHUP"] as const).map((signal) => {
    const handler = () => resume(Effect.succeed(signal))
    process.once(signal, handler)
    return () => process.removeListener(signal, handler)
  })
  return Effect.sync(() => handlers.forEach((remove) => remove()))
})

/** Runs until SIGINT, SIGTERM or SIGHUP, which may come while it still starts, and resolves to the exit code after an orderly shutdown. */
export const up = async (options: NodeOptions): Promise<number> => {
  const startedAtMs = performance.now() - process.uptime() * 1000
  const stopping = Deferred.makeUnsafe<void>()
  const main = Effect.gen(function* () {
    const { url, workers } = yield* serve(options)
    const seconds = ((performance.now() - startedAtMs) / 1000).toFixed(1)
    process.stdout.write(`Penstock serves ${options.model.name} at ${url}${details(workers)}\n`)
    process.stdout.write(`ready after ${seconds} s; stop with Ctrl-C\n`)
    return yield* Effect.never
  })
  const stop = Effect.gen(function* () {
    const signal = yield* signalled
    process.stdout.write(`${signal}: stopping\n`)
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
