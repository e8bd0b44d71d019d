/** Prefixes that several requests begin with, over several workers: computed once where they can be fetched. */
import { afterEach, expect, it } from "vitest"
import { BridgeBus } from "../../actors/runtime/bridge-bus.ts"
import type { Topology } from "../../config/topology.ts"
import { Cluster } from "../support/cluster.ts"
import { startNode } from "../support/start-node.ts"

const stops: Array<() => Promise<void>> = []
afterEach(async () => {
  for (const stop of stops.splice(0)) await stop()
})

const start = async (change: (topology: Topology) => Topology) => {
  const node = await startNode({ change })
  stops.push(node.stop)
  return { node, cluster: new Cluster(node).fetchAlways() }
}

const twoWorkers = (topology: Topology): Topology => ({
  ...topology,
  scheduler: { ...topology.scheduler, policy: "least-loaded" },
  workers: ["a", "b"].map((name) => ({ ...topology.workers[0]!, name, threads: 1, maxBatch: 4 })),
  kvStore: { ...topology.kvStore, memory: 1 }, // which holds no block
})

const prompt = Array.from({ length: 100 }, (_, i) => 100 + ((i * 7) % 90))
// A model this small may draw the same tokens from another prefix, but not with the same log probabilities.
const asked = { prompt, maxTokens: 30, logprobs: 2 }

it("are fetched from another worker's pool where the store does not have them, and the tokens are the same", async () => {
  const { cluster } = await start(twoWorkers)
  const cold = await cluster.generate(asked)
  expect(cold.usage.cachedTokens).toBe(0)
  const [a, b] = ["a", "b"].map((name) => cluster.node.workers.get(name)!.worker)
  const [holder, other] = a!.engine.counters.promptTokens > 0 ? [a!, b!] : [b!, a!]
  // Nobody reads it, so that the worker that holds the prefix is the more loaded one.
  const busy = await cluster.open({ ...asked, prompt: [...prompt.slice(0, 64), 5, 6, 7], maxTokens: 300 }, 2)
  while (holder.engine.load.sequences + other.engine.load.sequences === 0) await new Promise((resolve) => setTimeout(resolve, 10))
  const [loaded, idle] = holder.engine.load.sequences > 0 ? [holder, other] : [other, holder]
  const warm = await cluster.generate(asked)
  expect([warm.tokens, warm.logprobs]).toEqual([cold.tokens, cold.logprobs])
  // All full blocks but that of the last token.
  expect(warm.usage.cachedTokens).toBe(96)
  expect(idle.engine.counters.promptTokens).toBeGreaterThan(0)
  expect(loaded.engine.load.sequences).toBe(1)
  busy.cancel("read enough")
  await cluster.untilIdle()
})

it("are computed where the pool that held them has lost them in the meantime", async () => {
  const { cluster } = await start(twoWorkers)
  const cold = await cluster.generate(asked)
  for (const { worker } of cluster.node.workers.values()) {
    const none = worker.engine.hold([])
    worker.engine.hold = () => none
  }
  const busy = await cluster.open({ ...asked, prompt: [1, 2, 3], maxTokens: 300 }, 2)
  const again = await Promise.all([cluster.generate(asked), cluster.generate(asked)])
  for (const { tokens, logprobs } of again) expect([tokens, logprobs]).toEqual([cold.tokens, cold.logprobs])
  busy.cancel("read enough")
  await cluster.untilIdle()
})

it("keep nobody else waiting while they are on their way: no step runs for them, and those of others do", async () => {
  const { node, cluster } = await start((topology) => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: 24 } })) }))
  const { engine } = node.workers.get("w0")!.worker
  const cold = await cluster.generate(asked)
  await cluster.untilStored()
  const known = new Set(engine.blocks.knownHashes())
  for (let i = 0; engine.blocks.knownHashes().some((hash) => known.has(hash)); i++) await cluster.generate({ prompt: prompt.map((token, place) => 3 + ((token * place + i * 17) % 250)), maxTokens: 60 })
  await cluster.untilIdle()
  await cluster.untilStored()

  const { publish } = BridgeBus.prototype
  const held: Array<() => void> = []
  stops.push(async () => void (BridgeBus.prototype.publish = publish))
  BridgeBus.prototype.publish = function (to, data, options) {
    if (/\.kv\.[0-9a-f]{32}\.chunk$/.test(to)) held.push(() => publish.call(this, to, data, options))
    else publish.call(this, to, data, options)
  }
  const warm = cluster.generate(asked)
  while (held.length === 0) await new Promise((resolve) => setTimeout(resolve, 1))
  const { steps } = engine.counters
  const other = await cluster.generate({ prompt: [9, 8, 7], maxTokens: 30 })
  expect(other.tokens[0]).toHaveLength(30)
  expect(engine.counters.steps - steps).toBe(30)
  BridgeBus.prototype.publish = publish
  for (const send of held) send()
  const { tokens, logprobs, usage } = await warm
  expect([tokens, logprobs, usage.cachedTokens]).toEqual([cold.tokens, cold.logprobs, 96])
  await cluster.untilIdle()
})
