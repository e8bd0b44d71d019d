/** Topologies with workers on a device: the same actors and messages, one word changed; and a CPU and a device that share the work. */
import { afterEach, expect, test } from "vitest"
import type { Topology } from "../../config/topology.ts"
import { Cluster, type Answer } from "../support/cluster.ts"

const onGpu = process.env["PENSTOCK_TEST_GPU"] === "1"

let cluster: Cluster | undefined
afterEach(async () => {
  await cluster?.stop()
  cluster = undefined
})

const tiny = { types: "Q4_1", headDim: 32, layers: 2 } as const
const small = { blocks: 64, dtype: "f16", blockTokens: 16 } as const

/** Workers of the disaggregated preset in one process, or one with both roles, on these devices. */
const on = (devices: ReadonlyArray<string>) => (topology: Topology): Topology => {
  const [first] = topology.workers
  const roles = devices.length === 1 ? [["prefill", "decode"] as const] : [["prefill"] as const, ["decode"] as const]
  return { ...topology, bus: "memory", mixedKv: devices.length > 1, workers: devices.map((device, i) => ({ ...first!, name: `w${i}`, device, roles: roles[i]!, kv: small, maxBatch: 8 })) }
}

const prompts = ["The water comes down the penstock", "When the gate is closed the water waits behind the wall; nothing is lost", "Nothing"]
const asks = prompts.map((prompt) => ({ prompt, maxTokens: 10, logprobs: 0 }))
const generateAll = async (together: boolean): Promise<Array<Answer>> => {
  if (together) return Promise.all(asks.map((asked) => cluster!.generate(asked)))
  const answers: Array<Answer> = []
  for (const asked of asks) answers.push(await cluster!.generate(asked))
  return answers
}
const tokensOf = (answers: ReadonlyArray<Answer>) => answers.map(({ tokens }) => tokens[0])

test("the single topology on cuda:0: streams give the same tokens alone and together, and nothing is left", async () => {
  cluster = await Cluster.start({ tiny, change: on(["cuda:0"]) })
  const alone = await generateAll(false)
  expect(tokensOf(await generateAll(true))).toEqual(tokensOf(alone))
  for (const { tokens } of alone) expect(tokens[0]).toHaveLength(10)
  await cluster.untilIdle()
})

test.each(onGpu ? [["cuda:0", "cuda:0"]] : [["cuda:0", "cuda:0"], ["cuda:0", "cuda:1"]])("prefill on %s and decode on %s of one process give the tokens of one worker, and no KV goes through the host", async (...devices) => {
  cluster = await Cluster.start({ tiny, change: on(["cuda:0"]) })
  const alone = await generateAll(false)
  await cluster.stop()
  cluster = await Cluster.start({ tiny, change: (topology) => ({ ...on(devices)(topology), kvStore: { ...topology.kvStore, replicas: 0 } }) })
  const [prefill, decode] = ["w0", "w1"].map((name) => cluster!.node.workers.get(name)!)
  for (const { kernels } of [prefill!, decode!]) {
    kernels.exportLayers = kernels.importLayers = () => {
      throw new Error("KV goes through the host")
    }
  }
  const found = await generateAll(true)
  expect(found.map(({ tokens, logprobs }) => ({ tokens, logprobs }))).toEqual(alone.map(({ tokens, logprobs }) => ({ tokens, logprobs })))
  expect(prefill!.worker.totals).toMatchObject({ completed: prompts.length, failed: 0 })
  expect(prefill!.worker.totals.bytes).toBeGreaterThan(0)
  expect(decode!.worker.totals.fallbacks).toBe(0)
  await cluster.untilIdle()
})

// AWQ's matrices are Q4_1's on the CPU and their own on the device.
const awq = { awq: true, hidden: 128, heads: 4, headDim: 32, ffn: 256, layers: 2 } as const

test.each([{ name: "Q4_1", tiny }, { name: "AWQ", tiny: awq }])("prefill on a CPU and decode on a device, declared as such, of a model in $name: KV streams between them, and the device goes on from it", async ({ tiny }) => {
  cluster = await Cluster.start({ tiny, change: on(["cuda:0"]) })
  const onDevice = await generateAll(false)
  await cluster.stop()
  cluster = await Cluster.start({ tiny, change: on(["cpu", "cuda:0"]) })
  const mixed = await generateAll(true)
  const [prefill, decode] = ["w0", "w1"].map((name) => cluster!.node.workers.get(name)!.worker)
  expect(prefill!.totals).toMatchObject({ completed: prompts.length, failed: 0 })
  expect(decode!.totals.fallbacks).toBe(0)
  expect([prefill!.formatId, decode!.formatId].map((id) => id.split("-").at(-1))).toEqual(["cpu", "cuda"])
  // Numerics of the two differ by about a hundredth; what is far from a draw is the same, and as likely.
  mixed.forEach(({ tokens, logprobs }, i) => {
    const there = onDevice[i]!
    const same = tokens[0]!.findIndex((token, at) => token !== there.tokens[0]![at])
    const common = same < 0 ? tokens[0]!.length : same
    expect(common).toBeGreaterThan(2)
    for (let at = 0; at < common; at++) expect(Math.abs(Number(logprobs[0]![at]!.logprob) - Number(there.logprobs[0]![at]!.logprob))).toBeLessThan(0.3)
  })
  await cluster.untilIdle()
})
