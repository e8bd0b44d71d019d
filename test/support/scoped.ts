/** Effects that live as long as a test: actors are started in a Scope, which the test closes. */
import { Effect, Exit, Fiber, Scope } from "effect"

export interface TestScope {
  /** Runs an effect that acquires things for the test. */
  readonly start: <A, E>(effect: Effect.Effect<A, E, Scope.Scope>) => Promise<A>
  readonly close: () => Promise<void>
}

export const testScope = (): TestScope => {
  const scope = Effect.runSync(Scope.make())
  return {
    start: (effect) => Effect.runPromise(Scope.provide(effect, scope)),
    close: () => Effect.runPromise(Scope.close(scope, Exit.void)),
  }
}

/** Runs an effect that is expected to fail, and returns what it fails with. */
export const failureOf = <A, E>(effect: Effect.Effect<A, E>): Promise<E> => Effect.runPromise(Effect.flip(effect))

/** Starts an effect whose end is interesting later; `interrupt` gives it up. */
export const started = <A, E>(effect: Effect.Effect<A, E>): { readonly exit: Promise<Exit.Exit<A, E>>; readonly interrupt: () => Promise<void> } => {
  const fiber = Effect.runFork(effect)
  return { exit: Effect.runPromise(Fiber.await(fiber)), interrupt: () => Effect.runPromise(Effect.asVoid(Fiber.interrupt(fiber))) }
}

/** Waits, turn by turn of the event loop, until something holds. */
export const until = async (holds: () => boolean): Promise<void> => {
  while (!holds()) await new Promise((resolve) => setImmediate(resolve))
}
