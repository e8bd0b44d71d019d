/** The KV store's disk tier: what it keeps over a restart, and that nothing it cannot vouch for is ever served. */
import { execFileSync } from "node:child_process"
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, truncateSync, writeFileSync } from "node:fs"
import { open } from "node:fs/promises"
import { hostname, tmpdir } from "node:os"
import { join } from "node:path"
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { kvStoreActor, type KvStoreOptions, type RunningStore } from "../../actors/kv-store/kv-store.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { testScope, until } from "../support/scoped.ts"
import { StoreClient } from "../support/store-client.ts"

const blockBytes = 4000
const slotBytes = 4096
const blocks = (from: number, count: number): Array<number> => Array.from({ length: count }, (_, i) => from + i)

interface StartedStore extends RunningStore {
  readonly client: StoreClient
  stop(): Promise<void>
}

let root: string
let folder: string
let warned: Array<ReadonlyArray<unknown>>
const stops: Array<() => Promise<void>> = []
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), "penstock-kv-disk-"))
  folder = join(root, "kv", "k0")
  warned = vi.spyOn(console, "error").mockImplementation(() => {}).mock.calls
})
afterEach(async () => {
  for (const stop of stops.splice(0)) await stop()
  vi.restoreAllMocks()
  rmSync(root, { recursive: true, force: true })
})

/** What was said since the last time. */
const warnings = (): ReadonlyArray<string> => warned.splice(0).map(([line]) => String(line))

/** A store with memory for 20 blocks, of which 18 stay, and disk for so many as asked. */
const start = async (options: Partial<KvStoreOptions> & { readonly diskBlocks?: number; readonly size?: number } = {}): Promise<StartedStore> => {
  const bus = new MemoryBus()
  const buses = { control: bus, bulk: bus }
  const scope = testScope()
  const disk = { folder, bytes: slotBytes * (options.diskBlocks ?? 1000) }
  const store = await scope.start(kvStoreActor({ link: new Link(bus, "kv-store k0", 1), buses, namespace: "test", id: "k0", memoryBytes: 20 * blockBytes, disk, ...options }))
  let stopped = false
  const stop = async () => {
    if (stopped) return
    stopped = true
    await scope.close()
    await bus.close()
  }
  stops.push(stop)
  return { ...store, client: new StoreClient(buses, options.size ?? blockBytes), stop }
}

/** Puts so many blocks, five at a time, and waits until they are written. */
const fill = async (store: StartedStore, numbers: ReadonlyArray<number>, formatId = "f"): Promise<void> => {
  for (let i = 0; i < numbers.length; i += 5) {
    expect(await store.client.put(numbers.slice(i, i + 5), { formatId, firstDepth: i })).not.toContain(false)
    await until(() => !store.isWriting())
  }
}

/** The file of the only format. */
const file = (): string => join(folder, readdirSync(folder).find((name) => name.endsWith(".kv"))!)

