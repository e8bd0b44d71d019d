/**
 * The command `up`: a topology's actors and the gateway in front of them, in this process, until a signal.
 */
import { Cause, Deferred, Effect, Exit, Option, type Scope } from "effect"
import { limits } from "../config/limits.ts"
import { node, type NodeOptions, type RunningNode } from "../actors/node/node.ts"
import type { WorkerError } from "../actors/node/worker.ts"
import { gateway, type GatewayError } from "./gateway.ts"

export interface Serving extends RunningNode {
  readonly url: string
  readonly port: number
}

/** Runs the actors and the gateway until the Scope closes: the gateway goes first. */
export const serve = (options: NodeOptions): Effect.Effect<Serving, WorkerError | GatewayError, Scope.Scope> =>
  Effect.gen(function* () {
    const { topology, model } = options
    const { host, port, keys } = topology.gateway
    const running = yield* node(options)
    const listening = yield* gateway({
      bus: running.bus,
      cluster: topology.cluster,
      host,
      port,
      keysFile: keys ?? undefined,
      model: { id: model.name, created: Math.floor(Date.now() / 1000), ownedBy: "penstock", contextLength: running.contextTokens },
      ready: () => ({ ready: running.workers.size === topology.workers.length }),
    })
    return { ...running, ...listening }
  })

const signalled: Effect.Effect<string> = Effect.callback((resume) => {
  const handlers = (["SIGINT", "SIGTERM"] as const).map((signal) => {
    const handler = () => resume(Effect.succeed(signal))
    process.once(signal, handler)
    return () => process.removeListener(signal, handler)
  })
  return Effect.sync(() => handlers.forEach((remove) => remove()))
})

/** Runs until SIGINT or SIGTERM, and resolves to the exit code after an orderly shutdown. */
export const up = async (options: NodeOptions): Promise<number> => {
  const startedAtMs = performance.now() - process.uptime() * 1000
  const stopping = Deferred.makeUnsafe<void>()
  const main = Effect.gen(function* () {
    const { url, workers } = yield* serve(options)
    const { kernels } = [...workers.values()][0]!
    const { isa, threads, blocks, blockTokens } = kernels.info
    const seconds = ((performance.now() - startedAtMs) / 1000).toFixed(1)
    process.stdout.write(`Penstock serves ${options.model.name} at ${url} (${isa}, ${threads} threads, KV for ${blocks * blockTokens} tokens)\n`)
    process.stdout.write(`ready after ${seconds} s; stop with Ctrl-C\n`)
    const signal = yield* signalled
    process.stdout.write(`${signal}: stopping\n`)
    yield* Deferred.succeed(stopping, undefined)
  })
  // A shutdown that hangs is cut off: what is left is freed with the process.
  void Effect.runPromise(Deferred.await(stopping)).then(() => setTimeout(() => process.exit(1), limits.shutdownDeadlineMs).unref())
  const exit = await Effect.runPromiseExit(Effect.scoped(main))
  if (Exit.isSuccess(exit)) return 0
  const failure = Option.getOrUndefined(Cause.findErrorOption(exit.cause))
  process.stderr.write(`${failure === undefined ? Cause.pretty(exit.cause) : failure.message}\n`)
  return 1
}
