/**
 * The same request gives the same tokens, wherever its KV comes from. Log probabilities are compared too: a model this small
 * may draw the same tokens from wrong KV, but not with the same log probabilities.
 */
import { mkdtempSync, rmSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterEach, beforeAll, describe, expect, it } from "vitest"
import { kvDtypes, type KvDtype } from "../../kernels/index.ts"
import type { Topology } from "../../config/topology.ts"
import { Cluster, type Answer, type Asked } from "../support/cluster.ts"
import { until } from "../support/scoped.ts"

const blockTokens = 16
const prompt = Array.from({ length: 100 }, (_, i) => 100 + ((i * 7) % 90))
const asked: Asked = { prompt, maxTokens: 30, logprobs: 2 }
/** Four choices that part at once, in the middle of a block. */
const four: Asked = { ...asked, choices: 4, sampling: { temperature: 1, seed: 3 } }
/** All full blocks but that of the last token. */
const cached = 96

const drawn = ({ tokens, logprobs }: Answer) => ({ tokens, logprobs })

interface Options {
  readonly workers?: ReadonlyArray<string>
  readonly blocks?: number
  readonly kvStore?: Partial<Topology["kvStore"]>
}

const clusters: Array<Cluster> = []
const start = async (dtype: KvDtype, { workers = ["w0"], blocks = 64, kvStore = { replicas: 0 } }: Options = {}) => {
  const cluster = await Cluster.start({
    change: (topology) => ({
      ...topology,
      scheduler: { ...topology.scheduler, policy: "least-loaded" },
      kvStore: { ...topology.kvStore, ...kvStore },
      workers: workers.map((name) => ({ ...topology.workers[0]!, name, threads: 1, maxBatch: 8, kv: { ...topology.workers[0]!.kv, blocks, dtype } })),
    }),
  })
  clusters.push(cluster)
  return cluster
}
afterEach(async () => {
  for (const cluster of clusters.splice(0)) await cluster.stop()
})

const engineOf = (cluster: Cluster, name = "w0") => cluster.node.workers.get(name)!.worker.engine

/** Others' prompts, until the pool knows nothing of ours. */
const pushOut = async (cluster: Cluster) => {
  const { blocks } = engineOf(cluster)
  const ours = new Set(blocks.knownHashes())
  for (let i = 0; blocks.knownHashes().some((hash) => ours.has(hash)); i++) {
    await cluster.generate({ prompt: Array.from({ length: 200 }, (_, token) => 3 + ((token * 11 + i * 17) % 250)), maxTokens: 1 })
  }
}

