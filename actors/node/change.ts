/**
 * What has become of a plan, step by step: what is printed, and shown to whoever asks.
 */
import { Effect, Exit } from "effect"
import { reasonOf } from "./hosting.ts"
import type { ChangeSummary } from "../messages/presence.ts"
import { describe, type Step } from "./plan.ts"

export interface ReportedStep {
  readonly step: string
  state: "waiting" | "running" | "done" | "failed"
  ms?: number
  error?: string
}

/** One wanted topology, and how far it has come. */
export interface Change {
  readonly at: string
  readonly revision: string | undefined
  readonly steps: ReadonlyArray<ReportedStep>
  outcome: ChangeSummary["outcome"]
  error?: string
}

/** Told of each plan, each step's beginning and end, and the outcome. */
export type OnChange = (change: Change, step?: ReportedStep) => void

export const changeOf = (steps: ReadonlyArray<Step>, revision: string | undefined): Change => ({
  at: new Date().toISOString(),
  revision,
  steps: steps.map((step) => ({ step: describe(step), state: "waiting" })),
  outcome: "changing",
})

/** Steps of a change that its summary names, and how long it is: every presence of a node has some. */
const namedSteps = 3
const mostCharacters = 300

/** In one line, for people: its first steps, or why it failed. */
export const summaryOf = ({ at, steps, outcome, error }: Change): ChangeSummary => {
  const named = steps.slice(0, namedSteps).map(({ step }) => step).join("; ")
  const why = error ?? (steps.length > namedSteps ? `${named}; …` : named)
  const what = `${steps.length} step${steps.length === 1 ? "" : "s"}${why === "" ? "" : `: ${why}`}`
  return { at, outcome, what: what.length > mostCharacters ? `${what.slice(0, mostCharacters)} …` : what }
}

/** Does a step's work, and writes down and tells how it goes; never fails. */
export const reported = (change: Change, step: ReportedStep, work: Effect.Effect<"done" | "given up", unknown>, onChange: OnChange | undefined): Effect.Effect<"done" | "given up" | "failed"> =>
  Effect.gen(function* () {
    const beganAtMs = performance.now()
    step.state = "running"
    onChange?.(change, step)
    const exit = yield* Effect.exit(work)
    step.ms = Math.round(performance.now() - beganAtMs)
    if (Exit.isSuccess(exit) && exit.value === "given up") {
      step.state = "waiting"
      return exit.value
    }
    step.state = Exit.isSuccess(exit) ? "done" : "failed"
    if (Exit.isFailure(exit)) step.error = reasonOf(exit.cause)
    onChange?.(change, step)
    return Exit.isSuccess(exit) ? "done" : "failed"
  })
