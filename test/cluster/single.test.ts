import { afterAll, beforeAll, describe, expect, it } from "vitest"
import OpenAI from "openai"
import { ResponsesWS } from "openai/resources/responses/ws"
import { crowd } from "../support/crowd.ts"
import { realModelPath } from "../support/model.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"

const untilIdle = async (node: StartedNode): Promise<void> => {
  const { engine } = node.workers.get("w0")!.worker
  const kernels = node.workers.get("w0")!.kernels
  const isIdle = () => engine.requestIds.length === 0 && engine.load.sequences === 0 && engine.load.waiting === 0
  // The KV store may still be reading some blocks when the last request has gone.
  while (!isIdle() || engine.blocks.available < engine.blocks.total) await new Promise((resolve) => setImmediate(resolve))
  engine.checkInvariants()
  expect(kernels.samplers).toBe(0)
}

const modelPath = realModelPath()

describe.each([
  { name: "a tiny model", model: undefined, skip: false },
  { name: "SmolLM2", model: { path: modelPath ?? "", name: "smollm2-135m", sha256: "b".repeat(64) }, skip: modelPath === undefined },
])("the single topology with $name", ({ model, skip }) => {
  let node: StartedNode
  beforeAll(async () => {
    if (!skip) node = await startNode({ model })
  })
  afterAll(async () => {
    if (!skip) await node.stop()
  })

  it.skipIf(skip)("gives 32 concurrent streams, greedy and sampled, exactly the tokens that each gets alone", async () => {
    const requests = crowd(32)
    const alone = []
    for (const request of requests) alone.push(await streamCompletion(node, request))
    const together = await Promise.all(requests.map((request) => streamCompletion(node, request)))
    expect(together).toEqual(alone)
    for (const [i, { tokens }] of alone.entries()) expect(tokens).toHaveLength(requests[i]!.max_tokens as number)
    await untilIdle(node)
  })

  it.skipIf(skip)("frees every block when clients vanish in the middle of their streams", async () => {
    const readers = await Promise.all(
      Array.from({ length: 8 }, async (_, i) => {
        const abort = new AbortController()
        const response = await fetch(`${node.url}/v1/completions`, {
          method: "POST",
          signal: abort.signal,
          body: JSON.stringify({ model: node.modelName, stream: true, prompt: `Count to a thousand, ${i}:`, max_tokens: 400, ignore_eos: true }),
        })
        const reader = response.body!.getReader()
        await reader.read()
        return { abort, reader }
      }),
    )
    for (const { abort, reader } of readers) {
      abort.abort()
      await reader.closed.catch(() => {})
    }
    await untilIdle(node)
  })

  it.skipIf(skip)("finds a conversation's prefix again and says so in the usage, with the same answer", async () => {
    const client = new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "none", maxRetries: 0 })
    const ask = () =>
      client.chat.completions.create({ model: node.modelName, temperature: 0, max_tokens: 12, messages: [{ role: "user", content: "Please explain in a few simple words what a lighthouse is and why ships need it." }] })
    const [first, second] = [await ask(), await ask()]
    expect(first.usage!.prompt_tokens_details!.cached_tokens).toBe(0)
    expect(second.usage!.prompt_tokens_details!.cached_tokens).toBeGreaterThan(0)
    expect(second.choices[0]!.message.content).toBe(first.choices[0]!.message.content)
  })

  it.skipIf(skip)("shows what its KV store has in each tier", async () => {
    const store = async () => {
      const { actors } = (await (await fetch(`${node.url}/actors`)).json()) as { actors: ReadonlyArray<{ kind: string; id: string; store?: { memory: Record<string, number>; disk: Record<string, number> } }> }
      return actors.find(({ kind }) => kind === "kv-store")!.store!
    }
    while ((await store()).disk["blocks"] === 0) await new Promise((resolve) => setTimeout(resolve, 50))
    const { memory, disk } = await store()
    for (const tier of [memory, disk]) expect(Object.keys(tier)).toEqual(["blocks", "bytes", "limitBytes", "hits", "misses", "evictions"])
    expect([memory["limitBytes"], disk["limitBytes"]]).toEqual([256 * 2 ** 20, 2 * 2 ** 30])
    expect(memory["misses"]).toBeGreaterThan(0)
  })

  it.skipIf(skip)("gives the choices of one request the tokens that their seeds give, whatever their number", async () => {
    const ask = async (n: number) => {
      const response = await fetch(`${node.url}/v1/completions`, { method: "POST", body: JSON.stringify({ model: node.modelName, prompt: "My favourite thing is", n, seed: 5, max_tokens: 10, ignore_eos: true, return_token_ids: true }) })
      return ((await response.json()) as { choices: Array<{ index: number; token_ids: Array<number> }> }).choices.sort((a, b) => a.index - b.index).map(({ token_ids }) => token_ids)
    }
    const [one, five] = [await ask(1), await ask(5)]
    expect(five).toHaveLength(5)
    expect(five[0]).toEqual(one[0])
    expect(new Set(five.map(String)).size).toBeGreaterThan(1)
    await untilIdle(node)
  })

  it.skipIf(skip)("answers over the WebSocket of the Responses protocol with the text of the chat endpoint", async () => {
    const client = new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "none", maxRetries: 0 })
    const chat = await client.chat.completions.create({ model: node.modelName, temperature: 0, max_tokens: 12, messages: [{ role: "user", content: "Say something nice." }] })
    const socket = new ResponsesWS(client)
    const text = await new Promise<string>((resolve, reject) => {
      socket.on("error", reject)
      socket.on("response.output_text.done", (event) => resolve(event.text))
      socket.socket.on("open", () => socket.send({ type: "response.create", model: node.modelName, input: "Say something nice.", temperature: 0, max_output_tokens: 12 } as never))
    })
    socket.close()
    expect(text).toBe(chat.choices[0]!.message.content)
  })

  it.skipIf(skip)("gives the same text when the worker breaks in the middle of a stream", async () => {
    const request = { prompt: "A long story about a lighthouse keeper:", max_tokens: 60, ignore_eos: true, temperature: 1, seed: 7 }
    const undisturbed = await streamCompletion(node, request)
    const { worker, kernels } = node.workers.get("w0")!
    const before = worker.engine.counters.outputTokens
    const disturbed = streamCompletion(node, request)
    while (worker.engine.counters.outputTokens < before + 20) await new Promise((resolve) => setImmediate(resolve))
    await kernels.close()
    expect(await disturbed).toEqual(undisturbed)
    expect(node.workers.get("w0")!.worker.epoch).toBeGreaterThan(worker.epoch)
  })
})

