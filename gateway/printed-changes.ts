import type { Change, OnChange } from "../actors/node/change.ts"

const say = (line: string): void => void process.stdout.write(`${line}\n`)

/**
 * Prints plans, their steps as they are done, and how each ends; of the first one only what fails,
 * unless `all` are wanted.
 */
export const printedChanges = (file: string, all = false): OnChange => {
  const began = new Map<Change, number>()
  let first: Change | undefined
  return (change, step) => {
    first ??= change
    if (change === first && !all) return
    if (step !== undefined) {
      if (step.state === "done") say(`  ${step.step}: done in ${seconds(step.ms ?? 0)}`)
      else if (step.state === "failed") say(`  ${step.step}: FAILED after ${seconds(step.ms ?? 0)}: ${step.error}`)
      return
    }
    if (change.outcome === "changing") {
      began.set(change, performance.now())
      if (change.steps.length > 0) say([`${file}: the plan`, ...change.steps.map((planned, i) => `  ${i + 1}. ${planned.step}`)].join("\n"))
      return
    }
    const tookMs = performance.now() - (began.get(change) ?? performance.now())
    began.delete(change)
    const left = change.steps.filter(({ state }) => state !== "done").map((planned) => planned.step)
    if (change.outcome === "done") say(change.steps.length === 0 ? `${file}: nothing to change` : `done after ${seconds(tookMs)}`)
    else if (change.outcome === "superseded") say(`${file}: there is a newer one; not done: ${left.join("; ") || "nothing"}`)
    else say(`failed: ${change.error}\n  what is done stays, and requests are served; not done: ${left.join("; ") || "nothing"}; it is tried again, or mend ${file}`)
  }
}

const seconds = (ms: number): string => `${(ms / 1000).toFixed(1)} s`
