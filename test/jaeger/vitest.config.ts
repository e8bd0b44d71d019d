/** `npm run test:jaeger`: not part of `npm test`, since the first run builds Jaeger. */
import { defineConfig } from "vitest/config"

export default defineConfig({
  test: {
    root: new URL("../..", import.meta.url).pathname,
    include: ["test/jaeger/*.test.ts"],
    pool: "forks",
    testTimeout: 60_000,
    hookTimeout: 900_000,
    teardownTimeout: 10_000,
  },
})
