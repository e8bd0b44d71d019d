/** Several KV stores: what one was given, all know of; what is asked for often, two have. */
import { randomUUID } from "node:crypto"
import { Effect } from "effect"
import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { MeasuredCosts } from "../../actors/cost/measured-costs.ts"
import { Engine } from "../../actors/engine/engine.ts"
import { chainHashes } from "../../actors/engine/block-hash.ts"
import { kvStoreActor, type RunningStore } from "../../actors/kv-store/kv-store.ts"
import type { PresenceMessage } from "../../actors/messages/presence.ts"
import { fetchPrefix } from "../../actors/prefill/fetch-prefix.ts"
import { StoreWriter } from "../../actors/decode/store-writer.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { packHashes } from "../../actors/messages/hashes.ts"
import { Have } from "../../actors/messages/kv-store.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { limits } from "../../config/limits.ts"
import { FakeKernels } from "../support/fake-kernels.ts"
import { Generation, specOf } from "../support/generation.ts"
import { testScope, until, type TestScope } from "../support/scoped.ts"
import { StoreClient } from "../support/store-client.ts"

const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)

describe("three KV stores", () => {
  let bus: MemoryBus
  let client: StoreClient
  const scopes = new Map<string, TestScope>()
  const stores = new Map<string, RunningStore>()
  const members: Array<PresenceMessage> = []
  beforeEach(async () => {
    bus = new MemoryBus()
    const buses = { control: bus, bulk: bus }
    client = new StoreClient(buses)
    members.length = 0
    for (const id of ["k0", "k1", "k2"]) {
      const scope = testScope()
      scopes.set(id, scope)
      stores.set(id, await scope.start(kvStoreActor({ link: new Link(bus, `kv-store ${id}`, 1), buses, namespace: "test", id, memoryBytes: 1_000_000, members: { all: members } })))
      members.push({ kind: "kv-store", id, node: "here", pid: 1, epoch: 1, state: "serving" })
    }
  })
  afterEach(async () => {
    for (const scope of scopes.values()) await scope.close()
    await bus.close()
  })
  const holders = async (n: number) => {
    const found = []
    for (const id of stores.keys()) if ((await client.have([n], { to: id }))[0] === true) found.push(id)
    return found
  }

  it("say of a block where it is, whichever of them is asked, and take it once", async () => {
    for (const [i, to] of ["k0", "k1", "k2"].entries()) await client.put([10 * i, 10 * i + 1], { to })
    for (let i = 0; i < 6; i++) expect(await client.where([0, 1, 10, 11, 20, 99])).toEqual(["k0", "k0", "k1", "k1", "k2", ""])
    for (let i = 0; i < 6; i++) expect(await client.put([0, 10, 20])).toEqual([false, false, false])
    expect(await client.intact([10, 11], { to: "k1" })).toBe(true)
    expect(await client.get([10, 11], { to: "k0" })).toBeUndefined()
  })

  it("take a block once that two workers offer at the same moment", async () => {
    const wanted = await Promise.all(upTo(6).map(() => client.put([1, 2, 3])))
    for (const place of [0, 1, 2]) expect(wanted.filter((of) => of[place] === true)).toHaveLength(1)
    for (const n of [1, 2, 3]) expect(await holders(n)).toHaveLength(1)
  })

  it("go on without one that has gone, or is silent", async () => {
    await client.put([1], { to: "k0" })
    await client.put([2], { to: "k1" })
    await scopes.get("k2")!.close()
    expect(await client.have([1, 2, 3])).toEqual([true, true, false])
    const silent = bus.subscribe(subject("test", "kv-store", "k2", Have.verb), () => {})
    expect(await client.have([1, 2, 3])).toEqual([true, true, false])
    expect(await client.put([4])).toEqual([true])
    silent.unsubscribe()
  })

  it("pin a block wherever it is", async () => {
    await client.put([1], { to: "k0" })
    await client.put([2], { to: "k1" })
    for (let i = 0; i < 3; i++) expect(await client.pin([1, 2, 3], 60_000)).toEqual([true, true, false])
  })

  it("copy blocks that are asked for often to another, in the background", async () => {
    const chain = upTo(20)
    for (const from of [0, 10]) await client.put(chain.slice(from, from + 10), { to: "k0", firstDepth: from })
    for (let i = 0; i < limits.storeHotUses - 1; i++) expect(await client.intact(chain, { to: "k0" })).toBe(true)
    expect(await holders(0)).toEqual(["k0"])
    expect(await client.intact(chain, { to: "k0" })).toBe(true)
    await until(() => [...stores.values()].reduce((sum, store) => sum + store.figures().memory.blocks, 0) === 40)
    const [, copy] = await holders(0)
    expect(await client.intact(chain, { to: copy! })).toBe(true)
    await scopes.get("k0")!.close()
    expect(await client.where(chain)).toEqual(chain.map(() => copy))
  })

  it("give a sequence its prefix in parts, from each what it has, with the same tokens", async () => {
    const kv = { dtype: "f16", blockTokens: 4, layers: 1, layerBlockBytes: 16 } as const
    const spec = specOf("a", upTo(30).map((i) => 10 + i), { maxTokens: 4 })
    const link = new Link(bus, "test", 1)
    const ends = { control: bus, bulk: bus }
    const hashes = chainHashes(spec.hashRoot, spec.prompt, 4).slice(0, 7)
    const ask = (id: string) => Effect.runPromise(link.ask(Have, subject("test", "kv-store", id, Have.verb), { formatId: "fake", hashes: packHashes(hashes) }, { hop: "kv-store" }))
    const writer = new StoreWriter()
    const engineOf = (name: string) => new Engine(new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 }), { name, maxBatch: 4 })
    const donor = engineOf("worker donor")
    const { tokens } = await new Generation(donor, spec).run()
    const scope = testScope()
    await scope.start(writer.run({ link, buses: ends, namespace: "test", worker: { engine: donor, formatId: "fake", kv } }))
    for (const [depth, hash] of hashes.entries()) {
      writer.stored(hash, undefined, depth) // one at a time, so that they spread
      while ((await ask(anyId)).present[depth] !== true);
    }
    const { at } = await ask(anyId)
    expect(new Set(at).size).toBeGreaterThan(1)
    const engine = engineOf(`worker ${randomUUID()}`)
    const generation = new Generation(engine, spec)
    await generation.reserved
    expect(await Effect.runPromise(fetchPrefix({ link, buses: ends, namespace: "test", worker: { engine, formatId: "fake", kv, costs: new MeasuredCosts() }, missing: engine.missingKv("a") }))).toBe(7)
    await generation.run()
    expect(generation.tokens).toEqual(tokens)
    engine.checkInvariants()
    await scope.close()
  })
})
