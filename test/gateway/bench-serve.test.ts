import { execFile } from "node:child_process"
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { promisify } from "node:util"
import { afterAll, beforeAll, expect, it } from "vitest"
import { historyTokens } from "../../gateway/bench/serve-loads.ts"
import { TimeBudget } from "../../gateway/bench/time-budget.ts"
import { writeTinyModel } from "../support/tiny-model.ts"

const run = promisify(execFile)
const bench = (...args: ReadonlyArray<string>) => run("npm", ["run", "-s", "penstock", "--", "bench", ...args])

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-bench-serve-"))
  await writeTinyModel(join(folder, "tiny.gguf"), { context: 4096 })
  await writeFile(join(folder, "tiny.yaml"), `penstock: 1\nmodel: file:tiny.gguf\n`)
})
afterAll(() => rm(folder, { recursive: true, force: true }))

interface Conversation {
  readonly historyTokens: number
  readonly streams: number
  readonly ttftMs: ReadonlyArray<number>
  readonly turn2Ratio: number
  readonly cachedTokens: ReadonlyArray<number>
  readonly exactTurns: string
}

it("bench serve --json measures a topology of any model, and every later turn finds exactly what was computed before", async () => {
  const { stdout } = await bench("serve", "--topology", join(folder, "tiny.yaml"), "--turns", "3", "--json")
  const figures = JSON.parse(stdout) as Record<string, Record<string, number>> & Record<"conversation1" | "conversation8", Conversation>
  expect(figures).toMatchObject({ model: "tiny", workers: 1 })
  const { historyTokens } = figures.conversation1
  expect(historyTokens).toBeGreaterThanOrEqual(500)
  for (const name of ["conversation1", "conversation8"] as const) {
    const { streams, ttftMs, turn2Ratio, cachedTokens, exactTurns, ...more } = figures[name]
    expect(more.historyTokens).toBe(historyTokens)
    // As many at a time as there is time for.
    expect(streams).toBeGreaterThanOrEqual(name === "conversation1" ? 1 : 2)
    expect(streams).toBeLessThanOrEqual(name === "conversation1" ? 1 : 8)
    expect([ttftMs.length, cachedTokens.length]).toEqual([3, 3])
    for (const figure of [...ttftMs, turn2Ratio]) expect(figure).toBeGreaterThan(0)
    expect(cachedTokens[1]).toBeGreaterThan(0.95 * historyTokens)
    const [exact, all] = exactTurns.split(" of ")
    expect(exact).toBe(all)
  }
  expect(figures["sharedPrompt"]).toMatchObject({ systemTokens: 0.75 * historyTokens, users: expect.any(Number), firstMs: expect.any(Number), othersMs: expect.any(Number), ratio: expect.any(Number) })
  expect(figures["sharedPrompt"]!["users"]).toBeGreaterThanOrEqual(4)
  expect(figures["sharedPrompt"]!["cachedTokens"]).toBeGreaterThan(0.7 * historyTokens)
  // Blocks of 16, and not the one with the last token.
  expect(figures["storeHit"]).toMatchObject({ tokens: historyTokens, cachedTokens: Math.floor((historyTokens - 1) / 16) * 16, recomputeMs: expect.any(Number), hitMs: expect.any(Number), timesFaster: expect.any(Number) })
  expect(figures["restart"]).toBeDefined()
  for (const name of ["load1", "load8", "openLoad"]) {
    expect(Object.keys(figures[name]!).sort()).toEqual(["promptTokens", "requests", "requestsPerS", "tokPerS", "ttftP50Ms", "ttftP99Ms"])
    for (const figure of Object.values(figures[name]!)) expect(figure).toBeGreaterThan(0)
  }
}, 120_000)

it("a history is as long as a slow machine computes in a second and a half, 500 to 2,000 tokens", () => {
  expect([100, 375, 500, 700, 5_000].map(historyTokens)).toEqual([2000, 2000, 1500, 1000, 500])
})

it("time that one part of a bench does not need is left to those after it, and none is left when it is over", async () => {
  const time = new TimeBudget(40)
  expect(time.share(0.5)).toBeGreaterThan(0)
  expect(time.share(0.5)).toBeLessThanOrEqual(20)
  expect(time.share(1, 3)).toBeLessThanOrEqual(3)
  await new Promise((resolve) => setTimeout(resolve, 50))
  expect([time.leftMs, time.share(0.5)]).toEqual([0, 0])
})

it("its options belong to it alone, and are checked", async () => {
  await expect(bench("bus", "--turns", "3")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("belong to bench serve") })
  await expect(bench("serve", "--turns", "1")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("2 … 20") })
  await expect(bench("serve", "--topology", join(folder, "none.yaml"))).rejects.toMatchObject({ code: 1, stderr: expect.stringContaining("no such file") })
})
