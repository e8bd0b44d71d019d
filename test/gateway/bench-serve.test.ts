import { execFile } from "node:child_process"
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { promisify } from "node:util"
import { afterAll, beforeAll, expect, it } from "vitest"
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
  for (const [name, streams] of [["conversation1", 1], ["conversation8", 8]] as const) {
    const { ttftMs, turn2Ratio, cachedTokens, exactTurns, ...more } = figures[name]
    expect(more.streams).toBe(streams)
    expect([ttftMs.length, cachedTokens.length]).toEqual([3, 3])
    for (const figure of [...ttftMs, turn2Ratio]) expect(figure).toBeGreaterThan(0)
    expect(cachedTokens[1]).toBeGreaterThan(1900)
    const [exact, all] = exactTurns.split(" of ")
    expect(exact).toBe(all)
  }
  expect(figures["sharedPrompt"]).toMatchObject({ systemTokens: 1500, users: 32, firstMs: expect.any(Number), othersMs: expect.any(Number), ratio: expect.any(Number) })
  expect(figures["sharedPrompt"]!["cachedTokens"]).toBeGreaterThan(1400)
  // Blocks of 16, and not the one with the last token.
  expect(figures["storeHit"]).toMatchObject({ tokens: 2000, cachedTokens: 1984, recomputeMs: expect.any(Number), hitMs: expect.any(Number), timesFaster: expect.any(Number) })
  expect(figures["restart"]).toBeDefined()
  for (const name of ["load1", "load8", "openLoad"]) {
    expect(Object.keys(figures[name]!).sort()).toEqual(["promptTokens", "requests", "requestsPerS", "tokPerS", "ttftP50Ms", "ttftP99Ms"])
    for (const figure of Object.values(figures[name]!)) expect(figure).toBeGreaterThan(0)
  }
}, 120_000)

it("its options belong to it alone, and are checked", async () => {
  await expect(bench("bus", "--turns", "3")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("belong to bench serve") })
  await expect(bench("serve", "--turns", "1")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("2 … 20") })
  await expect(bench("serve", "--topology", join(folder, "none.yaml"))).rejects.toMatchObject({ code: 1, stderr: expect.stringContaining("no such file") })
})
