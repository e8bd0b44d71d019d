import { execFile } from "node:child_process"
import { promisify } from "node:util"
import { expect, it } from "vitest"
import { median, quantile, table } from "../../gateway/bench/figures.ts"
import { natsStartTimeoutMs } from "../support/start-nats.ts"

const run = promisify(execFile)
const penstock = (...args: ReadonlyArray<string>) => run("npm", ["run", "-s", "penstock", "--", ...args])

it("bench bus --json prints one JSON object, with every figure", async () => {
  const { stdout } = await penstock("bench", "bus", "--json")
  const { bus } = JSON.parse(stdout) as { bus: Record<"nats" | "memory", Record<string, number>> }
  for (const figures of [bus.nats, bus.memory]) {
    expect(Object.keys(figures).sort()).toEqual(["messagesPerS", "roundTripP50Us", "roundTripP99Us"])
    for (const figure of Object.values(figures)) expect(figure).toBeGreaterThan(0)
    expect(figures.roundTripP99Us).toBeGreaterThanOrEqual(figures.roundTripP50Us!)
  }
}, natsStartTimeoutMs)

it("an unknown bench is a wrong command line", async () => {
  await expect(penstock("bench", "everything")).rejects.toMatchObject({ code: 2 })
  await expect(penstock("pull", "smollm2-135m", "--json")).rejects.toMatchObject({ code: 2 })
})

it("figures are medians, quantiles and aligned columns", () => {
  expect([median([3, 1, 2]), median([4, 1, 2, 3])]).toEqual([2, 2.5])
  expect([quantile([5, 1, 3], 0.5), quantile([5, 1, 3], 0.99)]).toEqual([3, 5])
  expect(table([["a", "bb"], ["ccc", "d"]])).toBe("a    bb\nccc   d")
})
