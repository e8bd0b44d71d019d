import { Cause, Deferred, Effect, Exit, Option, type Scope } from "effect"
import { limits } from "../config/limits.ts"

const names = ["SIGINT", "SIGTERM", "SIGHUP"] as const

/**
 * The first signal, the next, and `onMore` for those after `stopping`. One to the whole process group may come from the group's other
 * processes too, and counts once.
 */
const hearSignals = () => {
  const [first, second] = [Deferred.makeUnsafe<string>(), Deferred.makeUnsafe<string>()]
  let lastMs = Number.NEGATIVE_INFINITY
  let more: (() => void) | undefined
  let count = 0
  const hear = (signal: string) => {
    if (performance.now() - lastMs < limits.groupSignalMs) return
    lastMs = performance.now()
    if (count++ === 0) Deferred.doneUnsafe(first, Exit.succeed(signal))
    else if (more === undefined) Deferred.doneUnsafe(second, Exit.succeed(signal))
    else more()
  }
  for (const name of names) process.on(name, hear)
  return {
    first: Deferred.await(first),
    second: Deferred.await(second),
    stopping: (onMore: () => void) => void (more = onMore),
    hearNoMore: () => names.forEach((name) => process.removeListener(name, hear)),
  }
}

const say = (line: string): void => void process.stdout.write(`${line}\n`)

/**
 * Runs until SIGINT, SIGTERM or SIGHUP, which may come while it still starts, and resolves to the exit code after an orderly
 * shutdown.
 * @param leave comes before the shutdown, while everything runs; a second signal cuts it short. One during the shutdown ends the process
 */
export const untilSignalled = async (main: Effect.Effect<never, Error, Scope.Scope>, leave?: Effect.Effect<void>): Promise<number> => {
  const { first, second, stopping, hearNoMore } = hearSignals()
  let cutOff: NodeJS.Timeout | undefined
  const stop = Effect.gen(function* () {
    const signal = yield* first
    if (leave !== undefined) {
      say(`${signal}: leaving; a second signal stops it at once`)
      yield* Effect.raceFirst(leave, Effect.asVoid(second))
    }
    say(`${signal}: stopping`)
    stopping(() => process.exit(1))
    // A shutdown that hangs is cut off: what is left is freed with the process.
    cutOff = setTimeout(() => process.exit(1), limits.shutdownDeadlineMs).unref()
  })
  const exit = await Effect.runPromiseExit(Effect.scoped(Effect.raceFirst(stop, main)))
  hearNoMore()
  clearTimeout(cutOff)
  if (Exit.isSuccess(exit)) return 0
  const failure = Option.getOrUndefined(Cause.findErrorOption(exit.cause))
  process.stderr.write(`${failure === undefined ? Cause.pretty(exit.cause) : failure.message}\n`)
  return 1
}
