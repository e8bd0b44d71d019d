import { afterAll, beforeAll, describe, expect, it } from "vitest"
import { limits } from "../../config/limits.ts"
import { crowd } from "../support/crowd.ts"
import { realModelPath } from "../support/model.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"

interface Actors {
  readonly workers: ReadonlyArray<{ name: string; pid: number; epoch: number; load: { sequences: number }; kv: { blocks: number; freeBlocks: number } }>
  readonly actors: ReadonlyArray<{ kind: string; id: string; pid: number }>
  readonly transfers: { completed: number; failed: number; fallbacks: number; bytes: number }
}

const actorsOf = async (node: StartedNode): Promise<Actors> => (await (await fetch(`${node.url}/actors`)).json()) as Actors

const until = async (holds: () => Promise<boolean>): Promise<void> => {
  while (!(await holds())) await new Promise((resolve) => setTimeout(resolve, 50))
}

const everyBlockFree = (node: StartedNode) =>
  until(async () => (await actorsOf(node)).workers.every(({ load, kv }) => load.sequences === 0 && kv.freeBlocks === kv.blocks))

const path = realModelPath()
const smol = path === undefined ? undefined : { path, name: "smollm2-135m", sha256: "b".repeat(64) }

describe.skipIf(smol === undefined)("the disaggregated topology with SmolLM2", () => {
  let single: StartedNode
  let disaggregated: StartedNode
  beforeAll(async () => {
    single = await startNode({ model: smol })
    disaggregated = await startNode({ model: smol, preset: "disaggregated" })
  }, 120_000)
  afterAll(async () => {
    await single.stop()
    await disaggregated.stop()
  })

  it("gives 64 mixed prompts, greedy and sampled, the tokens that the single topology gives", async () => {
    const requests = crowd(64)
    const expected = await Promise.all(requests.map((request) => streamCompletion(single, request)))
    const found = await Promise.all(requests.map((request) => streamCompletion(disaggregated, request)))
    expect(found).toEqual(expected)
    const { transfers } = await actorsOf(disaggregated)
    expect(transfers.fallbacks).toBe(0)
    await until(async () => (await actorsOf(disaggregated)).transfers.completed > 0)
    await everyBlockFree(disaggregated)
  })

  it("runs every actor in a process of its own", async () => {
    const { actors } = await actorsOf(disaggregated)
    expect(actors.map(({ kind }) => kind).sort()).toEqual(["decode", "gateway", "kv-store", "prefill", "request", "scheduler"])
    expect(new Set(actors.map(({ pid }) => pid)).size).toBe(6)
  })
})

describe("the disaggregated topology with a tiny model", () => {
  const request = { prompt: "A long story about a lighthouse keeper and the sea:", max_tokens: 400, ignore_eos: true, temperature: 1, seed: 7 }
  let node: StartedNode
  let undisturbed: Awaited<ReturnType<typeof streamCompletion>>
  beforeAll(async () => {
    node = await startNode({ preset: "disaggregated" })
    undisturbed = await streamCompletion(node, request)
  }, 120_000)
  afterAll(() => node.stop())

  const pidOf = async (name: string): Promise<number> => {
    const find = async () => (await actorsOf(node)).workers.find((worker) => worker.name === name)
    await until(async () => (await find()) !== undefined)
    return (await find())!.pid
  }
  const back = (name: string, old: number) => until(async () => (await actorsOf(node)).workers.some((worker) => worker.name === name && worker.pid !== old))

  it("several choices of one request share one prefill and one transfer", async () => {
    const ask = async (of: { readonly url: string }, prompt: string) => {
      const response = await fetch(`${of.url}/v1/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", prompt, n: 4, seed: 5, max_tokens: 20, ignore_eos: true, return_token_ids: true }) })
      return ((await response.json()) as { choices: Array<{ token_ids: Array<number> }> }).choices.map(({ token_ids }) => token_ids)
    }
    // Counts are announced now and then: they are settled when a while has brought no more.
    const completed = async (atLeast: number): Promise<number> => {
      await until(async () => (await actorsOf(node)).transfers.completed >= atLeast)
      await new Promise((resolve) => setTimeout(resolve, 3 * limits.heartbeatIntervalMs))
      return (await actorsOf(node)).transfers.completed
    }
    // The scheduler may have heard of decode before prefill: what was asked until then is decode's to compute.
    await until(async () => (await ask(node, "Hello")).length > 0 && (await actorsOf(node)).transfers.completed > 0)
    const before = await completed(1)
    const four = await ask(node, "My favourite thing is")
    expect(four.map((tokens) => tokens.length)).toEqual([20, 20, 20, 20])
    expect(await completed(before + 1)).toBe(before + 1)
    const alone = await startNode()
    try {
      expect(await ask(alone, "My favourite thing is")).toEqual(four)
    } finally {
      await alone.stop()
    }
  })

  it("the only decode worker killed mid-stream: the client sees the same text", async () => {
    const pid = await pidOf("d0")
    expect(await streamCompletion(node, request, () => process.kill(pid, "SIGKILL"))).toEqual(undisturbed)
    await back("d0", pid)
    await everyBlockFree(node)
  })

  it("the only prefill worker killed: decode computes the prompt itself, or waits for it to come back", async () => {
    const pid = await pidOf("p0")
    process.kill(pid, "SIGKILL")
    expect(await streamCompletion(node, request)).toEqual(undisturbed)
    await back("p0", pid)
    await everyBlockFree(node)
  })

  it("the only prefill worker hangs: decode workers compute new prompts, until it is killed and comes back", async () => {
    const pid = await pidOf("p0")
    process.kill(pid, "SIGSTOP")
    await until(async () => (await actorsOf(node)).workers.every(({ name }) => name !== "p0"))
    expect(await streamCompletion(node, request)).toEqual(undisturbed)
    await back("p0", pid)
    expect(() => process.kill(pid, 0)).toThrow("ESRCH")
    await everyBlockFree(node)
  })
})
