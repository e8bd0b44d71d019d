import type { Reporter, TestModule } from "vitest/node"

/** Prints `N passed, N failed` as the very last line. A file that cannot be loaded counts as a failure. */
export default class ClosingLineReporter implements Reporter {
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
    // After the other reporters' summary, which is written in the same turn.
    setImmediate(() => process.stdout.write(`${passed} passed, ${failed} failed\n`))
  }
}
