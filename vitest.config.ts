import { configDefaults, defineConfig } from "vitest/config"

export default defineConfig({
  test: {
    include: ["test/**/*.test.ts"],
    exclude: [...configDefaults.exclude, "test/jaeger/**", "test/cuda/**"], // npm run test:jaeger, npm run test:cuda
    // Native addons live in processes of their own, so that a crash is one file's and not the run's.
    pool: "forks",
    // The kernels use every core already; more workers only disturb what measures time.
    maxWorkers: 2,
    testTimeout: 120_000,
    hookTimeout: 60_000,
    teardownTimeout: 10_000,
    reporters: ["default", ["./test/support/closing-line-reporter.ts", { file: "build/counts.json" }]]
  }
})
