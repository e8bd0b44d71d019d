/** Prefill and decode on machines of their own, as far as they can tell: neither's cores are the other's. */
import { expect, it, vi } from "vitest"
import { readChunkHeader } from "../../actors/messages/kv-chunk.ts"
import { Cluster } from "../support/cluster.ts"
import { startPair } from "../support/start-pair.ts"

// Whoever asks is on another machine than whoever asked before.
vi.mock("node:os", async (original) => {
  let asked = 0
  return { ...(await original<typeof import("node:os")>()), hostname: () => `machine-${asked++}` }
})

it("KV leaves layer by layer, while the step still runs that computes it, and the answer is the same", async () => {
  const request = { prompt: Array.from({ length: 400 }, (_, i) => 3 + ((i * i) % 250)), logprobs: 2 }
  const tiny = { layers: 3 }
  const single = await Cluster.start({ tiny })
  const expected = await single.generate(request)
  await single.stop()

  const pair = await startPair({ tiny, faultsOf: () => undefined })
  const { counters } = pair.prefill.worker.engine
  const left: Array<{ readonly firstLayer: number; readonly layers: number; readonly stepsBefore: number }> = []
  const { publish } = pair.memory
  pair.memory.publish = function (to, data, options) {
    if (/\.kv\.[0-9a-f]{32}\.chunk$/.test(to)) {
      const { firstLayer, layers } = readChunkHeader(data).header
      left.push({ firstLayer, layers, stepsBefore: counters.steps })
    }
    publish.call(this, to, data, options)
  }
  const found = await pair.cluster.generate(request)
  // Later ones are of blocks that go to the KV store.
  const ofPrompt = left.slice(0, 3)
  await pair.stop()

  expect([found.tokens, found.logprobs]).toEqual([expected.tokens, expected.logprobs])
  expect(ofPrompt).toEqual([0, 1, 2].map((firstLayer) => ({ firstLayer, layers: 1, stepsBefore: 0 })))
})