describe("a KV store with a disk", () => {
  it("sends from disk what has left the memory, and from memory what it has sent", async () => {
    const store = await start()
    await fill(store, blocks(0, 60))
    expect(store.figures()).toMatchObject({ memory: { blocks: 18, evictions: 42 }, disk: { blocks: 60, bytes: 60 * slotBytes, evictions: 0 } })
    expect(await store.client.intact(blocks(0, 10))).toBe(true)
    expect(store.figures()).toMatchObject({ memory: { hits: 0, misses: 10 }, disk: { hits: 10, misses: 0 } })
    expect(await store.client.intact(blocks(0, 10))).toBe(true)
    expect(store.figures()).toMatchObject({ memory: { hits: 10, misses: 10 }, disk: { hits: 10 } })
    expect(await store.client.have([0, 99], { toFetch: true })).toEqual([true, false])
    expect(store.figures()).toMatchObject({ memory: { misses: 11 }, disk: { misses: 1 } })
  })

  it("has after a restart what it had before, also what was put just before it ended", async () => {
    const store = await start()
    await fill(store, blocks(0, 30))
    await store.client.put(blocks(30, 5))
    await store.stop()
    const again = await start()
    expect(await again.client.have(blocks(0, 36))).toEqual([...blocks(0, 35).map(() => true), false])
    for (const from of [0, 10, 20]) expect(await again.client.intact(blocks(from, 15))).toBe(true)
    expect(warnings()).toEqual([])
  })

  it("keeps to its bytes, fills the place of what it gave up, and gives up what was used least recently, over a restart too", async () => {
    const store = await start({ diskBlocks: 40 })
    await fill(store, blocks(0, 30))
    await store.client.get([0, 1])
    await fill(store, blocks(30, 60))
    expect(statSync(file()).size).toBeLessThanOrEqual(40 * slotBytes)
    expect(store.figures().disk!.evictions).toBeGreaterThanOrEqual(50)
    await store.client.get([60])
    await store.stop()
    const again = await start({ diskBlocks: 40 })
    const had = await again.client.have(blocks(0, 90))
    expect(had.slice(0, 50)).not.toContain(true)
    expect(had.slice(60)).not.toContain(false)
    await fill(again, blocks(90, 20))
    expect((await again.client.have(blocks(80, 30))).every((is) => is)).toBe(true)
    expect(await again.client.intact(blocks(95, 10))).toBe(true)
  })

  it("shares its bytes between formats: a new one takes its room from the file that was used least recently", async () => {
    const store = await start({ diskBlocks: 40 })
    await fill(store, blocks(0, 30), "old")
    await fill(store, blocks(0, 30), "new")
    const files = readdirSync(folder).filter((name) => name.endsWith(".kv"))
    expect(files.reduce((sum, name) => sum + statSync(join(folder, name)).size, 0)).toBeLessThanOrEqual(40 * slotBytes)
    expect(await store.client.have(blocks(0, 30), { formatId: "new" })).not.toContain(false)
    expect(await store.client.intact(blocks(0, 10), { formatId: "new" })).toBe(true)
    const left = (await store.client.have(blocks(0, 30), { formatId: "old" })).flatMap((is, n) => (is ? [n] : []))
    for (const n of left) expect(await store.client.intact([n], { formatId: "old" })).toBe(true)
    expect(await store.client.get([0], { formatId: "another" })).toBeUndefined()
    await fill(store, blocks(30, 60), "new")
    expect(readdirSync(folder).filter((name) => name.endsWith(".kv"))).toHaveLength(1)
  })

  it("gives back what a smaller limit after a restart leaves no room for", async () => {
    const store = await start({ diskBlocks: 100 })
    await fill(store, blocks(0, 60))
    await store.stop()
    const again = await start({ diskBlocks: 20 })
    expect(statSync(file()).size).toBeLessThanOrEqual(20 * slotBytes)
    for (const [n, is] of (await again.client.have(blocks(0, 60))).entries()) expect(await again.client.intact([n])).toBe(is)
  })

  it("does not send what it cannot read into memory at once, and sends it in parts", async () => {
    const store = await start()
    await fill(store, blocks(0, 60))
    expect(await store.client.get(blocks(0, 25))).toBeUndefined()
    for (const from of [0, 10, 20]) expect(await store.client.intact(blocks(from, 10))).toBe(true)
  })

  it("keeps its folder from other users, and from other processes by name", async () => {
    const store = await start()
    expect([statSync(folder).mode & 0o777, statSync(join(root, "kv")).mode & 0o777]).toEqual([0o700, 0o700])
    await fill(store, blocks(0, 5))
    expect(statSync(file()).mode & 0o777).toBe(0o600)
    const second = await start()
    expect(warnings()).toEqual([expect.stringMatching(new RegExp(`^kv-store k0: blocks are kept in memory only.*${join(folder, "lock")}.*held by process ${process.pid}.*; end that process, or delete the file if it is gone$`))])
    expect([second.figures().disk, await second.client.put([1]), await second.client.intact([1])]).toEqual([undefined, [true], true])
  })

  it("takes the lock of a process that is dead, in a container also of one that had its own process id", async () => {
    for (const pid of [2 ** 22 + 1, process.pid]) {
      mkdirSync(folder, { recursive: true })
      writeFileSync(join(folder, "lock"), `${hostname()} ${pid} ${pid}.earlier`)
      const store = await start()
      expect(store.figures().disk).toBeDefined()
      await store.stop()
      expect(existsSync(join(folder, "lock"))).toBe(false)
    }
    expect(warnings()).toEqual([])
  })
})

