import { afterAll, beforeAll, describe, expect, it } from "vitest"
import type { ErrorBody } from "../../gateway/errors.ts"
import { startGateway, type StartedGateway } from "../support/start-gateway.ts"

let server: StartedGateway
beforeAll(async () => {
  server = await startGateway({ bounds: { bodyBytes: 100_000 } })
})
afterAll(() => server.close())

const refused = async (path: string, body: unknown) => {
  const before = server.actor.generations.length
  const response = await server.post(path, body)
  const { error } = (await response.json()) as ErrorBody
  expect(server.actor.generations.length).toBe(before)
  return { status: response.status, ...error }
}

const chat = { model: "tiny", messages: [{ role: "user", content: "x" }] }
const completion = { model: "tiny", prompt: "x" }

describe("a known field with a wrong type or range is a 400 that names it, what it may be and what was found", () => {
  it.each<[field: string, value: unknown, param: string, message: RegExp]>([
    ["temperature", "hot", "temperature", /^temperature: expected a number between 0 and 2, found "hot"$/],
    ["temperature", 2.5, "temperature", /between 0 and 2, found 2.5$/],
    ["temperature", -0.1, "temperature", /found -0.1$/],
    ["top_p", 0, "top_p", /a number above 0 and at most 1, found 0$/],
    ["top_p", 1.1, "top_p", /found 1.1$/],
    ["n", 0, "n", /an integer between 1 and 128, found 0$/],
    ["n", 129, "n", /found 129$/],
    ["n", 1.5, "n", /found 1.5$/],
    ["max_tokens", 0, "max_tokens", /an integer of 1 or more, found 0$/],
    ["max_completion_tokens", "9", "max_completion_tokens", /found "9"$/],
    ["stop", 5, "stop", /a string or an array/],
    ["stop", ["a", 5], "stop[1]", /found 5$/],
    ["stop", Array.from({ length: 17 }, () => "a"), "stop", /at most 16 strings.*found an array of 17$/],
    ["seed", 1.5, "seed", /an integer, found 1.5$/],
    ["seed", "7", "seed", /found "7"$/],
    ["stream", "yes", "stream", /true or false, found "yes"$/],
    ["stream_options", { include_usage: true }, "stream_options", /only allowed when stream is true$/],
    ["presence_penalty", 3, "presence_penalty", /between -2 and 2, found 3$/],
    ["frequency_penalty", "0", "frequency_penalty", /found "0"$/],
    ["repetition_penalty", 0, "repetition_penalty", /found 0$/],
    ["logit_bias", { "5": 101 }, "logit_bias.5", /between -100 and 100, found 101$/],
    ["logit_bias", { hello: 1 }, "logit_bias", /token ids as keys, found "hello"$/],
    ["logit_bias", [1], "logit_bias", /an object of token ids.*found an array of 1$/],
    ["logprobs", 5, "logprobs", /true or false, found 5$/],
    ["top_logprobs", 21, "top_logprobs", /between 0 and 20, found 21$/],
    ["top_logprobs", 2, "top_logprobs", /only allowed when logprobs is true$/],
    ["top_k", 1.5, "top_k", /found 1.5$/],
    ["top_k", -2, "top_k", /an integer of -1 or more, found -2$/],
    ["min_p", 1.5, "min_p", /found 1.5$/],
    ["stop_token_ids", [1, "a"], "stop_token_ids[1]", /a token id.*found "a"$/],
    ["ignore_eos", 1, "ignore_eos", /found 1$/],
    ["min_tokens", -1, "min_tokens", /found -1$/],
    ["cache_salt", 5, "cache_salt", /found 5$/],
    ["user", {}, "user", /a string, found an object$/],
    ["model", 5, "model", /found 5$/],
    ["messages", [], "messages", /at least one message, found an array of 0$/],
    ["messages", "hi", "messages", /found "hi"$/],
    ["messages", [{ role: "robot", content: "x" }], "messages[0].role", /one of system, developer, user, assistant, tool, found "robot"$/],
    ["messages", [{ content: "x" }], "messages[0].role", /found nothing$/],
    ["messages", [{ role: "user", content: 5 }], "messages[0].content", /a string or an array of text parts, found 5$/],
    ["messages", [{ role: "user", content: null }], "messages[0].content", /found null$/],
    ["messages", [{ role: "user", content: [{ type: "image_url", image_url: { url: "x" } }] }], "messages[0].content[0].type", /takes text only.*found "image_url"$/],
    ["messages", [{ role: "user", content: [{ type: "text" }] }], "messages[0].content[0].text", /found nothing$/],
    ["tools", [{ type: "function" }], "tools", /not supported yet$/],
    ["tool_choice", "required", "tool_choice", /not supported yet$/],
    ["response_format", { type: "json_object" }, "response_format", /not supported yet$/],
    ["response_format", { type: "xml" }, "response_format.type", /expected "text", found "xml"$/],
  ])("chat: %s = %j", async (field, value, param, message) => {
    expect(await refused("/v1/chat/completions", { ...chat, [field]: value })).toMatchObject({ status: 400, type: "invalid_request_error", param, message: expect.stringMatching(message) })
  })

  it.each<[field: string, value: unknown, param: string, message: RegExp]>([
    ["prompt", undefined, "prompt", /found nothing$/],
    ["prompt", [], "prompt", /found an empty array$/],
    ["prompt", [[]], "prompt", /at least one token id/],
    ["prompt", [1, "a"], "prompt", /an array of token ids or an array of those, found an array of 2$/],
    ["prompt", { a: 1 }, "prompt", /found an object$/],
    ["prompt", [-5], "prompt", /found an array of 1$/],
    ["prompt", Array.from({ length: 65 }, () => "a"), "prompt", /at most 64 prompts, found 65$/],
    ["logprobs", true, "logprobs", /an integer between 0 and 20, found true$/],
    ["suffix", "end", "suffix", /not supported yet$/],
    ["best_of", 3, "best_of", /only the value of n/],
    ["max_tokens", -1, "max_tokens", /found -1$/],
    ["echo", "yes", "echo", /true or false, found "yes"$/],
  ])("completions: %s = %j", async (field, value, param, message) => {
    expect(await refused("/v1/completions", { ...completion, [field]: value })).toMatchObject({ status: 400, type: "invalid_request_error", param, message: expect.stringMatching(message) })
  })

  it("null stands for absent", async () => {
    const nulls = Object.fromEntries(["temperature", "top_p", "n", "max_tokens", "stop", "seed", "stream", "stream_options", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "user"].map((name) => [name, null]))
    expect((await server.post("/v1/chat/completions", { ...chat, ...nulls })).status).toBe(200)
    expect((await server.post("/v1/completions", { ...completion, ...nulls, suffix: null, best_of: null, echo: null })).status).toBe(200)
  })
})

