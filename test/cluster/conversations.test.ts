/** Conversations by previous_response_id: what is cached is what block arithmetic says, to the token. */
import { NodeWS } from "@effect/platform-node/NodeSocket"
import { afterEach, expect, it } from "vitest"
import OpenAI from "openai"
import { Pin } from "../../actors/messages/kv-store.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { Cluster } from "../support/cluster.ts"
import { startNode, type StartedNode } from "../support/start-node.ts"

const blockTokens = 16
const end = 2 // <|im_end|>
let node: StartedNode
afterEach(() => node.stop())

const start = async () => {
  node = await startNode({ tiny: { context: 1024 } })
  return new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "none", maxRetries: 0 })
}

/** The KV of the last token drawn was not computed, and at least one token of a prompt always is. */
const expectedCached = (known: number, prompt: number): number => Math.floor(Math.min(known, prompt - 1) / blockTokens) * blockTokens

const tokensOf = async (content: string): Promise<number> => {
  const response = await fetch(`${node.url}/tokenize`, { method: "POST", body: JSON.stringify({ content }) })
  return ((await response.json()) as { tokens: ReadonlyArray<number> }).tokens.length
}

it("a conversation goes on from its own ids, so that every full block of it is found, whatever the lengths", async () => {
  const client = await start()
  // No answer ends with a token that the template writes.
  const more = { temperature: 1, ignore_eos: true, logit_bias: { 0: -100, [end]: -100 } }
  const ask = (input: string, maxTokens: number, previous?: string) =>
    client.responses.create({ model: "tiny", input, max_output_tokens: maxTokens, previous_response_id: previous, ...more } as never) as Promise<OpenAI.Responses.Response>
  for (const [round, first] of [20, 27, 28, 29, 43].entries()) {
    let known = 0
    let before: OpenAI.Responses.Response | undefined
    for (const [turn, maxTokens] of [first, 17, 1, 32].entries()) {
      const input = `Round ${round}, turn ${turn}: the water comes down and the wheel turns.`
      const response = await ask(input, maxTokens, before?.id)
      const { input_tokens: prompt, output_tokens: answer, input_tokens_details: details } = response.usage!
      expect(answer).toBe(maxTokens)
      const turnText = `<|im_start|>user\n${input}<|im_end|>\n<|im_start|>assistant\n`
      // The answer was cut off: the template ends it.
      const earlier = before === undefined ? 0 : known + 1
      expect(prompt).toBe(earlier + (await tokensOf(before === undefined ? turnText : `<|im_end|>\n${turnText}`)))
      if (turn > 0) expect(details.cached_tokens, `round ${round}, turn ${turn}`).toBe(expectedCached(known, prompt))
      known = prompt + answer - 1
      before = response
    }
  }
})

it("a turn that ended with the model's own end goes on behind it, and its tokens are those of a prompt of the same ids", async () => {
  const client = await start()
  const more = { temperature: 0, ignore_eos: true, return_token_ids: true }
  const first = (await client.responses.create({ model: "tiny", input: "The gate is open.", max_output_tokens: 40, ...more, ignore_eos: false, logit_bias: { [end]: 4 }, seed: 3 } as never)) as OpenAI.Responses.Response
  const second = (await client.responses.create({ model: "tiny", input: "And the stream is full.", max_output_tokens: 20, previous_response_id: first.id, ...more } as never)) as OpenAI.Responses.Response
  const idsOf = (response: OpenAI.Responses.Response) => (response.output[0] as unknown as { token_ids: ReadonlyArray<number> }).token_ids
  expect([first.status, idsOf(first).at(-1)]).toEqual(["completed", end])
  const tokenize = async (content: string) => ((await (await fetch(`${node.url}/tokenize`, { method: "POST", body: JSON.stringify({ content }) })).json()) as { tokens: ReadonlyArray<number> }).tokens
  const prompt = [
    ...(await tokenize("<|im_start|>user\nThe gate is open.<|im_end|>\n<|im_start|>assistant\n")),
    ...idsOf(first),
    ...(await tokenize("\n<|im_start|>user\nAnd the stream is full.<|im_end|>\n<|im_start|>assistant\n")),
  ]
  expect(second.usage!.input_tokens).toBe(prompt.length)
  const plain = await fetch(`${node.url}/v1/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", prompt, max_tokens: 20, ...more }) })
  expect(((await plain.json()) as { choices: ReadonlyArray<{ token_ids: unknown }> }).choices[0]!.token_ids).toEqual(idsOf(second))
})

it("the KV of a conversation stays in a full store while its connection is open, and no longer", async () => {
  const blocks = 40
  node = await startNode({
    change: (topology) => ({
      ...topology,
      kvStore: { ...topology.kvStore, memory: blocks * 4096, disk: { ...topology.kvStore.disk, size: 0 } },
      workers: topology.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: 16 } })),
    }),
  })
  const cluster = new Cluster(node).fetchAlways()
  let flood = 0
  /** So many blocks of others that neither the pool nor the store has room for anything else. */
  const others = async () => {
    for (let i = 0; i < 10; i++) {
      await cluster.generate({ prompt: Array.from({ length: 200 }, (_, token) => 3 + ((token * 7 + flood * 13) % 250)), maxTokens: 1 })
      flood++
      await cluster.untilStored()
    }
  }
  const socket = new NodeWS.WebSocket(`ws://127.0.0.1:${node.port}/v1/responses`)
  await new Promise((resolve) => socket.on("open", resolve))
  const ask = (previous?: string) =>
    new Promise<OpenAI.Responses.Response>((resolve, reject) => {
      socket.removeAllListeners("message")
      socket.on("message", (data) => {
        const event = JSON.parse(String(data)) as { readonly type: string; readonly response: OpenAI.Responses.Response }
        if (event.type === "error" || event.type === "response.failed") reject(new Error(String(data)))
        if (event.type === "response.completed" || event.type === "response.incomplete") resolve(event.response)
      })
      socket.send(JSON.stringify({ type: "response.create", model: "tiny", input: "The water comes down and the wheel turns.", max_output_tokens: 20, previous_response_id: previous, temperature: 1, ignore_eos: true, logit_bias: { 0: -100, [end]: -100 } }))
    })
  const first = await ask()
  await cluster.untilStored()
  await others()
  const second = await ask(first.id)
  expect(second.usage!.input_tokens_details.cached_tokens).toBe(expectedCached(first.usage!.input_tokens + first.usage!.output_tokens - 1, second.usage!.input_tokens))
  const letGo = new Promise<void>((resolve) => node.bus.subscribe(subject(node.namespace, "kv-store", anyId, Pin.verb), ({ data }) => Pin.decode(data).leaseMs === 0 && resolve()))
  socket.close()
  await letGo
  await cluster.untilStored()
  await others()
  const third = (await new OpenAI({ baseURL: `${node.url}/v1`, apiKey: "none", maxRetries: 0 }).responses.create({ model: "tiny", input: "And then?", max_output_tokens: 1, previous_response_id: second.id })) as OpenAI.Responses.Response
  expect(third.usage!.input_tokens_details.cached_tokens).toBe(0)
})

it("a conversation that has filled the context is refused by the name that its client knows", async () => {
  const client = await start()
  const first = await client.responses.create({ model: "tiny", input: "Once:", ignore_eos: true } as never) as OpenAI.Responses.Response
  expect(first.status).toBe("incomplete")
  const next = client.responses.create({ model: "tiny", input: "Once more:", previous_response_id: first.id } as never)
  await expect(next).rejects.toMatchObject({ status: 400, code: "context_length_exceeded", param: "input", message: expect.stringContaining("input: at most 1023 prompt tokens") })
})
