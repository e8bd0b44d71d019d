/**
 * A component in a process of its own: started, told what to run, waited for, and ended by its process id.
 */
import { spawn, type ChildProcess } from "node:child_process"
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { programArguments } from "../../config/programs.mjs"
import type { NatsAddress, Topology } from "../../config/topology.ts"
import type { Component } from "./component.ts"
import type { ResolvedModel } from "./fetch-model.ts"
import { WorkerError } from "./worker.ts"

/** What a child is told to run, once. */
export interface ChildOrder {
  readonly component: Component
  readonly topology: Topology
  readonly model: ResolvedModel
  readonly namespace: string
  readonly nats: NatsAddress
}

/** A worker's `blocks`: how many its pool was made with. */
export type ChildReport = { readonly type: "ready"; readonly blocks: number | undefined } | { readonly type: "alive" } | { readonly type: "failed"; readonly message: string }

const program = fileURLToPath(new URL("./child.ts", import.meta.url))

/**
 * Runs a component's process until it ends, which is a failure, or the Scope closes, which ends it.
 * @param onBlocks told how many blocks its pool has, where it is a worker, before it serves
 */
export const componentProcess = (order: ChildOrder, ready: Effect.Effect<void>, onBlocks: (blocks: number | undefined) => void = () => {}): Effect.Effect<never, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const name = `${order.component.kind} ${order.component.id}`
    const child = yield* Effect.acquireRelease(
      Effect.sync(() => spawn(process.execPath, [...programArguments(program)], { stdio: ["ignore", "inherit", "inherit", "ipc"], serialization: "advanced" })),
      end,
    )
    let said: string | undefined
    const ended = Effect.callback<never, WorkerError>((resume) => {
      const fail = (how: string) => resume(Effect.fail(new WorkerError(said ?? `${name} (process ${child.pid}) ${how}`)))
      child.once("error", (error) => fail(`could not be started: ${error.message}`))
      child.once("exit", (code, signal) => {
        const tell = () => fail(`ended with ${signal ?? `exit code ${code}`}`)
        // What ended it may be meant for the whole group, and this process hears of it a moment later: then it is no failure.
        if (signal === "SIGINT" || signal === "SIGTERM" || signal === "SIGHUP") setTimeout(tell, limits.groupSignalMs)
        else tell()
      })
    })
    const serving = Effect.callback<void>((resume) => {
      child.on("message", (report: ChildReport) => {
        if (report.type === "ready") {
          onBlocks(report.blocks)
          resume(Effect.void)
        }
        else if (report.type === "failed") said = report.message
      })
      child.send(order)
    }).pipe(
      Effect.timeoutOrElse({ duration: limits.componentStartDeadlineMs, orElse: () => Effect.fail(new WorkerError(`${name} did not serve within ${limits.componentStartDeadlineMs} ms`)) }),
      Effect.andThen(ready),
      Effect.andThen(silent(child)),
      Effect.andThen(Effect.fail(new WorkerError(`${name} (process ${child.pid}) is silent and is killed`))),
    )
    return yield* Effect.raceFirst(ended, serving)
  })

/** A restart costs more than being passed over, so a process is silent for longer than a member before it is killed. */
const silentBeats = Math.ceil((2 * limits.heartbeatSilenceMs) / limits.heartbeatIntervalMs)

/**
 * Waits until a process says nothing for too long, and kills it: one that is stopped heeds no other signal. It is heard over
 * its channel rather than the bus, whose outage says nothing of the process. Beats are counted, not time: where this process
 * itself was stopped, words that wait for it are read before the next beat.
 */
const silent = (child: ChildProcess): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    let beats = 0
    const heard = () => (beats = 0)
    const timer = setInterval(() => {
      if (++beats < silentBeats) return
      clearInterval(timer)
      child.kill("SIGKILL")
      resume(Effect.void)
    }, limits.heartbeatIntervalMs)
    child.on("message", heard)
    return Effect.sync(() => {
      clearInterval(timer)
      child.removeListener("message", heard)
    })
  })

/** SIGTERM, and SIGKILL for one that does not heed it in time. */
const end = (child: ChildProcess): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return resume(Effect.void)
    const kill = setTimeout(() => child.kill("SIGKILL"), limits.shutdownDeadlineMs / 2)
    child.once("exit", () => {
      clearTimeout(kill)
      resume(Effect.void)
    })
    child.kill("SIGTERM")
  })
