/**
 * Restarts what fails: its Scope is closed, so that everything it owned is freed, and it starts clean, after a delay that
 * doubles while it keeps failing.
 */
import { Cause, Deferred, Effect, Exit, Option, type Scope } from "effect"
import { limits } from "../../config/limits.ts"

/** What was to be expected is said in its own words; anything else shows where it happened. */
const reason = <E>(cause: Cause.Cause<E>): string => {
  const failure = Cause.hasDies(cause) ? undefined : Option.getOrUndefined(Cause.findErrorOption(cause))
  return failure instanceof Error ? failure.message : Cause.pretty(cause)
}

/** Runs until it fails; calls `ready` when it serves. */
export type Supervised<E> = (ready: Effect.Effect<void>) => Effect.Effect<never, E, Scope.Scope>

/**
 * Starts `body` and returns when it serves. A failure before that is the caller's; after it, the body is restarted until
 * the Scope closes.
 */
export const supervise = <E>(name: string, body: Supervised<E>): Effect.Effect<void, E, Scope.Scope> =>
  Effect.gen(function* () {
    const started = yield* Deferred.make<void, E>()
    let delayMs: number = limits.restartDelayMs
    const ready = Effect.suspend(() => {
      delayMs = limits.restartDelayMs
      return Effect.asVoid(Deferred.succeed(started, undefined))
    })
    const incarnation = Effect.gen(function* () {
      // The closing of the Scope does not come past here; an interruption that does is the body's own, and a failure.
      const exit = yield* Effect.exit(Effect.scoped(body(ready)))
      if (Exit.isSuccess(exit)) return exit.value
      if (yield* Deferred.failCause(started, exit.cause)) return yield* Effect.interrupt
      console.error(`${name} failed and is restarted in ${delayMs} ms: ${reason(exit.cause)}`)
      yield* Effect.sleep(delayMs)
      delayMs = Math.min(delayMs * 2, limits.restartDelayMaxMs)
    })
    yield* Effect.forkScoped(Effect.forever(incarnation))
    yield* Deferred.await(started)
  })
