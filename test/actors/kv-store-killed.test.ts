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
  await build({ entryPoints: [fileURLToPath(new URL("../support/store-process.ts", import.meta.url))], outfile: program, bundle: true, platform: "node", format: "esm", logLevel: "error" })
  folder = mkdtempSync(join(tmpdir(), "penstock-kv-killed-"))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

/** Runs a store until it has said `words` times what it has on disk, and a moment more, and kills it. Returns what it has said. */
const putAndKill = (order: StoreOrder, words: number, moreMs: number): Promise<{ readonly onDisk: ReadonlyArray<number>; readonly last: number }> =>
  new Promise((resolve, reject) => {
    const child = fork(program, { stdio: ["ignore", "inherit", "pipe", "ipc"] })
    let said = ""
    child.stderr!.on("data", (text: Buffer) => (said += text.toString()))
    const onDisk: Array<number> = []
    let last = order.firstBlock
    let heard = 0
    child.on("message", (report: StoreReport) => {
      onDisk.push(...report.onDisk)
      last = report.next
      if (++heard === words) setTimeout(() => child.kill("SIGKILL"), moreMs)
    })
    child.once("error", reject)
    child.once("exit", (_, signal) => (signal === "SIGKILL" ? resolve({ onDisk, last }) : reject(new Error(`it ended by itself: ${said}`))))
    child.send(order)
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

it.each([
  { name: "with room for all", diskBytes: 4_000_000_000, memoryBytes: 4_000_000 },
  { name: "that is full, so that every block takes another's place", diskBytes: 1_500_000, memoryBytes: 1_000_000 },
])(`a store $name, killed ${rounds} times under load, serves only whole blocks, and all that it had on disk`, async ({ name, diskBytes, memoryBytes }) => {
  const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
  const order = { folder: join(folder, name.slice(0, 4)), blockBytes, memoryBytes, diskBytes }
  const put: Array<number> = []
  for (let round = 0; round < rounds; round++) {
    const firstBlock = round * roundBlocks
    const { onDisk, last } = await putAndKill({ ...order, firstBlock }, 1 + (round % 2), Math.random() * 15)
    put.push(...Array.from({ length: last + 1_000 - firstBlock }, (_, i) => firstBlock + i))
    const here = await served({ ...order, firstBlock }, put)
    expect(here.size).toBeGreaterThan(0)
    if (diskBytes > 1e9) {
      expect(onDisk.filter((n) => !here.has(n))).toEqual([])
      if (round % 3 === 2) {
        rmSync(order.folder, { recursive: true })
        put.length = 0
      }
    } else {
      const [file] = readdirSync(order.folder).filter((found) => found.endsWith(".kv"))
      expect(statSync(join(order.folder, file!)).size).toBeLessThanOrEqual(diskBytes)
      put.splice(0, put.length, ...here)
    }
  }
  for (const [line] of complaint.mock.calls) expect(line).toMatch(/a block is skipped: it is damaged/) // at the end of a file that was growing
  complaint.mockRestore()
}, 120_000)
