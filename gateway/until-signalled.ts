import { Cause, Deferred, Effect, Exit, Option, type Scope } from "effect"
import { limits } from "../config/limits.ts"

const signalled: Effect.Effect<string> = Effect.callback((resume) => {
  const handlers = (["SIGINT", "SIGTERM", "SIGHUP"] as const).map((signal) => {
    const handler = () => resume(Effect.succeed(signal))
    process.once(signal, handler)
    return () => process.removeListener(signal, handler)
  })
  return Effect.sync(() => handlers.forEach((remove) => remove()))
})

/**
 * Runs until SIGINT, SIGTERM or SIGHUP, which may come while it still starts, and resolves to the exit code after an orderly
 * shutdown.
 */
export const untilSignalled = async (main: Effect.Effect<never, Error, Scope.Scope>): Promise<number> => {
  const stopping = Deferred.makeUnsafe<void>()
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
