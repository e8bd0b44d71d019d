/** The command `bench`: measures here and now, and prints one table, or one JSON object. */
import { Cause, Effect, Exit, Option, type Scope } from "effect"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { deviceFigures, deviceTable } from "./device.ts"
import { busFigures, busTable } from "./bus.ts"
import { kernelsFigures, kernelsJson, kernelsTable, type KernelsOptions } from "./kernels.ts"
import { kvFigures, kvTable } from "./kv.ts"
import { serveFigures, serveTable, type ServeBenchOptions } from "./serve.ts"

interface Figures {
  readonly json: unknown
  readonly text: string
}

export type BenchName = "bus" | "kv" | "kernels" | "serve"

export interface BenchOptions {
  readonly json: boolean
  readonly model: () => Promise<ResolvedModel>
  readonly kernels: KernelsOptions
  /** Where `bench kernels` computes. */
  readonly device: string
  readonly serve: ServeBenchOptions
}

const run = (name: BenchName, options: BenchOptions): Effect.Effect<Figures, Error, Scope.Scope> => {
  if (name === "bus") return Effect.map(busFigures, (figures) => ({ json: { bus: figures }, text: busTable(figures) }))
  const model = Effect.tryPromise({ try: options.model, catch: (error) => error as Error })
  if (name === "kv") return Effect.map(Effect.flatMap(model, kvFigures), (figures) => ({ json: figures, text: kvTable(figures) }))
  if (name === "kernels" && options.device !== "cpu") return Effect.map(Effect.flatMap(model, (found) => deviceFigures(found, { device: options.device, env: options.kernels.env })), (figures) => ({ json: figures, text: deviceTable(figures) }))
  if (name === "kernels") return Effect.map(Effect.flatMap(model, (found) => kernelsFigures(found, options.kernels)), (figures) => ({ json: kernelsJson(figures), text: kernelsTable(figures) }))
  return Effect.map(Effect.flatMap(model, (found) => serveFigures(found, options.serve)), (figures) => ({ json: figures, text: serveTable(figures) }))
}

/** Runs a bench and resolves to the exit code. */
export const bench = async (name: BenchName, options: BenchOptions): Promise<number> => {
  const exit = await Effect.runPromiseExit(Effect.scoped(run(name, options)))
  if (Exit.isSuccess(exit)) {
    process.stdout.write(`${options.json ? JSON.stringify(exit.value.json) : exit.value.text}\n`)
    return 0
  }
  const failure = Option.getOrUndefined(Cause.findErrorOption(exit.cause))
  process.stderr.write(`${failure === undefined ? Cause.pretty(exit.cause) : failure.message}\n`)
  return 1
}
