/** The command `bench`: measures here and now, and prints one table, or one JSON object. */
import { Cause, Effect, Exit, Option, type Scope } from "effect"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { busFigures, busTable } from "./bus.ts"
import { kvFigures, kvTable } from "./kv.ts"

interface Figures {
  readonly json: unknown
  readonly text: string
}

export const benches = ["bus", "kv"] as const
export type BenchName = (typeof benches)[number]

const run = (name: BenchName, model: () => Promise<ResolvedModel>): Effect.Effect<Figures, Error, Scope.Scope> =>
  name === "bus"
    ? Effect.map(busFigures, (figures) => ({ json: { bus: figures }, text: busTable(figures) }))
    : Effect.map(Effect.flatMap(Effect.tryPromise({ try: model, catch: (error) => error as Error }), kvFigures), (figures) => ({ json: figures, text: kvTable(figures) }))

/** Runs a bench and resolves to the exit code. */
export const bench = async (name: BenchName, options: { readonly json: boolean; readonly model: () => Promise<ResolvedModel> }): Promise<number> => {
  const exit = await Effect.runPromiseExit(Effect.scoped(run(name, options.model)))
  if (Exit.isSuccess(exit)) {
    process.stdout.write(`${options.json ? JSON.stringify(exit.value.json) : exit.value.text}\n`)
    return 0
  }
  const failure = Option.getOrUndefined(Cause.findErrorOption(exit.cause))
  process.stderr.write(`${failure === undefined ? Cause.pretty(exit.cause) : failure.message}\n`)
  return 1
}
