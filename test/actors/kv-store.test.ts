/** The KV store: what it keeps, what it forgets, and that a prefix found there gives the tokens that computing it gives. */
import { randomUUID } from "node:crypto"
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Effect } from "effect"
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { readEnv } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import { loadTopology } from "../../config/load-topology.ts"
import type { KvDtype } from "../../kernels/index.ts"
import type { Topology } from "../../config/topology.ts"
import { chainHashes, hashRoot } from "../../actors/engine/block-hash.ts"
import { MeasuredCosts } from "../../actors/cost/measured-costs.ts"
import { Engine } from "../../actors/engine/engine.ts"
import type { KvLayout } from "../../actors/engine/worker.ts"
import { bufferSink, bufferSource } from "../../actors/kv-store/block-buffers.ts"
import { kvStoreActor } from "../../actors/kv-store/kv-store.ts"
import { packHashes } from "../../actors/messages/hashes.ts"
import { Get, Have, Put } from "../../actors/messages/kv-store.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { runComponent } from "../../actors/node/component.ts"
import { fetchPrefix } from "../../actors/prefill/fetch-prefix.ts"
import { StoreWriter } from "../../actors/decode/store-writer.ts"
import { header } from "../../actors/runtime/bus.ts"
import { encodeFault, type MessageType } from "../../actors/runtime/codec.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { TransferReceiver } from "../../actors/transfer/transfer-receiver.ts"
import { TransferSender } from "../../actors/transfer/transfer-sender.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { Cluster } from "../support/cluster.ts"
import { FakeKernels } from "../support/fake-kernels.ts"
import { Generation, specOf } from "../support/generation.ts"
import { testScope, until, type TestScope } from "../support/scoped.ts"
import { writeTinyModel } from "../support/tiny-model.ts"

const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)
/** The layout of FakeKernels' blocks of 4 tokens. */
const kv = { dtype: "f16", blockTokens: 4, layers: 1, layerBlockBytes: 16 } as const
const hash = (n: number): string => String(n).padStart(16, "h")