it("several workers of one process share the requests, and give the tokens that one worker gives", async () => {
  const one = await startNode()
  const two = await startNode({ change: (topology) => ({ ...topology, scheduler: { ...topology.scheduler, policy: "least-loaded" }, workers: ["a", "b"].map((name) => ({ ...topology.workers[0]!, name, threads: 1, maxBatch: 4 })) }) })
  try {
    const requests = crowd(16)
    const expected = await Promise.all(requests.map((request) => streamCompletion(one, request)))
    expect(await Promise.all(requests.map((request) => streamCompletion(two, request)))).toEqual(expected)
    for (const { worker } of two.workers.values()) expect(worker.engine.counters.outputTokens).toBeGreaterThan(0)
  } finally {
    await one.stop()
    await two.stop()
  }
})

it("a request that is larger than the KV pool is a 400 that says so, and others go on", async () => {
  const small = await startNode({ change: (topology) => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, kv: { ...worker.kv, blocks: 4 } })) }) })
  try {
    const response = await fetch(`${small.url}/v1/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", prompt: "word ".repeat(80), max_tokens: 4 }) })
    expect(response.status).toBe(400)
    expect(await response.json()).toMatchObject({ error: { code: "context_length_exceeded", param: "prompt", type: "invalid_request_error" } })
    // Most chat requests name no max_tokens.
    const chat = await fetch(`${small.url}/v1/chat/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", messages: [{ role: "user", content: "word ".repeat(80) }] }) })
    expect([chat.status, await chat.json()]).toMatchObject([400, { error: { code: "context_length_exceeded", param: "messages" } }])
    expect((await streamCompletion(small, { prompt: "short", max_tokens: 4, ignore_eos: true })).tokens).toHaveLength(4)
  } finally {
    await small.stop()
  }
})

it("text that would take long to tokenise is refused by its field, and no other request waits for it", async () => {
  const node = await startNode()
  try {
    const other = streamCompletion(node, { prompt: "Meanwhile", max_tokens: 30, ignore_eos: true })
    const post = (path: string, body: unknown) => fetch(`${node.url}${path}`, { method: "POST", body: JSON.stringify(body) })
    const [tokenize, word, many] = await Promise.all([
      post("/tokenize", { content: "a ".repeat(450_000) }),
      post("/v1/completions", { model: "tiny", prompt: "a".repeat(900_000) }),
      post("/v1/chat/completions", { model: "tiny", messages: Array.from({ length: 60_000 }, () => ({ role: "user", content: "" })) }),
    ])
    expect([tokenize.status, (await tokenize.json()) as object]).toMatchObject([400, { error: { param: "content" } }])
    expect([word.status, (await word.json()) as object]).toMatchObject([400, { error: { code: "context_length_exceeded", param: "prompt" } }])
    expect([many.status, (await many.json()) as object]).toMatchObject([400, { error: { code: "context_length_exceeded", param: "messages" } }])
    expect((await other).tokens).toHaveLength(30)
  } finally {
    await node.stop()
  }
})
