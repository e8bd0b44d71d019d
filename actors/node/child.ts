/**
 * The process of one component: it is told what to run over its channel to the supervisor, and runs it until it is told to
 * stop or the supervisor is gone, and on a cluster's node, none comes back. It ignores what is meant for the whole group, such as Ctrl-C.
 */
import { setTimeout as setTimeoutPromise } from "node:timers/promises"
import { Deferred, Effect } from "effect"
import { readEnv } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import { natsOfRole } from "../../config/topology.ts"
import { inboxPrefix, subject } from "../messages/subjects.ts"
import { Drain } from "../messages/worker.ts"
import { Link } from "../runtime/link.ts"
import { connectBuses } from "../runtime/nats-bus.ts"
import { telemetry } from "../runtime/telemetry.ts"
import { ChildControl } from "./child-control.ts"
import { runComponent } from "./component.ts"
import type { ChildOrder, ChildReport } from "./supervised-child.ts"

/** Where another supervisor may take over. */
let control: ChildControl | undefined

const report = (message: ChildReport): Promise<void> => {
  control?.report(message)
  return new Promise((resolve) => (process.connected ? process.send?.(message, () => resolve()) : resolve()))
}

/** Says again and again that this process has not stopped; its supervisor kills it when it hears nothing. */
const sayAlive = async (): Promise<never> => {
  for (;;) {
    await report({ type: "alive" })
    await setTimeoutPromise(limits.heartbeatIntervalMs)
  }
}

process.on("SIGINT", () => {})
process.on("SIGHUP", () => {})

const run = async ({ component, topology, model, namespace, nats, agent, ...order }: ChildOrder): Promise<number> => {
  const stop = Deferred.makeUnsafe<void>()
  const stopNow = () => {
    // A shutdown that hangs is cut off, also where nobody is left to kill this process.
    setTimeout(() => process.exit(1), limits.shutdownDeadlineMs).unref()
    Effect.runSync(Deferred.succeed(stop, undefined))
  }
  process.on("SIGTERM", stopNow)
  const epoch = Math.max(Date.now(), order.epoch ?? 0)
  let blocks: number | undefined
  let serves = false
  let link: Link | undefined
  const expired = async () => {
    console.error(`${component.kind} ${component.id}: no supervisor has come back within ${limits.orphanLeaseMs / 1000} s; this process ends`)
    if (component.kind === "worker" && link !== undefined) {
      const drained = link.ask(Drain, subject(namespace, "worker", component.id, Drain.verb), { deadlineMs: limits.drainDeadlineMs }, { hop: "this worker", deadlineMs: limits.drainDeadlineMs + limits.askDeadlineMs })
      await Effect.runPromise(Effect.ignore(drained))
    }
    stopNow()
  }
  if (order.control === undefined) process.on("disconnect", stopNow)
  else {
    const opened = new ChildControl(order.control, () => ({ type: "hello", pid: process.pid, component, epoch, ready: serves, blocks }), () => void expired())
    control = opened
    process.on("disconnect", () => opened.orphaned())
  }
  const name = `${component.kind} ${component.id}`
  const env = readEnv()
  const tracing = telemetry({ endpoint: env.otlpEndpoint ?? topology.telemetry.otlp ?? undefined, cluster: topology.cluster, component })
  const program = Effect.gen(function* () {
    const prefix = inboxPrefix(namespace, component.kind, component.id)
    const buses = yield* Effect.acquireRelease(
      Effect.tryPromise({ try: () => connectBuses({ ...natsOfRole(nats, component.kind), name, inboxPrefix: prefix }), catch: (error) => error as Error }),
      ({ control, bulk }) => Effect.promise(() => Promise.all([control.close(), bulk.close()])),
    )
    link = new Link(buses.control, name, epoch)
    const ready = Effect.promise(async () => {
      serves = true
      await report({ type: "ready", blocks })
      void sayAlive()
    })
    yield* Effect.raceFirst(runComponent(component, epoch, { topology, model, namespace, env, buses, agent, onWorker: ({ kernels }) => (blocks = kernels.info.blocks) }, ready), Deferred.await(stop))
  })
  try {
    await Effect.runPromise(Effect.scoped(program).pipe(Effect.provide(tracing)))
    return 0
  } catch (error) {
    await report({ type: "failed", message: error instanceof Error ? error.message : String(error) })
    return 1
  } finally {
    control?.close()
  }
}

const orderDeadline = setTimeout(() => process.exit(1), limits.askDeadlineMs)
process.once("message", (order: ChildOrder) => {
  clearTimeout(orderDeadline)
  void run(order).then((code) => process.exit(code))
})