describe("a KV store", () => {
  let bus: MemoryBus
  let scope: TestScope
  let link: Link
  beforeEach(async () => {
    bus = new MemoryBus()
    scope = testScope()
    link = new Link(bus, "test", 1)
    await scope.start(kvStoreActor({ link: new Link(bus, "kv-store k0", 1), buses: { control: bus, bulk: bus }, namespace: "test", id: "k0", memoryBytes: 1000 }))
  })
  afterEach(async () => {
    await scope.close()
    await bus.close()
  })

  const to = (verb: string) => subject("test", "kv-store", anyId, verb)
  const hop = { hop: "kv-store" }
  const layoutOf = (size: number): KvLayout => ({ dtype: "f16", blockTokens: 4, layers: 1, layerBlockBytes: size })
  const ends = { get control() { return bus }, get bulk() { return bus }, namespace: "test", creditBytes: 1 << 20, hop: "kv-store" }
  const ask = <A, R>(type: MessageType<A, R, "ask">, message: A) => Effect.runPromise(link.ask(type, to(type.verb), message, hop))
  const have = async (numbers: ReadonlyArray<number>, formatId = "f") => (await ask(Have, { formatId, hashes: packHashes(numbers.map(hash)) })).present
  /** Puts blocks of one size, `only` so many of those that are wanted. */
  const putAll = async (entries: ReadonlyArray<readonly [n: number, bytes: Uint8Array]>, formatId = "f", only = entries.length) => {
    const layout = layoutOf(entries[0]![1].byteLength)
    const { wanted, transferId } = await ask(Put, { formatId, hashes: packHashes(entries.map(([n]) => hash(n))), layout })
    const blocks = entries.flatMap(([, bytes], i) => (wanted[i] === true ? [bytes] : []))
    if (blocks.length === 0) return { wanted }
    const sender = new TransferSender({ ...ends, transferId, source: bufferSource(layout, blocks, 0) })
    blocks.slice(0, only).forEach((_, place) => sender.send({ firstLayer: 0, layers: 1, firstBlock: place, blocks: 1 }))
    if (only < blocks.length) return { wanted, sender }
    sender.finish([])
    await sender.done
    return { wanted }
  }
  const put = async (n: number, bytes: Uint8Array, formatId = "f") => (await putAll([[n, bytes]], formatId)).wanted[0]
  /** The first byte of each block, or undefined where they are not sent. */
  const get = async (numbers: ReadonlyArray<number>, formatId = "f", size = 10) => {
    const blocks = numbers.map(() => new Uint8Array(size))
    const transferId = randomUUID().replaceAll("-", "")
    const receiver = new TransferReceiver({ ...ends, transferId, sink: bufferSink(layoutOf(size), blocks), firstBlock: 0, blocks: numbers.length })
    const { sent } = await ask(Get, { formatId, hashes: packHashes(numbers.map(hash)), layout: layoutOf(size), transferId, firstBlock: 0, creditBytes: 1 << 20 })
    if (sent) await receiver.done
    receiver.close()
    return sent ? blocks.map((block) => block[0]!) : undefined
  }
  const block = (n: number, size = 10) => new Uint8Array(size).fill(n)

  it("says what it has, and sends blocks that are all there, in order", async () => {
    for (const n of [1, 2, 3, 5]) expect(await put(n, block(n))).toBe(true)
    expect(await have([1, 2, 3, 4, 5])).toEqual([true, true, true, false, true])
    expect(await get([1, 2, 3])).toEqual([1, 2, 3])
    expect(await get([3, 4, 5])).toBeUndefined()
    expect(await get([])).toBeUndefined()
  })

  it("keeps formats apart", async () => {
    await put(1, block(1), "a")
    await put(1, block(2), "b")
    expect([await get([1], "a"), await get([1], "b"), await get([1], "c")]).toEqual([[1], [2], undefined])
  })

  it("forgets the blocks that were used least recently beyond its bytes", async () => {
    for (const n of upTo(9)) await put(n, block(n, 100))
    await get([0], "f", 100)
    expect(await put(0, block(99, 100))).toBe(false) // here already: only touched
    await put(9, block(9, 100)) // above the high watermark: down to the low one
    await put(11, block(11, 200), "large")
    expect([await have(upTo(10)), await have([11], "large")]).toEqual([[true, false, false, false, ...upTo(6).map(() => true)], [true]])
    expect(await get([0], "f", 100)).toEqual([0])
    expect(await put(12, block(12, 1001), "larger")).toBe(false)
  })

  it("shows nothing of a put that has come only in part, and forgets it when its sender gives up", async () => {
    const { sender } = await putAll([[1, block(1)], [2, block(2)]], "f", 1)
    await new Promise((resolve) => setImmediate(resolve))
    expect(await have([1, 2])).toEqual([false, false])
    sender!.fail(new Fault({ code: "cancelled", message: "gone", hop: "test" }))
    expect(await have([1, 2])).toEqual([false, false])
    expect((await putAll([[1, block(1)], [2, block(2)]])).wanted).toEqual([true, true])
    expect(await get([1, 2])).toEqual([1, 2])
  })

  it("wants nothing more while as many transfers are open as it may have, and goes on when they end", async () => {
    const open = await Promise.all(upTo(limits.storeTransfers).map((n) => putAll([[n, block(n, 5)], [1000 + n, block(n, 5)]], "f", 1)))
    expect(await put(5000, block(1, 5))).toBe(false)
    for (const { sender } of open) sender!.fail(new Fault({ code: "cancelled", message: "gone", hop: "test" }))
    await new Promise((resolve) => setImmediate(resolve))
    expect(await put(5000, block(1, 5))).toBe(true)
  })

  const gone = new Fault({ code: "cancelled", message: "gone", hop: "test" })

  it("wants no more than it has room for beside what is coming, and more when that has come or is given up", async () => {
    for (const n of [1, 2]) await put(n, block(n, 300))
    const first = await putAll(upTo(4).map((n) => [10 + n, block(n, 300)] as const), "f", 1)
    expect(first.wanted).toEqual([true, true, true, false])
    expect(await have([1, 2])).toEqual([false, false]) // their room is reserved
    expect(await put(20, block(1, 300))).toBe(false)
    first.sender!.fail(gone)
    expect((await putAll(upTo(3).map((n) => [20 + n, block(n, 300)] as const))).wanted).toEqual([true, true, true])
    expect(await have([20, 21, 22])).toEqual([true, true, true])
    expect(await put(30, block(1, 300))).toBe(true)
  })

  it("wants a block that is on its way, or named twice, once; and again when it did not come", async () => {
    const first = await putAll([[1, block(1)], [2, block(2)], [1, block(1)]], "f", 1)
    expect(first.wanted).toEqual([true, true, false])
    expect((await putAll([[2, block(2)], [3, block(3)]])).wanted).toEqual([false, true])
    expect(await put(2, block(2), "another")).toBe(true)
    first.sender!.fail(gone)
    expect((await putAll([[1, block(1)], [2, block(2)], [3, block(3)]])).wanted).toEqual([true, true, false])
  })

  const refusal = (asked: Promise<unknown>) => asked.then(() => undefined, (fault: Fault) => fault)

  it("takes the layout of a format from its first put, and refuses others by name", async () => {
    await put(1, block(1))
    const refused = { code: "invalid_request", message: expect.stringMatching(/kv-store k0: format f has blocks of 1 layers of 10 bytes .*, not of 1 layers of 12 bytes/) }
    expect(await refusal(put(2, block(2, 12)))).toMatchObject(refused)
    expect(await refusal(get([1], "f", 12))).toMatchObject(refused)
    expect(await put(2, block(2, 12), "another")).toBe(true)
    expect(await get([1])).toEqual([1])
    for (const n of upTo(limits.storeFormats)) await put(1, block(1, 1), `format ${n}`)
    expect(await put(2, block(2, 12))).toBe(true) // long ago, and forgotten; its blocks of another size are not sent for these
    expect(await get([1, 2], "f", 12)).toBeUndefined()
  })

  it("refuses a layout, a transfer id, a credit or a place that is none, by the field's name", async () => {
    const good = { formatId: "f", hashes: packHashes([hash(1)]), layout: layoutOf(10), transferId: "0123456789abcdef".repeat(2), firstBlock: 0, creditBytes: 1 }
    const layouts = [{ layers: 0 }, { layers: limits.kvLayers + 1 }, { layerBlockBytes: 0 }, { layerBlockBytes: limits.kvLayerBlockBytes + 1 }, { blockTokens: 1.5 }]
    for (const wrong of layouts) {
      const refused = { code: "invalid_request", message: expect.stringContaining(Object.keys(wrong)[0]!) }
      const asked = { ...good, layout: { ...good.layout, ...wrong } }
      for (const answer of [ask(Put, asked), ask(Get, asked)]) expect(await refusal(answer)).toMatchObject(refused)
    }
    const huge = { ...good, layout: { ...good.layout, layers: limits.kvLayers, layerBlockBytes: limits.kvLayerBlockBytes } }
    expect(await refusal(ask(Put, huge))).toMatchObject({ code: "invalid_request", message: expect.stringContaining(String(limits.kvBlockBytes)) })
    for (const wrong of [{ transferId: "a" }, { transferId: `${"0".repeat(31)}*` }, { transferId: `${good.transferId}\n` }, { creditBytes: 0 }, { creditBytes: limits.kvCreditBytes + 1 }, { firstBlock: -1 }, { firstBlock: 2 ** 53 }])
      expect(await refusal(ask(Get, { ...good, ...wrong }))).toMatchObject({ code: "invalid_request", message: expect.stringContaining(Object.keys(wrong)[0]!) })
    expect(await ask(Get, good)).toEqual({ sent: false })
  })

  describe("for a worker's engine", () => {
    const spec = specOf("a", upTo(30).map((i) => 10 + i), { maxTokens: 4 })
    const formatId = "fake"
    const computed = async () => {
      const writer = new StoreWriter()
      const engine = new Engine(new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 }), { name: "worker donor", maxBatch: 4, events: { stored: (stored) => writer.stored(stored), removed: () => {} } })
      await scope.start(writer.run({ link, buses: ends, namespace: "test", worker: { engine, formatId, kv } }))
      const { tokens } = await new Generation(engine, spec).run()
      return { engine, tokens }
    }
    const fetchInto = async (more: { readonly formatId?: string; readonly namespace?: string } = {}) => {
      const engine = new Engine(new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 }), { name: "worker w0", maxBatch: 4 })
      const generation = new Generation(engine, spec)
      await generation.reserved
      const fetched = await Effect.runPromise(fetchPrefix({ link, buses: ends, namespace: more.namespace ?? "test", worker: { engine, formatId: more.formatId ?? formatId, kv, costs: new MeasuredCosts() }, missing: engine.missingKv("a") }))
      await generation.run()
      engine.checkInvariants()
      return { fetched, generation, engine }
    }
    const stored = (numbers: number) => chainHashes(spec.hashRoot, spec.prompt, 4).slice(0, numbers)
    const isStored = async () => (await Effect.runPromise(link.ask(Have, to(Have.verb), { formatId, hashes: packHashes(stored(7)) }, hop))).present.every((here) => here)

    it("is filled in the background, and what is fetched is not computed, with the same tokens", async () => {
      const { tokens } = await computed()
      while (!(await isStored()));
      const { fetched, generation, engine } = await fetchInto()
      expect([fetched, generation.cachedTokens, engine.counters.cachedTokens]).toEqual([7, 28, 28])
      expect(generation.tokens).toEqual(tokens)
    })

    it("is missed, and nothing worse, where it is not there or has another format", async () => {
      const { tokens } = await computed()
      while (!(await isStored()));
      for (const more of [{ namespace: "another" }, { formatId: "another" }]) {
        const { fetched, generation } = await fetchInto(more)
        expect([fetched, generation.cachedTokens]).toEqual([0, 0])
        expect(generation.tokens).toEqual(tokens)
      }
    })

    it("is left alone from the moment that the generation is given up", async () => {
      const { engine: donor } = await computed()
      while (!(await isStored()));
      await donor.close()
      const engine = new Engine(new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 }), { name: "worker w0", maxBatch: 4 })
      const generation = new Generation(engine, spec)
      await generation.reserved
      const fetching = Effect.runPromise(fetchPrefix({ link, buses: ends, namespace: "test", worker: { engine, formatId, kv, costs: new MeasuredCosts() }, missing: engine.missingKv("a") }))
      engine.cancel("a")
      expect(await fetching).toBe(0)
      engine.checkInvariants()
      expect(engine.blocks.available).toBe(12)
    })
  })
})