describe("what is on disk", () => {
  const flip = (path: string, at: number): void => {
    const bytes = readFileSync(path)
    bytes[at]! ^= 0x10
    writeFileSync(path, bytes)
  }
  const stored = async (): Promise<void> => {
    const store = await start()
    await fill(store, blocks(0, 10))
    await store.stop()
  }
  const offsetOf = (slot: number): number => 4096 + slot * slotBytes

  it.each([
    ["a block", 64 + 1234, /\.kv: a block is skipped: it is damaged$/],
    ["a block's first byte", 64, /\.kv: a block is skipped: it is damaged$/],
    ["a checksum", 36, /\.kv: 2 blocks are skipped: they are damaged$/],
    ["a hash", 9, /\.kv: 2 blocks are skipped: they are damaged$/],
    ["a magic number", 0, /\.kv: 2 blocks are skipped: they are damaged$/],
    ["a time", 26, /\.kv: 2 blocks are skipped: they are damaged$/],
  ])("is not served, and that is said once, where a byte of %s is flipped; the others are", async (_, at, said) => {
    await stored()
    for (const slot of [3, 7]) flip(file(), offsetOf(slot) + at)
    const store = await start()
    const served = []
    for (const n of blocks(0, 10)) served.push(await store.client.intact([n]))
    expect(served.filter((is) => is)).toHaveLength(8)
    expect(warnings()).toEqual([expect.stringMatching(said)])
    const gone = served.flatMap((is, n) => (is ? [] : [n]))
    expect(await store.client.have(gone)).toEqual([false, false])
    expect(await store.client.put(gone)).toEqual([true, true])
    expect(await store.client.intact(gone)).toBe(true)
  })

  it("is served up to where the file was cut off, in the middle of a block or of its record", async () => {
    for (const [bytes, left] of [[offsetOf(6) + 2000, 6], [offsetOf(4) + 20, 4], [offsetOf(2) + 64 + blockBytes, 3], [4096, 0]] as const) {
      rmSync(folder, { recursive: true, force: true })
      await stored()
      truncateSync(file(), bytes)
      const store = await start()
      const had = await store.client.have(blocks(0, 10))
      expect(had.filter((is) => is)).toHaveLength(left)
      expect(warnings()).toEqual(bytes === offsetOf(6) + 2000 || bytes === offsetOf(4) + 20 ? [expect.stringMatching(/a block is skipped: it is damaged$/)] : [])
      for (const [n, is] of had.entries()) expect(await store.client.intact([n])).toBe(is)
      expect(await store.client.put(blocks(0, 10))).toEqual(had.map((is) => !is))
      await store.stop()
    }
  })

  it("is skipped with a warning where it is another program's, or its head is damaged, and goes on being used where it is not", async () => {
    await stored()
    const own = file()
    writeFileSync(join(folder, "notes.txt"), "mine")
    writeFileSync(join(folder, `${"0".repeat(32)}.kv`), readFileSync(own))
    mkdirSync(join(folder, "folder"))
    const store = await start()
    expect(warnings().toSorted()).toEqual([expect.stringContaining(`${"0".repeat(32)}.kv is skipped: its head is damaged, or it is another program's`), expect.stringContaining("folder is skipped"), expect.stringContaining("notes.txt is skipped: it is no file of the KV store")])
    expect(await store.client.intact(blocks(0, 10))).toBe(true)
    await store.stop()
    expect(readFileSync(join(folder, "notes.txt"), "utf8")).toBe("mine")
    flip(own, 30)
    const again = await start()
    expect(warnings().filter((line) => line.includes(own))).toHaveLength(1)
    expect(await again.client.have(blocks(0, 10))).not.toContain(true)
    await fill(again, blocks(0, 10)) // the file is made anew
    await again.stop()
    expect(await (await start()).client.intact(blocks(0, 10))).toBe(true)
  })

  it("is not taken for a block of another layout", async () => {
    await stored()
    const store = await start({ size: blockBytes / 2 })
    expect(await store.client.have([1])).toEqual([true])
    expect(await store.client.get([1])).toBeUndefined()
  })
})

