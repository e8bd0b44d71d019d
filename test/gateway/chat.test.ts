import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { sseEvents, startGateway, type StartedGateway } from "../support/start-gateway.ts"

let server: StartedGateway
beforeEach(async () => {
  server = await startGateway()
})
afterEach(() => server.close())

const messages = [{ role: "user" as const, content: "Hi" }]

describe("chat completions", () => {
  it("a plain answer has OpenAI's format, with usage and cached tokens", async () => {
    server.actor.script = (generation) => generation.say(["Hello", " world"], "stop", 2)
    const answer = await server.client.chat.completions.create({ model: "tiny", messages })
    expect(answer).toMatchObject({
      object: "chat.completion",
      model: "tiny",
      choices: [{ index: 0, message: { role: "assistant", content: "Hello world", refusal: null }, logprobs: null, finish_reason: "stop" }],
      usage: { prompt_tokens: 3, completion_tokens: 2, total_tokens: 5, prompt_tokens_details: { cached_tokens: 2 } },
    })
    expect(answer.id).toMatch(/^chatcmpl-/)
    expect(Number.isInteger(answer.created)).toBe(true)
  })

  it("what the client asks reaches the request actor, and OpenAI's defaults where it is silent", async () => {
    await server.client.chat.completions.create({ model: "tiny", messages })
    const { message, headers } = server.actor.last
    expect(message).toMatchObject({ attempt: 0, tenant: "default", choices: 1, stop: [], stopTokenIds: [], ignoreEos: false, promptLogprobs: false, delivered: [], prompt: { kind: "chat", messages } })
    expect(message.maxTokens).toBeUndefined()
    expect(message.logprobs).toBeUndefined()
    expect(message.sampling).toMatchObject({ temperature: 1, topP: 1, topK: 0, minP: 0, repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, logitBias: [], minTokens: 0 })
    expect(headers["traceparent"]).toMatch(/^00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]$/)
    const asked = {
      model: "tiny", temperature: 0.5, top_p: 0.9, n: 2, stop: "END", seed: 7, presence_penalty: 1, frequency_penalty: -1, logit_bias: { "5": -100 }, max_tokens: 9, max_completion_tokens: 8,
      logprobs: true, top_logprobs: 3, top_k: -1, min_p: 0.1, repetition_penalty: 1.1, stop_token_ids: [4], ignore_eos: true, min_tokens: 2, cache_salt: "s", user: "u", unknown_field: { a: 1 }, tools: [], response_format: { type: "text" },
      messages: [{ role: "developer", content: [{ type: "text", text: "a" }, { type: "text", text: "b" }] }, { role: "assistant", content: null }, { role: "user", content: "x", name: "N" }],
    }
    expect((await server.post("/v1/chat/completions", asked)).status).toBe(200)
    expect(server.actor.last.message).toMatchObject({
      choices: 2, stop: ["END"], stopTokenIds: [4], ignoreEos: true, maxTokens: 8, logprobs: 3, cacheSalt: "s",
      prompt: { kind: "chat", messages: [{ role: "system", content: "a\nb" }, { role: "assistant", content: "" }, { role: "user", content: "x", name: "N" }] },
      sampling: { temperature: 0.5, topP: 0.9, topK: 0, minP: 0.1, repetitionPenalty: 1.1, presencePenalty: 1, frequencyPenalty: -1, logitBias: [[5, -100]], minTokens: 2, seed: 7 },
    })
  })

  it("seeds: a negative one is always the same number of the sampler's range, and without one each request draws its own", async () => {
    const seedOf = async (seed: number | null) => {
      await server.client.chat.completions.create({ model: "tiny", messages, seed })
      return server.actor.last.message.sampling.seed
    }
    const negative = await seedOf(-1)
    expect(negative).toBe(await seedOf(-1))
    expect(Number.isSafeInteger(negative) && negative >= 0).toBe(true)
    expect(negative).not.toBe(await seedOf(1))
    expect(await seedOf(null)).not.toBe(await seedOf(null))
  })

  it("a stream begins with the role, finishes each choice once, and ends with [DONE]", async () => {
    const response = await server.post("/v1/chat/completions", { model: "tiny", messages, n: 2, stream: true })
    expect(response.headers.get("content-type")).toContain("text/event-stream")
    const events = sseEvents(await response.text())
    expect(events.at(-1)).toBe("[DONE]")
    const chunks = events.slice(0, -1) as Array<{ id: string; created: number; object: string; usage?: unknown; choices: Array<{ index: number; delta: Record<string, string>; finish_reason: string | null }> }>
    expect(new Set(chunks.map(({ id, created, object }) => `${id} ${created} ${object}`)).size).toBe(1)
    for (const index of [0, 1]) {
      const choices = chunks.flatMap((chunk) => chunk.choices).filter((choice) => choice.index === index)
      expect(choices[0]).toMatchObject({ delta: { role: "assistant", content: "" }, finish_reason: null })
      expect(choices.map(({ delta }) => delta["content"] ?? "").join("")).toBe("Hello world")
      expect(choices.map(({ finish_reason }) => finish_reason).filter((finish) => finish !== null)).toEqual(["stop"])
      expect(choices.at(-1)).toMatchObject({ delta: {}, finish_reason: "stop" })
    }
    expect(chunks.some((chunk) => "usage" in chunk)).toBe(false)
  })

  it("include_usage: every chunk has usage null, and one last chunk has no choices and the usage", async () => {
    const stream = await server.client.chat.completions.create({ model: "tiny", messages, stream: true, stream_options: { include_usage: true } })
    const chunks = []
    for await (const chunk of stream) chunks.push(chunk)
    expect(chunks.slice(0, -1).every((chunk) => chunk.usage === null)).toBe(true)
    expect(chunks.at(-1)).toMatchObject({ choices: [], usage: { prompt_tokens: 3, completion_tokens: 2, total_tokens: 5, prompt_tokens_details: { cached_tokens: 0 } } })
  })

  it("the official client's stream helper puts the same message together", async () => {
    const final = await server.client.chat.completions.stream({ model: "tiny", messages }).finalChatCompletion()
    expect(final.choices[0]).toMatchObject({ message: { content: "Hello world" }, finish_reason: "stop" })
  })

  it("log probabilities have the chat format, plain and streamed", async () => {
    const entry = { token: "Hello", logprob: -0.5, bytes: [...Buffer.from("Hello")] }
    const plain = await server.client.chat.completions.create({ model: "tiny", messages, logprobs: true, top_logprobs: 2 })
    expect(plain.choices[0]!.logprobs!.content).toHaveLength(2)
    expect(plain.choices[0]!.logprobs!.content![0]).toEqual({ ...entry, top_logprobs: [entry, { token: "alt0", logprob: -2, bytes: [...Buffer.from("alt0")] }] })
    const stream = await server.client.chat.completions.create({ model: "tiny", messages, logprobs: true, stream: true })
    const tokens = []
    for await (const chunk of stream) tokens.push(...(chunk.choices[0]?.logprobs?.content ?? []))
    expect(tokens.map(({ token, top_logprobs }) => [token, top_logprobs])).toEqual([["Hello", []], [" world", []]])
  })

  it("return_token_ids adds the ids of prompt and answer, and of each delta", async () => {
    const plain = (await (await server.post("/v1/chat/completions", { model: "tiny", messages, return_token_ids: true })).json()) as { prompt_token_ids: unknown; choices: Array<{ token_ids: unknown }> }
    expect(plain.prompt_token_ids).toEqual([1, 2, 3])
    expect(plain.choices[0]!.token_ids).toEqual([100, 101])
    const events = sseEvents(await (await server.post("/v1/chat/completions", { model: "tiny", messages, stream: true, return_token_ids: true })).text())
    expect(events[0]).toMatchObject({ prompt_token_ids: [1, 2, 3] })
    expect(events.flatMap((event) => (event as { choices?: Array<{ token_ids?: Array<number> }> }).choices?.[0]?.token_ids ?? [])).toEqual([100, 101])
  })

  it("tokens whose text is held back reach the client once it is safe, without empty chunks before", async () => {
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "", [1])
      generation.delta(0, "é", [2])
      generation.delta(0, "", [3], "length")
      generation.done(3, 3)
    }
    const events = sseEvents(await (await server.post("/v1/chat/completions", { model: "tiny", messages, stream: true })).text())
    expect(events.map((event) => (event as { choices?: Array<{ delta: object }> }).choices?.[0]?.delta)).toEqual([{ role: "assistant", content: "" }, { content: "é" }, {}, undefined])
  })
})
