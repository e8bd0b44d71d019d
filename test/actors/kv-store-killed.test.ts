/** A KV store's process that is killed while blocks are put: what is served afterwards is whole, and what was whole is served. */
import { fork } from "node:child_process"
import { mkdtempSync, rmSync, statSync, readdirSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { build } from "esbuild"
import { afterAll, beforeAll, expect, it, vi } from "vitest"
import { kvStoreActor } from "../../actors/kv-store/kv-store.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { testScope } from "../support/scoped.ts"
import { StoreClient } from "../support/store-client.ts"
import type { StoreOrder, StoreReport } from "../support/store-process.ts"

const rounds = 25
const blockBytes = 32_000
const roundBlocks = 100_000 // more than a round puts
const program = fileURLToPath(new URL("../../build/store-process.mjs", import.meta.url))
let folder: string
beforeAll(async () => {
  // In one file it starts in a tenth of the time; beside the addon, which it loads.
  await build({ entryPoints: [fileURLToPath(new URL("../support/store-process.ts", import.meta.url))], outfile: program, bundle: true, platform: "node", format: "esm", minify: true, logLevel: "error" })
  folder = mkdtempSync(join(tmpdir(), "penstock-kv-killed-"))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

interface Killed {
  /** What the store has said to be on disk. */
  readonly onDisk: Array<number>
  /** No block from here on was put before it said so last. */
  last: number
}

/** Runs a process of stores until it has said `words` times what they have on disk, and a moment more, and kills it. */
const putAndKill = (orders: ReadonlyArray<StoreOrder>, words: number, moreMs: number): Promise<ReadonlyArray<Killed>> =>
  new Promise((resolve, reject) => {
    const child = fork(program, { stdio: ["ignore", "inherit", "pipe", "ipc"] })
    let said = ""
    child.stderr!.on("data", (text: Buffer) => (said += text.toString()))
    const killed = orders.map(({ firstBlock }): Killed => ({ onDisk: [], last: firstBlock }))
    let heard = 0
    child.on("message", ({ store, onDisk, next }: StoreReport) => {
      killed[store]!.onDisk.push(...onDisk)
      killed[store]!.last = next
      if (++heard === words) setTimeout(() => child.kill("SIGKILL"), moreMs)
    })
    child.once("error", reject)
    child.once("exit", (_, signal) => (signal === "SIGKILL" ? resolve(killed) : reject(new Error(`it ended by itself: ${said}`))))
    child.send(orders)
  })

/** What a store on this folder serves of these blocks; throws where one is not what it should be. */
const served = async (order: StoreOrder, numbers: ReadonlyArray<number>): Promise<ReadonlySet<number>> => {
  const bus = new MemoryBus()
  const buses = { control: bus, bulk: bus }
  const scope = testScope()
  const store = await scope.start(kvStoreActor({ link: new Link(bus, "kv-store k0", 1), buses, namespace: "test", id: "k0", memoryBytes: order.memoryBytes, disk: { folder: order.folder, bytes: order.diskBytes } }))
  expect(store.figures().disk).toBeDefined()
  const client = new StoreClient(buses, blockBytes)
  const here = (await client.have(numbers)).flatMap((is, i) => (is ? [numbers[i]!] : []))
  expect(here).toHaveLength(store.figures().disk!.blocks) // nothing that nobody put
  for (let i = 0; i < here.length; i += 16) if (!(await client.intact(here.slice(i, i + 16)))) throw new Error(`blocks ${here.slice(i, i + 16).join(", ")} are not what was put`)
  await scope.close()
  await bus.close()
  return new Set(here)
}

it(`two stores of one process, one with room for all, one so full that every block takes another's place, killed ${rounds} times under load, serve only whole blocks, and all that they had on disk`, async () => {
  const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
  const stores = [
    { folder: join(folder, "wide"), blockBytes, memoryBytes: 4_000_000, diskBytes: 4_000_000_000 },
    { folder: join(folder, "full"), blockBytes, memoryBytes: 1_000_000, diskBytes: 1_500_000 },
  ]
  const put: Array<Array<number>> = [[], []]
  let confirmed = 0
  for (let round = 0; round < rounds; round++) {
    const orders = stores.map((store) => ({ ...store, firstBlock: round * roundBlocks }))
    const killed = await putAndKill(orders, 2 + (round % 2), Math.random() * 15)
    for (const [i, { onDisk, last }] of killed.entries()) {
      const { firstBlock, folder: of, diskBytes } = orders[i]!
      put[i]!.push(...Array.from({ length: last + 1_000 - firstBlock }, (_, n) => firstBlock + n))
      const here = await served(orders[i]!, put[i]!)
      if (i === 0) {
        confirmed += onDisk.length
        expect(onDisk.filter((n) => !here.has(n))).toEqual([])
        if (round % 3 !== 2) continue
        rmSync(of, { recursive: true })
        put[i]!.length = 0
      } else {
        const [file] = readdirSync(of).filter((found) => found.endsWith(".kv"))
        if (round > 0) expect(here.size).toBeGreaterThan(0)
        if (file !== undefined) expect(statSync(join(of, file)).size).toBeLessThanOrEqual(diskBytes)
        put[i]!.splice(0, put[i]!.length, ...here)
      }
    }
  }
  expect(confirmed).toBeGreaterThan(16 * rounds)
  for (const [line] of complaint.mock.calls) expect(line).toMatch(/a block is skipped: it is damaged/) // at the end of a file that was growing
  complaint.mockRestore()
}, 120_000)
