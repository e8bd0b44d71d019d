/** The kernels' tests over the addon that `npm run test:sanitize` has built with AddressSanitizer and UndefinedBehaviorSanitizer. */
import { defineConfig } from "vitest/config"

const addon = "../build/kernels/penstock.node"
const sanitized = "../build/sanitize/address/penstock.node"

export default defineConfig({
  plugins: [
    {
      name: "sanitized-addon",
      transform(code, id) {
        if (!id.endsWith("/kernels/index.ts")) return undefined
        if (!code.includes(addon)) throw new Error(`kernels/index.ts: expected the addon's path, ${addon}`)
        return code.replace(addon, sanitized)
      },
    },
  ],
  test: {
    include: ["test/kernels/*.test.ts"],
    // It computes in JavaScript for most of its time, and calls nothing that the others do not.
    exclude: ["test/kernels/accuracy.test.ts"],
    // The real model takes minutes here and has no shape of its own; the sanitizer's shadow is memory that is committed too.
    testNamePattern: /^(?!.*(SmolLM2-135M|commits a large pool only where it is used))/,
    pool: "forks",
    maxWorkers: 2,
    // The longest takes two minutes on two quiet cores.
    testTimeout: 480_000,
    hookTimeout: 120_000,
    teardownTimeout: 10_000,
    reporters: ["default", ["./test/support/closing-line-reporter.ts", { file: "build/sanitize/counts.json" }]],
  },
})