describe("bodies", () => {
  it("broken JSON is a 400 with the parser's position", async () => {
    expect(await refused("/v1/chat/completions", '{"model": "tiny", }')).toMatchObject({ status: 400, code: "invalid_json", message: expect.stringMatching(/not JSON: .*position 18/) })
    expect(await refused("/v1/chat/completions", "")).toMatchObject({ status: 400, message: expect.stringContaining("empty") })
    expect(await refused("/v1/chat/completions", "[1]")).toMatchObject({ status: 400, message: "expected an object, found an array of 1" })
    expect(await refused("/v1/chat/completions", "null")).toMatchObject({ status: 400, message: "expected an object, found null" })
  })

  it("JSON of another content type is taken, nested however deep", async () => {
    const response = await server.post("/v1/chat/completions", chat, { "content-type": "text/plain" })
    expect(response.status).toBe(200)
    const deep = "[".repeat(20_000) + "]".repeat(20_000)
    expect(await refused("/v1/completions", `{"model":"tiny","prompt":${deep}}`)).toMatchObject({ status: 400, param: "prompt" })
  })

  it("a body over the limit is a 413, whether its length was announced or not", async () => {
    const body = JSON.stringify({ ...completion, prompt: "x".repeat(200_000) })
    expect(await refused("/v1/completions", body)).toMatchObject({ status: 413, code: "request_too_large" })
    const chunks = new ReadableStream({
      start(controller) {
        for (let index = 0; index < 20; index++) controller.enqueue(new TextEncoder().encode(body.slice(index * 10_000, (index + 1) * 10_000)))
        controller.close()
      },
    })
    const init = { method: "POST", body: chunks, duplex: "half" } as RequestInit
    expect((await fetch(`${server.url}/v1/completions`, init)).status).toBe(413)
  })

  it("a prompt that no message of the bus could carry is a 400", async () => {
    const big = await startGateway()
    const response = await big.post("/v1/completions", { ...completion, prompt: "x".repeat(1_100_000) })
    expect(response.status).toBe(400)
    expect(await response.json()).toMatchObject({ error: { code: "context_length_exceeded", param: "prompt" } })
    await big.close()
  })
})

describe("models", () => {
  it("a request for another model is a 404, one for none a 400", async () => {
    expect(await refused("/v1/chat/completions", { ...chat, model: "gpt-4" })).toMatchObject({ status: 404, code: "model_not_found", param: "model" })
    expect(await refused("/v1/chat/completions", { messages: chat.messages })).toMatchObject({ status: 400, param: "model" })
    await expect(server.client.models.retrieve("nope")).rejects.toMatchObject({ status: 404, code: "model_not_found" })
  })

  it("the served model is listed and can be retrieved", async () => {
    const list = await server.client.models.list()
    expect(list.data).toEqual([{ id: "tiny", object: "model", created: 1_700_000_000, owned_by: "penstock", max_model_len: 2048 }])
    expect(await server.client.models.retrieve("tiny")).toMatchObject({ id: "tiny" })
  })
})