describe("a conversation whose blocks have left the pool", () => {
  const prompt = "The water comes down the penstock and turns the wheel, and the wheel turns the stones that grind the corn. ".repeat(2)
  const start = (kvStore: Partial<Topology["kvStore"]>, dtype: KvDtype = "f16") =>
    Cluster.start({ change: (topology) => ({ ...topology, kvStore: { ...topology.kvStore, ...kvStore }, workers: topology.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: 16, dtype } })) }) })
  /** Asks, waits until its blocks are stored or cannot be, has others push it out of the pool, and asks again. */
  const twice = async (cluster: Cluster, isKept: boolean, replicas = 1) => {
    const { worker } = cluster.node.workers.get("w0")!
    const first = await cluster.generate({ prompt })
    const root = hashRoot({ modelDigest: "0".repeat(64), tenant: "tests", cacheSalt: undefined })
    const hashes = chainHashes(root, Int32Array.from(first.promptTokens), worker.engine.blockTokens)
    expect(hashes.length).toBeGreaterThan(2)
    expect(worker.engine.blocks.countPrefix(hashes)).toBe(hashes.length)
    const ask = cluster.link.ask(Have, subject(cluster.node.namespace, "kv-store", anyId, Have.verb), { formatId: worker.formatId, hashes: packHashes(hashes) }, { hop: "kv-store" })
    // Each store in its turn: one that has just started hears of the others within a beat.
    for (let know = 0; isKept && know < replicas; ) know = (await Effect.runPromise(ask)).present.every((here) => here) ? know + 1 : 0
    for (let i = 0; worker.engine.blocks.countPrefix(hashes) > 0; i++) await cluster.generate({ prompt: upTo(150).map((token) => 3 + ((token * 7 + i) % 250)), maxTokens: 1 })
    return { first, second: await cluster.generate({ prompt }), hashes }
  }

  it.each([
    ["f16", 1],
    ["f16", 3],
    ["int8", 1],
    ["int4", 1],
  ] as const)("is found in the store, in %s, where there are stores (%i): only the rest is computed, and the tokens are the same", async (dtype, replicas) => {
    const cluster = (await start({ replicas }, dtype)).fetchAlways()
    const { first, second, hashes } = await twice(cluster, true, replicas)
    expect(first.usage.cachedTokens).toBe(0)
    expect(second.usage.cachedTokens).toBe(16 * Math.min(hashes.length, Math.floor((first.promptTokens.length - 1) / 16)))
    expect(second.tokens).toEqual(first.tokens)
    await cluster.untilIdle()
    await cluster.stop()
  })

  it.each([
    ["without a store", { replicas: 0 }],
    ["with a store that keeps nothing", { memory: 1, disk: { path: "auto", size: 0 } }],
  ])("is computed again %s, with the same tokens and no error", async (_, kvStore) => {
    const cluster = await start(kvStore)
    const { first, second } = await twice(cluster, false)
    expect(second.usage.cachedTokens).toBe(0)
    expect(second.tokens).toEqual(first.tokens)
    await cluster.untilIdle()
    await cluster.stop()
  })
})

