import { mkdirSync, writeFileSync } from "node:fs"
import { dirname } from "node:path"
import type { Reporter, TestModule } from "vitest/node"

/** How many tests passed and failed. */
export interface Counts {
  readonly passed: number
  readonly failed: number
}

export const closingLine = ({ passed, failed }: Counts): string => `${passed} passed, ${failed} failed\n`

/** Prints `N passed, N failed` as the very last line, and leaves the counts in a file for who adds its own. A file that cannot be loaded counts as a failure. */
export default class ClosingLineReporter implements Reporter {
  readonly #file: string | undefined

  constructor({ file }: { readonly file?: string } = {}) {
    this.#file = file
  }

  onTestRunEnd(modules: ReadonlyArray<TestModule>, errors: ReadonlyArray<unknown>): void {
    let passed = 0
    let failed = errors.length
    for (const module of modules) {
      let failedHere = 0
      for (const test of module.children.allTests()) {
        const { state } = test.result()
        if (state === "passed") passed++
        if (state === "failed") failedHere++
      }
      if (failedHere === 0 && module.state() === "failed") failedHere = 1
      failed += failedHere
    }
    if (this.#file !== undefined) {
      mkdirSync(dirname(this.#file), { recursive: true })
      writeFileSync(this.#file, JSON.stringify({ passed, failed } satisfies Counts))
    }
    // After the other reporters' summary, which is written in the same turn.
    setImmediate(() => process.stdout.write(closingLine({ passed, failed })))
  }
}
