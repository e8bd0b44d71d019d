/**
 * The other process of a bench: started, told over its channel what to do, and ended by its process id. Programs of such
 * processes answer each order with one report.
 */
import { spawn } from "node:child_process"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { programArguments } from "../../config/programs.mjs"

export type Report<R> = { readonly type: "done"; readonly value: R } | { readonly type: "failed"; readonly message: string }

export interface Peer<Order, R> {
  readonly pid: number | undefined
  /** Resolves with what the other process reports of this order. One at a time. */
  ask(order: Order): Promise<R>
}

/** The bench could not be run; the message says why. */
export class BenchError extends Error {
  readonly _tag = "BenchError"
}

/** Runs `program` in a process of its own until the Scope closes. */
export const peerProcess = <Order extends object, R>(program: string): Effect.Effect<Peer<Order, R>, never, Scope.Scope> =>
  Effect.map(
    Effect.acquireRelease(
      Effect.sync(() => spawn(process.execPath, [...programArguments(program)], { stdio: ["ignore", "inherit", "inherit", "ipc"], serialization: "advanced" })),
      (child) =>
        Effect.callback<void>((resume) => {
          if (child.exitCode !== null || child.signalCode !== null) return resume(Effect.void)
          child.once("exit", () => resume(Effect.void))
          child.kill("SIGKILL") // it holds nothing but memory
        }),
    ),
    (child) => ({
      pid: child.pid,
      ask: (order) =>
        new Promise<R>((resolve, reject) => {
          const gone = () => reject(new BenchError("the other process of the bench ended"))
          child.once("exit", gone)
          child.once("message", (report: Report<R>) => {
            child.off("exit", gone)
            if (report.type === "done") resolve(report.value)
            else reject(new BenchError(report.message))
          })
          child.send(order)
        }),
    }),
  )

/** The body of a peer's program. It ends when nobody tells it anything any more. */
export const servePeer = <Order, R>(serve: (order: Order) => Promise<R>): void => {
  const deadline = setTimeout(() => process.exit(1), limits.componentStartDeadlineMs)
  process.on("disconnect", () => process.exit(0))
  process.on("message", (order: Order) => {
    clearTimeout(deadline)
    serve(order).then(
      (value) => process.send?.({ type: "done", value } satisfies Report<R>),
      (error: unknown) => process.send?.({ type: "failed", message: error instanceof Error ? error.message : String(error) } satisfies Report<R>),
    )
  })
}
