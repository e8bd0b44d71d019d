/** Tenants: what one has asked is nothing to another, in no pool and no store, unless the topology says so. */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterEach, describe, expect, it } from "vitest"
import type { Topology } from "../../config/topology.ts"
import { Cluster, type Asked } from "../support/cluster.ts"
import { until } from "../support/scoped.ts"

const prompt = Array.from({ length: 100 }, (_, i) => 100 + ((i * 7) % 90))
const cached = 96
const clusters: Array<Cluster> = []
const start = async (change: (topology: Topology) => Topology, shared: boolean) => {
  const cluster = await Cluster.start({ change: (topology) => change({ ...topology, kvStore: { ...topology.kvStore, shared } }) })
  clusters.push(cluster)
  return cluster.fetchAlways()
}
const stop = async () => {
  for (const cluster of clusters.splice(0)) await cluster.stop()
}
afterEach(stop)

const ofAlice: Asked = { prompt, maxTokens: 1, tenant: "alice" }
/** Tokens that each of these finds of what Alice has asked, and that all get the same answer. */
const found = async (cluster: Cluster, answer: ReadonlyArray<ReadonlyArray<number>>, before: () => Promise<void> = async () => {}) => {
  const tokens: Array<number> = []
  for (const whose of [{ tenant: "bob" }, { tenant: "" }, { tenant: "alice", cacheSalt: "salt" }, { tenant: "alice" }]) {
    await before()
    const { usage, tokens: drawn } = await cluster.generate({ ...ofAlice, ...whose })
    expect(drawn).toEqual(answer)
    tokens.push(usage.cachedTokens)
  }
  return tokens
}

describe.each([
  { name: "apart", shared: false, finds: [0, 0, 0, cached] },
  { name: "sharing what is cached, since the topology says so; a salt keeps apart still", shared: true, finds: [cached, cached, 0, cached] },
])("tenants are $name", ({ shared, finds }) => {
  it("in a pool", async () => {
    const cluster = await start((topology) => ({ ...topology, kvStore: { ...topology.kvStore, replicas: 0 } }), shared)
    const { tokens } = await cluster.generate(ofAlice)
    expect(await found(cluster, tokens)).toEqual(finds)
  })

  it("at the same moment, where one would wait for what another computes", async () => {
    const cluster = await start((topology) => ({ ...topology, kvStore: { ...topology.kvStore, replicas: 0 } }), shared)
    const { engine } = cluster.node.workers.get("w0")!.worker
    await Promise.all(["alice", "bob"].map((tenant) => cluster.generate({ ...ofAlice, tenant })))
    expect(engine.counters).toMatchObject({ promptTokens: 200, cachedTokens: shared ? cached : 0 })
  })

  it("between workers", async () => {
    const twoWorkers = (topology: Topology): Topology => ({
      ...topology,
      scheduler: { ...topology.scheduler, policy: "least-loaded" },
      kvStore: { ...topology.kvStore, replicas: 0 },
      workers: ["a", "b"].map((name) => ({ ...topology.workers[0]!, name, threads: 1, kv: { ...topology.workers[0]!.kv, blocks: 64 } })),
    })
    const cluster = await start(twoWorkers, shared)
    const engineOf = (name: string) => cluster.node.workers.get(name)!.worker.engine
    const { tokens } = await cluster.generate(ofAlice)
    // Nobody reads it, so that the worker that has Alice's prefix is the more loaded one.
    const busy = await cluster.open({ prompt: [5, 6, 7], maxTokens: 400 }, 2)
    const [holder, other] = engineOf("a").counters.promptTokens > 0 ? (["a", "b"] as const) : (["b", "a"] as const)
    await until(() => engineOf(holder).load.sequences > 0)
    expect(await found(cluster, tokens)).toEqual(finds)
    expect(engineOf(other).counters.cachedTokens).toBe(finds.reduce((sum, of) => sum + of, 0))
    busy.cancel("read enough")
    await cluster.untilIdle()
  })

  it("in the store, also after a restart", async () => {
    const folder = mkdtempSync(join(tmpdir(), "penstock-isolation-"))
    const withStore = (topology: Topology): Topology => ({
      ...topology,
      kvStore: { ...topology.kvStore, disk: { path: folder, size: 2 ** 28 } },
      workers: topology.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: 16 } })),
    })
    try {
      const first = await start(withStore, shared)
      const { tokens } = await first.generate(ofAlice)
      await first.untilStored()
      let flood = 0
      const pushOut = (cluster: Cluster) => async () => {
        const { blocks } = cluster.node.workers.get("w0")!.worker.engine
        const known = new Set(blocks.knownHashes())
        while (blocks.knownHashes().some((hash) => known.has(hash))) {
          await cluster.generate({ prompt: Array.from({ length: 200 }, (_, token) => 3 + ((token * 11 + flood * 17) % 250)), maxTokens: 1, tenant: "flood" })
          flood++
        }
      }
      expect((await found(first, tokens, pushOut(first))).slice(0, 2)).toEqual(finds.slice(0, 2))
      await stop()
      const again = await start(withStore, shared)
      const { usage } = await again.generate({ ...ofAlice, tenant: "carol" })
      expect(usage.cachedTokens).toBe(shared ? cached : 0)
      expect((await again.generate(ofAlice)).usage.cachedTokens).toBe(cached)
      await stop()
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  })
})
