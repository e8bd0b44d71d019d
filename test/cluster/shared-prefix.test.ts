/** Prefixes that several requests begin with, over several workers: computed once where they can be fetched. */
import { afterEach, expect, it } from "vitest"
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
  for (const { worker } of cluster.node.workers.values()) worker.engine.hold = () => ({ hashes: [], writeOf: () => () => 0, release: () => {} })
  const busy = await cluster.open({ ...asked, prompt: [1, 2, 3], maxTokens: 300 }, 2)
  const again = await Promise.all([cluster.generate(asked), cluster.generate(asked)])
  for (const { tokens, logprobs } of again) expect([tokens, logprobs]).toEqual([cold.tokens, cold.logprobs])
  busy.cancel("read enough")
  await cluster.untilIdle()
})
