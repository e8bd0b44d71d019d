/**
 * The process of one component: it is told what to run over its channel to the supervisor, and runs it until it is told to
 * stop or the supervisor is gone. It ignores what is meant for the whole group, such as Ctrl-C.
 */
import { setTimeout as setTimeoutPromise } from "node:timers/promises"
import { Deferred, Effect } from "effect"
import { readEnv } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import { natsOfRole } from "../../config/topology.ts"
import { inboxPrefix } from "../messages/subjects.ts"
import { connectBuses } from "../runtime/nats-bus.ts"
import { telemetry } from "../runtime/telemetry.ts"
import { runComponent } from "./component.ts"
import type { ChildOrder, ChildReport } from "./component-process.ts"

const report = (message: ChildReport): Promise<void> => new Promise((resolve) => (process.connected ? process.send?.(message, () => resolve()) : resolve()))

/** Says again and again that this process has not stopped; its supervisor kills it when it hears nothing. */
const sayAlive = async (): Promise<never> => {
  for (;;) {
    await report({ type: "alive" })
    await setTimeoutPromise(limits.heartbeatIntervalMs)
  }
}

process.on("SIGINT", () => {})
process.on("SIGHUP", () => {})

const run = async ({ component, topology, model, namespace, nats }: ChildOrder): Promise<number> => {
  const stop = Deferred.makeUnsafe<void>()
  const stopNow = () => {
    // A shutdown that hangs is cut off, also where nobody is left to kill this process.
    setTimeout(() => process.exit(1), limits.shutdownDeadlineMs).unref()
    Effect.runSync(Deferred.succeed(stop, undefined))
  }
  process.on("SIGTERM", stopNow)
  process.on("disconnect", stopNow)
  const name = `${component.kind} ${component.id}`
  const env = readEnv()
  const tracing = telemetry({ endpoint: env.otlpEndpoint ?? topology.telemetry.otlp ?? undefined, cluster: topology.cluster, component })
  const program = Effect.gen(function* () {
    const prefix = inboxPrefix(namespace, component.kind, component.id)
    const buses = yield* Effect.acquireRelease(
      Effect.tryPromise({ try: () => connectBuses({ ...natsOfRole(nats, component.kind), name, inboxPrefix: prefix }), catch: (error) => error as Error }),
      ({ control, bulk }) => Effect.promise(() => Promise.all([control.close(), bulk.close()])),
    )
    let blocks: number | undefined
    const ready = Effect.promise(async () => {
      await report({ type: "ready", blocks })
      void sayAlive()
    })
    yield* Effect.raceFirst(runComponent(component, Date.now(), { topology, model, namespace, env, buses, onWorker: ({ kernels }) => (blocks = kernels.info.blocks) }, ready), Deferred.await(stop))
  })
  try {
    await Effect.runPromise(Effect.scoped(program).pipe(Effect.provide(tracing)))
    return 0
  } catch (error) {
    await report({ type: "failed", message: error instanceof Error ? error.message : String(error) })
    return 1
  }
}

const orderDeadline = setTimeout(() => process.exit(1), limits.askDeadlineMs)
process.once("message", (order: ChildOrder) => {
  clearTimeout(orderDeadline)
  void run(order).then((code) => process.exit(code))
})