describe("a disk that cannot be used", () => {
  it("costs one line, and the store goes on in memory", async () => {
    writeFileSync(join(root, "kv"), "a file where the folder should be")
    const store = await start()
    expect(warnings()).toEqual([expect.stringMatching(/^kv-store k0: blocks are kept in memory only, until their folder can be used: .*(ENOTDIR|EEXIST)/)])
    expect([await store.client.put([1, 2]), await store.client.intact([1, 2]), store.figures().disk]).toEqual([[true, true], true, undefined])
  })

  it("that is full costs one line, and what is on it is still sent", async () => {
    const store = await start()
    await fill(store, blocks(0, 30))
    const handle = await open(file())
    const write = vi.spyOn(Object.getPrototypeOf(handle) as { write: () => Promise<unknown> }, "write").mockRejectedValue(new Error("ENOSPC: no space left on device, write"))
    await handle.close()
    await fill(store, blocks(30, 30))
    expect(write).toHaveBeenCalledOnce()
    expect(warnings()).toEqual([`kv-store k0: ${folder}: new blocks are kept in memory only, until the disk takes them again: ENOSPC: no space left on device, write`])
    expect(store.figures()).toMatchObject({ memory: { blocks: 18 }, disk: { blocks: 30 } })
    for (const from of [45, 0, 10, 20]) expect(await store.client.intact(blocks(from, 10))).toBe(true)
  })

  it("whose folder is deleted under it harms no request", async () => {
    const store = await start()
    rmSync(folder, { recursive: true })
    await fill(store, blocks(0, 30))
    expect(await store.client.intact(blocks(15, 15))).toBe(true)
    expect(warnings()).toEqual([expect.stringMatching(/new blocks are kept in memory only.*ENOENT/)])
  })

  it("that cannot be read costs the block", async () => {
    const store = await start()
    await fill(store, blocks(0, 30))
    const handle = await open(file())
    vi.spyOn(Object.getPrototypeOf(handle) as { read: () => Promise<unknown> }, "read").mockRejectedValue(new Error("EIO: i/o error, read"))
    await handle.close()
    expect(await store.client.get(blocks(0, 3))).toBeUndefined()
    expect(await store.client.have([0])).toEqual([false])
    expect(await store.client.intact(blocks(25, 5))).toBe(true) // in memory
    expect(warnings()).toEqual([expect.stringMatching(/a block is skipped: EIO/)])
  })
})

it("a pinned block outlives any number of others, in memory and on disk, until it is let go", async () => {
  const store = await start({ diskBlocks: 40 })
  await fill(store, blocks(0, 10))
  expect(await store.client.pin([0, 1, 2, 99], 60_000)).toEqual([true, true, true, false])
  await fill(store, blocks(100, 80))
  expect(await store.client.have(blocks(0, 5))).toEqual([true, true, true, false, false])
  expect(await store.client.intact([0, 1, 2])).toBe(true)
  expect(await store.client.pin(blocks(0, 3), 0)).toEqual([false, false, false])
  await fill(store, blocks(300, 80))
  expect(await store.client.have(blocks(0, 3))).toEqual([false, false, false])
})

it("what a conversation wants kept is kept when it comes, until its next turn or its end, for each of those that want it, and within the bounds of its tenant", async () => {
  const store = await start({ diskBlocks: 40 })
  const { client } = store
  const kept = async (numbers: ReadonlyArray<number>) => {
    await fill(store, blocks((flood += 100), 80))
    return client.have(numbers)
  }
  let flood = 1_000
  const [one, two] = [{ owner: "one" }, { owner: "two" }]
  expect(await client.pin([0, 1], 60_000, one)).toEqual([false, false]) // they are still on their way
  await fill(store, [0, 1, 2, 3])
  expect(await kept([0, 1, 2, 3])).toEqual([true, true, false, false])
  // Its next turn has another end; another conversation begins alike.
  expect(await client.pin([0, 4], 60_000, one)).toEqual([true, false])
  expect(await client.pin([0], 60_000, two)).toEqual([true])
  await fill(store, [4])
  expect(await kept([0, 1, 4])).toEqual([true, false, true])
  await client.pin([], 0, one)
  expect(await kept([0, 4])).toEqual([true, false])
  await client.pin([], 0, { ...two, tenant: "somebody else" })
  expect(await kept([0])).toEqual([true])
  await client.pin([], 0, two)
  expect(await kept([0])).toEqual([false])
  // A quarter of a tier is the most that one tenant gets, half of it all of them.
  const many = blocks(0, 30)
  for (const tenant of ["alice", "bob", "carol"]) {
    await client.pin(many.map((n) => n + 10_000 * (tenant.charCodeAt(0) - 96)), 60_000, { tenant })
    await fill(store, many.map((n) => n + 10_000 * (tenant.charCodeAt(0) - 96)))
  }
  await fill(store, blocks((flood += 100), 80))
  const of = async (tenant: string) => (await client.have(many.map((n) => n + 10_000 * (tenant.charCodeAt(0) - 96)))).filter((is) => is).length
  expect([await of("alice"), await of("bob"), await of("carol")]).toEqual([10, 10, 0])
})

it("the files of a store are found by a name and a head that a person can read", async () => {
  await fill(await start(), blocks(0, 1))
  expect(JSON.parse(execFileSync("head", ["-c", "4096", file()], { encoding: "utf8" }))).toEqual({
    penstock: "KV blocks",
    version: 1,
    formatId: "f",
    layout: { layers: 2, dtype: "f16", blockTokens: 16, layerBlockBytes: 2000 },
  })
})