describe("a conversation that goes on after a restart", () => {
  const prompt = "A mill stands at the river, and the river turns its wheel by day and by night, whoever sleeps and whoever wakes. ".repeat(2)
  let folder: string
  beforeEach(() => (folder = mkdtempSync(join(tmpdir(), "penstock-restart-"))))
  afterEach(() => rmSync(folder, { recursive: true, force: true }))
  const start = (kvStore: Partial<Topology["kvStore"]> = {}) =>
    Cluster.start({ change: (topology) => ({ ...topology, kvStore: { ...topology.kvStore, disk: { path: folder, size: 2 ** 28 }, ...kvStore }, workers: topology.workers.map((worker) => ({ ...worker, threads: 1 })) }) })
  /** Asks as this tenant, waits until all is stored, and stops. */
  const once = async (asked: { readonly tenant?: string; readonly cacheSalt?: string }) => {
    const cluster = await start()
    const { worker } = cluster.node.workers.get("w0")!
    const first = await cluster.generate({ prompt, ...asked })
    const root = hashRoot({ modelDigest: "0".repeat(64), tenant: asked.tenant ?? "tests", cacheSalt: asked.cacheSalt })
    const hashes = chainHashes(root, Int32Array.from(first.promptTokens), worker.engine.blockTokens)
    const ask = cluster.link.ask(Have, subject(cluster.node.namespace, "kv-store", anyId, Have.verb), { formatId: worker.formatId, hashes: packHashes(hashes) }, { hop: "kv-store" })
    while (!(await Effect.runPromise(ask)).present.every((here) => here));
    await cluster.untilIdle()
    await cluster.stop()
    return first
  }
  const full = (tokens: ReadonlyArray<number>) => 16 * Math.floor((tokens.length - 1) / 16)

  it("finds its blocks on disk: only the rest is computed, and the tokens are the same", async () => {
    const first = await once({})
    const cluster = (await start()).fetchAlways()
    const second = await cluster.generate({ prompt })
    expect([first.usage.cachedTokens, second.usage.cachedTokens]).toEqual([0, full(first.promptTokens)])
    expect(second.tokens).toEqual(first.tokens)
    await cluster.stop()
    const without = await start({ disk: { path: folder, size: 0 } })
    const third = await without.generate({ prompt })
    expect([third.usage.cachedTokens, third.tokens]).toEqual([0, first.tokens])
    await without.stop()
  })

  it("never finds those of another tenant or another cache_salt", async () => {
    const first = await once({ tenant: "alice", cacheSalt: "salt" })
    const cluster = (await start()).fetchAlways()
    const cached = async (tenant: string, cacheSalt?: string) => {
      const { usage, tokens } = await cluster.generate({ prompt, tenant, ...(cacheSalt === undefined ? {} : { cacheSalt }) })
      expect(tokens).toEqual(first.tokens)
      return usage.cachedTokens
    }
    expect([await cached("bob", "salt"), await cached("alice"), await cached("alice", "pepper")]).toEqual([0, 0, 0])
    expect(await cached("alice", "salt")).toBe(full(first.promptTokens))
    await cluster.stop()
  })

  it.each(["lru", "lfu", "length-aware"] as const)("gets the same tokens where the tiers are too small for it and give up blocks all the time (%s)", async (eviction) => {
    const block = 4096
    const cluster = await Cluster.start({
      change: (topology) => ({
        ...topology,
        kvStore: { ...topology.kvStore, eviction, memory: 10 * block, disk: { path: folder, size: 20 * block } },
        workers: topology.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: 16 } })),
      }),
    })
    expect(cluster.node.workers.get("w0")!.kernels.info.blockBytes).toBe(block)
    const asked = upTo(6).map((i) => ({ prompt: upTo(100).map((token) => 3 + ((token * 7 + i) % 250)) }))
    cluster.fetchAlways()
    const alone = []
    for (const request of asked) alone.push((await cluster.generate(request)).tokens)
    expect((await Promise.all(asked.map((request) => cluster.generate(request)))).map(({ tokens }) => tokens)).toEqual(alone)
    await cluster.stop()
  })
})

