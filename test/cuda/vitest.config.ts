/** Tests of the engine on a device; main.ts runs them with the addon in PENSTOCK_CUDA_ADDON. */
import { defineConfig } from "vitest/config"

export default defineConfig({
  test: {
    include: ["test/cuda/*.test.ts"],
    pool: "forks",
    maxWorkers: 2,
    // Every thread of every kernel is a stack that is switched.
    testTimeout: 600_000,
    hookTimeout: 60_000,
    teardownTimeout: 10_000,
    reporters: ["default", ["./test/support/closing-line-reporter.ts", { file: "build/cuda/counts.json" }]],
  },
})
