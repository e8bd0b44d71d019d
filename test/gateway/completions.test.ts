import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { unpackTokens } from "../../actors/messages/tokens.ts"
import { scored } from "../support/fake-request-actor.ts"
import { sseEvents, startGateway, type StartedGateway } from "../support/start-gateway.ts"

let server: StartedGateway
beforeEach(async () => {
  server = await startGateway()
})
afterEach(() => server.close())

const promptOf = (index: number) => {
  const { prompt } = server.actor.generations[index]!.message
  return prompt.kind === "tokens" ? [...unpackTokens(prompt.tokens, "prompt")] : prompt.kind === "text" ? prompt.text : prompt.messages
}

describe("completions", () => {
  it("a plain answer has OpenAI's format and its default of 16 tokens", async () => {
    const answer = await server.client.completions.create({ model: "tiny", prompt: "Once" })
    expect(answer).toMatchObject({ object: "text_completion", choices: [{ index: 0, text: "Hello world", logprobs: null, finish_reason: "stop" }], usage: { prompt_tokens: 3, completion_tokens: 2, total_tokens: 5 } })
    expect(answer.id).toMatch(/^cmpl-/)
    expect(server.actor.last.message).toMatchObject({ prompt: { kind: "text", text: "Once" }, maxTokens: 16 })
  })

  it.each([
    ["a string", "a", ["a"]],
    ["an array of strings", ["a", "b"], ["a", "b"]],
    ["token ids", [5, 6], [[5, 6]]],
    ["arrays of token ids", [[5], [6, 7]], [[5], [6, 7]]],
  ])("a prompt may be %s", async (_, prompt, expected) => {
    await server.client.completions.create({ model: "tiny", prompt })
    expect(server.actor.generations.map((_, index) => promptOf(index))).toEqual(expected)
  })

  it("choices of a batch are numbered prompt-major, and its usage is the sum", async () => {
    server.actor.script = (generation) => {
      const text = generation.message.prompt.kind === "text" ? generation.message.prompt.text : ""
      generation.prompt()
      for (const choice of [1, 0]) generation.delta(choice, `${text}${choice}`, [1], "length")
      generation.done(3, 2, 1)
    }
    const answer = await server.client.completions.create({ model: "tiny", prompt: ["a", "b"], n: 2, seed: 5 })
    expect(answer.choices.map(({ index, text }) => [index, text])).toEqual([[0, "a0"], [1, "a1"], [2, "b0"], [3, "b1"]])
    expect(answer.usage).toMatchObject({ prompt_tokens: 6, completion_tokens: 4, total_tokens: 10, prompt_tokens_details: { cached_tokens: 2 } })
    const streamed = new Map<number, string>()
    const finishes: Array<number> = []
    const stream = await server.client.completions.create({ model: "tiny", prompt: ["a", "b"], n: 2, stream: true, stream_options: { include_usage: true } })
    for await (const chunk of stream) {
      for (const { index, text, finish_reason } of chunk.choices) {
        streamed.set(index, (streamed.get(index) ?? "") + text)
        if (finish_reason !== null) finishes.push(index)
      }
      if (chunk.choices.length === 0) expect(chunk.usage).toMatchObject({ prompt_tokens: 6, completion_tokens: 4 })
    }
    expect([...streamed].sort()).toEqual([[0, "a0"], [1, "a1"], [2, "b0"], [3, "b1"]])
    expect(finishes.sort()).toEqual([0, 1, 2, 3])
  })

  it("one prompt of a batch that fails fails the request and cancels the others", async () => {
    server.actor.script = (generation) => {
      if (generation.message.requestId.endsWith("-1")) generation.fail("invalid_request", "prompt 1 is wrong", { param: "prompt" })
      else generation.endless("x")
    }
    const response = await server.post("/v1/completions", { model: "tiny", prompt: ["a", "b"] })
    expect(response.status).toBe(400)
    expect(await server.actor.generations[0]!.closed).toMatchObject({ code: "cancelled" })
  })

  const echoScript = () => {
    server.actor.script = (generation) => {
      generation.prompt([10, 11], "é!", 0)
      if (generation.message.promptLogprobs) {
        const first = scored(10, "\ufffd", 1)
        generation.send({ type: "scores", logprobs: [{ ...first, bytes: Uint8Array.of(0xc3), logprob: null, top: [] }] })
        generation.send({ type: "scores", logprobs: [{ ...scored(11, "\ufffd", 1), bytes: Uint8Array.of(0xa9, 0x21) }] })
      }
      if (generation.message.maxTokens === 0) generation.delta(0, "", [], "length")
      else generation.delta(0, "ok", [12], "stop")
      generation.done(2, 1)
    }
  }

  it("echo with log probabilities scores the prompt, and offsets count its characters", async () => {
    echoScript()
    const expected = {
      tokens: ["\ufffd", "\ufffd", "ok"],
      token_logprobs: [null, -0.5, -0.5],
      top_logprobs: [null, { "\ufffd": -0.5 }, { ok: -0.5 }],
      text_offset: [0, 0, 2],
    }
    const answer = await server.client.completions.create({ model: "tiny", prompt: "é!", echo: true, logprobs: 1 })
    expect(server.actor.last.message).toMatchObject({ promptLogprobs: true, logprobs: 1 })
    expect(answer.choices[0]).toMatchObject({ text: "é!ok", logprobs: expected })
    const stream = await server.client.completions.create({ model: "tiny", prompt: "é!", echo: true, logprobs: 1, stream: true })
    let text = ""
    const lists: { tokens: Array<unknown>; text_offset: Array<unknown> } = { tokens: [], text_offset: [] }
    for await (const chunk of stream) {
      text += chunk.choices[0]?.text ?? ""
      lists.tokens.push(...(chunk.choices[0]?.logprobs?.tokens ?? []))
      lists.text_offset.push(...(chunk.choices[0]?.logprobs?.text_offset ?? []))
    }
    expect(text).toBe("é!ok")
    expect(lists).toEqual({ tokens: expected.tokens, text_offset: expected.text_offset })
  })

  it("echo with max_tokens 0 only scores", async () => {
    echoScript()
    const answer = await server.client.completions.create({ model: "tiny", prompt: "é!", echo: true, logprobs: 1, max_tokens: 0 })
    expect(answer.choices[0]).toMatchObject({ text: "é!", finish_reason: "length", logprobs: { token_logprobs: [null, -0.5] } })
  })

  it("echo without log probabilities gives the prompt's text back, of token ids too", async () => {
    const text = await server.client.completions.create({ model: "tiny", prompt: "Say: ", echo: true })
    expect(text.choices[0]!.text).toBe("Say: Hello world")
    expect(server.actor.last.message.promptLogprobs).toBe(false)
    const ids = await server.client.completions.create({ model: "tiny", prompt: [65, 66], echo: true })
    expect(ids.choices[0]!.text).toBe("ABHello world")
  })

  it("tokens whose texts are alike keep their own entries among the top log probabilities", async () => {
    server.actor.script = (generation) => {
      generation.prompt()
      const other = { token: 8, text: "\ufffd", bytes: Uint8Array.of(0x9f), logprob: -Infinity }
      generation.send({ type: "delta", choice: 0, text: "", tokens: [7], finish: "length", logprobs: [{ token: 7, text: "\ufffd", bytes: Uint8Array.of(0xf0), logprob: -1, top: [other] }] })
      generation.done()
    }
    const answer = await server.client.completions.create({ model: "tiny", prompt: "x", logprobs: 1 })
    expect(answer.choices[0]!.logprobs!.top_logprobs).toEqual([{ "\ufffd": -9999, "bytes:\\xf0": -1 }])
  })

  it("return_token_ids adds the ids of prompt and answer", async () => {
    const plain = await (await server.post("/v1/completions", { model: "tiny", prompt: "x", return_token_ids: true })).json()
    expect(plain).toMatchObject({ choices: [{ prompt_token_ids: [1, 2, 3], token_ids: [100, 101] }] })
    const events = sseEvents(await (await server.post("/v1/completions", { model: "tiny", prompt: "x", stream: true, return_token_ids: true })).text())
    expect(events[0]).toMatchObject({ choices: [{ prompt_token_ids: [1, 2, 3], text: "" }] })
    expect(events[1]).toMatchObject({ choices: [{ token_ids: [100], text: "Hello" }] })
  })
})

describe("tokenize and detokenize", () => {
  it("text becomes token ids and token ids text", async () => {
    expect(await (await server.post("/tokenize", { content: "AB" })).json()).toEqual({ tokens: [65, 66] })
    expect(await (await server.post("/detokenize", { tokens: [65, 66] })).json()).toEqual({ content: "AB" })
    expect((await server.post("/tokenize", { content: 5 })).status).toBe(400)
    expect((await server.post("/detokenize", { tokens: [1, -1] })).status).toBe(400)
  })
})