it("a worker of both roles does not start where its blocks would not fit the bus to the store, and does without a bus to others", async () => {
  const folder = mkdtempSync(join(tmpdir(), "penstock-kv-store-"))
  const path = join(folder, "tiny.gguf")
  await writeTinyModel(path)
  const { topology } = loadTopology("config/topologies/single.yaml", {})
  const model = { name: "tiny", aliases: [], path, sha256: "0".repeat(64) }
  const start = (name: "memory" | "nats") => {
    const bus = Object.defineProperty(new MemoryBus({ maxPayloadBytes: 1000 }), "name", { value: name })
    const serving = Effect.die("it serves")
    return Effect.runPromise(Effect.scoped(Effect.exit(runComponent({ kind: "worker", id: topology.workers[0]!.name }, 1, { topology, model, namespace: "test", env: readEnv({}), buses: { control: bus, bulk: bus } }, serving)))).finally(() => bus.close())
  }
  expect(String(await start("nats"))).toMatch(/bus nats: its messages hold 1000 bytes.*lower kv\.blockTokens/)
  expect(String(await start("memory"))).toContain("it serves")
  rmSync(folder, { recursive: true })
})

it("a store that refuses what is computed is told of once, and once more when it has worked in between", async () => {
  const bus = new MemoryBus()
  const scope = testScope()
  const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
  const link = new Link(bus, "store-writer w0", 1)
  const writer = new StoreWriter()
  const engine = new Engine(new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 }), { name: "worker w0", maxBatch: 4 })
  await scope.start(writer.run({ link, buses: { control: bus, bulk: bus }, namespace: "test", worker: { engine, formatId: "f", kv } }))
  let asked = 0
  const storeOne = async () => {
    const before = asked
    writer.stored(hash(asked))
    await until(() => asked > before)
  }
  const refused = new Fault({ code: "overloaded", message: "kv-store k0: no room at all", hop: "kv-store" })
  let answer: Fault | undefined
  bus.subscribe(subject("test", "kv-store", anyId, Have.verb), ({ reply }) => {
    asked++
    if (answer === undefined) link.reply(Have, reply!, { present: [true] })
    else bus.publish(reply!, encodeFault(answer), { headers: { [header.fault]: answer.code } })
  })
  for (const next of [refused, refused, undefined, refused]) {
    answer = next
    await storeOne()
  }
  await until(() => complaint.mock.calls.length === 2)
  for (const [line] of complaint.mock.calls) expect(line).toMatch(/^store-writer w0: .*KV store.*no room at all$/)
  complaint.mockRestore()
  await scope.close()
  await engine.close()
  await bus.close()
})

it("a store that does not answer costs a deadline and not the answer", async () => {
  const bus = new MemoryBus()
  const link = new Link(bus, "test", 1)
  const silent = new Promise<void>((resolve) => bus.subscribe(subject("test", "kv-store", anyId, Have.verb), () => resolve()))
  const engine = new Engine(new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 }), { name: "worker w0", maxBatch: 4 })
  const generation = new Generation(engine, specOf("a", upTo(20), { maxTokens: 2 }))
  await generation.reserved
  const fetching = Effect.runPromise(fetchPrefix({ link, buses: { control: bus, bulk: bus }, namespace: "test", worker: { engine, formatId: "f", kv, costs: new MeasuredCosts() }, missing: engine.missingKv("a") }))
  await silent
  expect(await fetching).toBe(0)
  await generation.run()
  expect(generation.tokens[0]).toHaveLength(2)
  await until(() => engine.requestIds.length === 0)
  await bus.close()
}, 10 * limits.storeDeadlineMs)
