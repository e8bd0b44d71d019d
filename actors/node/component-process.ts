/**
 * A component in a process of its own: started, told what to run, waited for, and ended by its process id.
 */
import { spawn } from "node:child_process"
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { programArguments } from "../../config/programs.mjs"
import type { AdoptedChild } from "./adopted-child.ts"
import type { ChildOrder, ChildReport, SupervisedChild } from "./supervised-child.ts"
import { WorkerError } from "./worker.ts"

export interface ProcessOptions {
  /** Told how many blocks its pool has, where it is a worker, before it serves. */
  readonly onBlocks?: (blocks: number | undefined) => void
  readonly onStarted?: (pid: number) => void
  readonly onEnded?: (pid: number) => void
  /** One that runs already, in place of a new one. */
  readonly adopted?: AdoptedChild | undefined
}

const program = fileURLToPath(new URL("./child.ts", import.meta.url))

const spawnChild = (order: ChildOrder): SupervisedChild => {
  const child = spawn(process.execPath, [...programArguments(program)], { stdio: ["ignore", "inherit", "inherit", "ipc"], serialization: "advanced" })
  child.send(order, () => {}) // one that cannot be told says why by its end
  return child
}

/** Runs a component's process until it ends, which is a failure, or the Scope closes, which ends it. */
export const componentProcess = (order: ChildOrder, ready: Effect.Effect<void>, { onBlocks, onStarted, onEnded, adopted }: ProcessOptions = {}): Effect.Effect<never, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const name = `${order.component.kind} ${order.component.id}`
    const child = yield* Effect.acquireRelease(
      Effect.sync((): SupervisedChild => adopted ?? spawnChild(order)),
      (started) => Effect.andThen(end(started), Effect.sync(() => started.pid !== undefined && onEnded?.(started.pid))),
    )
    if (child.pid !== undefined) onStarted?.(child.pid)
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
      const hear = (report: ChildReport) => {
        if (report.type === "ready") {
          onBlocks?.(report.blocks)
          resume(Effect.void)
        } else if (report.type === "failed") said = report.message
      }
      child.on("message", hear)
      if (adopted?.hello.ready === true) hear({ type: "ready", blocks: adopted.hello.blocks })
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
const silent = (child: SupervisedChild): Effect.Effect<void> =>
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
const end = (child: SupervisedChild): Effect.Effect<void> =>
  Effect.callback<void>((resume) => {
    if (child.exitCode !== null || child.signalCode !== null || child.pid === undefined) return resume(Effect.void)
    const kill = setTimeout(() => child.kill("SIGKILL"), limits.shutdownDeadlineMs / 2)
    child.once("exit", () => {
      clearTimeout(kill)
      resume(Effect.void)
    })
    child.kill("SIGTERM")
  })