describe.each(kvDtypes)("in pools of %s a request gives the same tokens and log probabilities", (dtype) => {
  let one: Answer
  let several: Answer
  beforeAll(async () => {
    const cold = await start(dtype)
    one = await cold.generate(asked)
    expect(one.usage.cachedTokens).toBe(0)
    await cold.stop()
    clusters.length = 0
    const alone = await start(dtype)
    several = await alone.generate(four)
    expect(several.usage.cachedTokens).toBe(0)
    await alone.stop()
    clusters.length = 0
  })
  const same = async (cluster: Cluster, hit: number) => {
    for (const [request, expected] of [[asked, one], [four, several]] as const) {
      const found = await cluster.generate(request)
      expect(drawn(found)).toEqual(drawn(expected))
      expect(found.usage.cachedTokens).toBe(hit)
    }
  }

  it("from KV that its worker's pool has", async () => {
    const cluster = await start(dtype)
    await cluster.generate({ ...asked, maxTokens: 1 })
    await same(cluster, cached)
    await cluster.untilIdle()
  })

  it("from KV that another worker's pool has", async () => {
    const cluster = (await start(dtype, { workers: ["a", "b"] })).fetchAlways()
    await cluster.generate({ ...asked, maxTokens: 1 })
    const [holder, other] = engineOf(cluster, "a").counters.promptTokens > 0 ? ["a", "b"] : ["b", "a"]
    // Nobody reads it, so that the worker that has the KV is the more loaded one.
    const busy = await cluster.open({ prompt: [5, 6, 7], maxTokens: 400 }, 2)
    await until(() => engineOf(cluster, "a").load.sequences + engineOf(cluster, "b").load.sequences > 0)
    if (engineOf(cluster, other).load.sequences > 0) throw new Error(`${holder} has computed the prompt and is not the first of two that are idle`)
    await same(cluster, cached)
    expect(engineOf(cluster, other).counters).toMatchObject({ promptTokens: 200, cachedTokens: 2 * cached })
    busy.cancel("read enough")
    await cluster.untilIdle()
  })

  it("from KV that the store has in memory", async () => {
    const cluster = (await start(dtype, { blocks: 24, kvStore: { replicas: 1, disk: { path: "none", size: 0 } } })).fetchAlways()
    for (const [request, expected] of [[asked, one], [four, several]] as const) {
      await cluster.generate({ ...asked, maxTokens: 1 })
      await cluster.untilStored()
      await cluster.untilIdle()
      await pushOut(cluster)
      const found = await cluster.generate(request)
      expect(drawn(found)).toEqual(drawn(expected))
      expect(found.usage.cachedTokens).toBe(cached)
    }
    await cluster.untilIdle()
  })

  it("from KV that the store has on disk, after a restart", async () => {
    const folder = mkdtempSync(join(tmpdir(), "penstock-same-"))
    const kvStore = { replicas: 1, disk: { path: folder, size: 2 ** 28 } }
    try {
      const before = await start(dtype, { kvStore })
      await before.generate({ ...asked, maxTokens: 1 })
      await before.untilStored()
      for (const [request, expected] of [[asked, one], [four, several]] as const) {
        for (const cluster of clusters.splice(0)) await cluster.stop()
        const again = (await start(dtype, { kvStore })).fetchAlways()
        const found = await again.generate(request)
        expect(drawn(found)).toEqual(drawn(expected))
        expect(found.usage.cachedTokens).toBe(cached)
      }
      for (const cluster of clusters.splice(0)) await cluster.stop()
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  })

  /** The request beside one that came before it, in a pool that holds either of them to its end, and not both. */
  const besideAnOlder = async (cluster: Cluster) => {
    const { engine } = cluster.node.workers.get("w0")!.worker
    const older = cluster.generate({ prompt: prompt.map((token) => token + 100), maxTokens: 100 })
    await until(() => engine.counters.outputTokens > 0)
    const found = await cluster.generate(asked)
    await older
    expect(drawn(found)).toEqual(drawn(one))
    expect(engine.load.preemptions).toBeGreaterThan(0)
    await cluster.untilIdle()
    return engine.counters
  }

  it("preempted, and computed again", async () => {
    const cluster = await start(dtype, { blocks: 16, kvStore: { replicas: 1 } })
    expect((await besideAnOlder(cluster.computeAlways())).restoredTokens).toBe(0)
  })

  it("preempted, parked in the store, and fetched from there", async () => {
    const cluster = await start(dtype, { blocks: 16, kvStore: { replicas: 1 } })
    const { worker, kernels } = cluster.fetchAlways().node.workers.get("w0")!
    const step = kernels.step.bind(kernels)
    // What is given away is written before others take its blocks.
    kernels.step = async (...batch) => {
      if (worker.engine.load.preemptions > 0) await cluster.untilStored()
      return step(...batch)
    }
    expect((await besideAnOlder(cluster)).restoredTokens).toBeGreaterThanOrEqual(blockTokens)
  })

  it("for each of four choices that copy a block when they part, as for those that have had their own from the start", async () => {
    expect(new Set(several.tokens.map(String)).size).toBe(4)
    const cluster = await start(dtype)
    const parted = await cluster.generate({ ...four, delivered: several.tokens.map(([first]) => [first!]), attempt: 1 })
    expect(parted.tokens).toEqual(several.tokens)
    expect(parted.logprobs).toEqual(several.logprobs.map((of) => of.slice(1)))
    const single = await cluster.generate({ ...four, choices: 1 })
    expect([single.tokens[0], single.logprobs[0]]).toEqual([several.tokens[0], several.logprobs[0]])
    // In a pool too small for the four, where they give way to each other.
    const small = await start(dtype, { blocks: 14 })
    expect(drawn(await small.generate(four))).toEqual(drawn(several))
    expect(engineOf(small).load.preemptions).toBeGreaterThan(0)
    await small.untilIdle()
  })
})

it("pools of each type hold something else", async () => {
  const answers: Array<string> = []
  for (const dtype of kvDtypes) answers.push(JSON.stringify((await (await start(dtype)).generate(asked)).logprobs))
  expect(new Set(answers).size).toBe(kvDtypes.length)
})
