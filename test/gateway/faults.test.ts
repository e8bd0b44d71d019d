import { Effect, Fiber } from "effect"
import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { unpackTokens } from "../../actors/messages/tokens.ts"
import { header } from "../../actors/runtime/bus.ts"
import { Fault, type FaultCode } from "../../actors/runtime/fault.ts"
import { limits } from "../../config/limits.ts"
import type { ErrorBody } from "../../gateway/errors.ts"
import { scored } from "../support/fake-request-actor.ts"
import { sseEvents, startGateway, type StartedGateway } from "../support/start-gateway.ts"

let server: StartedGateway
beforeEach(async () => {
  server = await startGateway({ bounds: { requests: 2 } })
})
afterEach(() => server.close())

const chat = { model: "tiny", messages: [{ role: "user", content: "x" }] }

const table: ReadonlyArray<readonly [FaultCode, status: number, code: string | null]> = [
  ["invalid_request", 400, null],
  ["context_length_exceeded", 400, "context_length_exceeded"],
  ["model_not_found", 404, "model_not_found"],
  ["overloaded", 429, "rate_limit_exceeded"],
  ["unavailable", 503, "unavailable"],
  ["shutting_down", 503, "shutting_down"],
  ["moved", 503, "unavailable"],
  ["stale", 503, "unavailable"],
  ["deadline_exceeded", 504, "deadline_exceeded"],
  ["disconnected", 502, "disconnected"],
  ["cancelled", 499, "cancelled"],
  ["internal", 500, "internal_error"],
]

describe("a fault of the request actor", () => {
  it.each(table)("%s before the first byte has status %i, streamed or not", async (fault, status, code) => {
    server.actor.script = (generation) => generation.fail(fault, "because", { param: "messages", retryAfterMs: fault === "overloaded" ? 1500 : undefined })
    for (const stream of [false, true]) {
      const response = await server.post("/v1/chat/completions", { ...chat, stream })
      expect(response.status).toBe(status)
      expect(response.headers.get("retry-after")).toBe(fault === "overloaded" ? "2" : null)
      expect(response.headers.get("x-request-id")).toMatch(/^req_/)
      expect(await response.json()).toMatchObject({ error: { message: "because", code, param: "messages" } })
    }
  })

  it("a refusal before the stream is accepted has its status too", async () => {
    server.actor.refusal = new Fault({ code: "overloaded", message: "full", hop: "request fake" })
    const response = await server.post("/v1/chat/completions", chat)
    expect(response.status).toBe(429)
    expect(response.headers.get("retry-after")).toBe(String(limits.retryAfterMs / 1000))
  })

  it("mid-stream it is an error event, and the stream ends without [DONE]", async () => {
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "Hel", [1])
      generation.fail("disconnected", "decode w0: gone")
    }
    const events = sseEvents(await (await server.post("/v1/chat/completions", { ...chat, stream: true })).text())
    expect(events.at(-1)).toEqual({ error: { message: "decode w0: gone", type: "server_error", param: null, code: "disconnected" } })
    expect(events).not.toContain("[DONE]")
    const stream = await server.client.chat.completions.create({ model: "tiny", messages: [{ role: "user", content: "x" }], stream: true })
    await expect(async () => {
      for await (const _ of stream);
    }).rejects.toMatchObject({ code: "disconnected" })
  })

  it("a stream that ends before it is done is a failure and not a short answer", async () => {
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "Hel", [1])
      generation.writer.end()
    }
    expect((await server.post("/v1/chat/completions", chat)).status).toBe(502)
  })

  it("nobody serving requests is a 503", async () => {
    const alone = await startGateway({ namespace: "empty" })
    const response = await alone.post("/v1/chat/completions", chat)
    expect(response.status).toBe(503)
    expect(await response.json()).toMatchObject({ error: { code: "unavailable" } })
    expect((await alone.post("/tokenize", { content: "x" })).status).toBe(503)
    await alone.close()
  })
})

describe("a fault that may be retried", () => {
  it("before the first token: the request is sent again as a later attempt, and the client sees one answer", async () => {
    server.actor.script = (generation) => {
      if (generation.message.attempt === 0) {
        generation.prompt()
        generation.fail("disconnected", "said disconnected", { hop: "request fake" })
      } else generation.say(["Hello"])
    }
    const events = sseEvents(await (await server.post("/v1/chat/completions", { ...chat, seed: 5, stream: true })).text())
    expect(events.map((event) => (event as { choices?: Array<{ delta: object }> }).choices?.[0]?.delta)).toEqual([{ role: "assistant", content: "" }, { content: "Hello" }, {}, undefined])
    const [first, second] = server.actor.generations.map(({ message }) => message)
    expect(second).toMatchObject({ requestId: first!.requestId, attempt: 1, sampling: first!.sampling })
    expect(second!.delivered.map(({ byteLength }) => byteLength)).toEqual([0])
    expect(Number(server.actor.generations[1]!.headers[header.budgetMs])).toBeLessThan(Number(server.actor.generations[0]!.headers[header.budgetMs]))
  })

  it("after the first token: a later attempt goes on with what was delivered, and the client sees one answer", async () => {
    server.actor.script = (generation) => {
      generation.prompt()
      if (generation.message.attempt === 0) {
        generation.delta(0, "one ", [11])
        generation.delta(0, "two ", [12])
        return generation.fail("disconnected", "said disconnected", { hop: "request fake" })
      }
      generation.delta(0, "three", [13], "stop")
      generation.done(3, 3)
    }
    const response = await server.post("/v1/chat/completions", { ...chat, return_token_ids: true })
    expect(await response.json()).toMatchObject({ choices: [{ message: { content: "one two three" }, token_ids: [11, 12, 13], finish_reason: "stop" }] })
    expect([...unpackTokens(server.actor.last.message.delivered[0]!, "delivered")]).toEqual([11, 12])
  })

  it.each(["moved", "stale"] as const)("%s: what is given back goes on elsewhere, more often than what fails, and no score of the prompt comes twice", async (code) => {
    const moves = 3 * limits.generateAttempts
    const prompt = [3, 4, 5, 6]
    server.actor.script = (generation) => {
      const { attempt } = generation.message
      generation.prompt(prompt, "the prompt")
      // Each attempt scores the prompt from the beginning, and the first ones not to its end.
      prompt.slice(0, 1 + attempt).forEach((token, i) => generation.send({ type: "scores", logprobs: [{ ...scored(token, `s${i}`, 0), logprob: i === 0 ? null : -i }] }))
      if (attempt >= 3) generation.delta(0, `${attempt} `, [100 + attempt], attempt === moves ? "stop" : undefined)
      if (attempt < moves) generation.fail(code, "given back", { hop: "request fake" })
      else generation.done(4, moves)
    }
    const response = await server.post("/v1/completions", { model: "tiny", prompt, echo: true, logprobs: 0, max_tokens: 99, return_token_ids: true })
    const [choice] = ((await response.json()) as { choices: Array<{ token_ids: Array<number>; logprobs: { token_logprobs: Array<number | null> } }> }).choices
    expect(choice!.token_ids.slice(-(moves - 2))).toEqual(Array.from({ length: moves - 2 }, (_, i) => 103 + i))
    expect(choice!.logprobs.token_logprobs.slice(0, 4)).toEqual([null, -1, -2, -3])
    expect(choice!.logprobs.token_logprobs).toHaveLength(4 + moves - 2)
    expect(server.actor.generations).toHaveLength(moves + 1)
  })

  it("waits for a request actor to come back where one has had the request, begun or not, longer than where none has", async () => {
    const losses = { begun: 1, lost: 2 }
    server.actor.script = (generation) => {
      const { attempt, sampling } = generation.message
      if (attempt === 0 && sampling.seed === losses.begun) {
        generation.prompt()
        generation.delta(0, "one ", [11])
        return generation.fail("moved", "given back", { hop: "request fake" })
      }
      if (attempt === 0) return generation.fail("deadline_exceeded", "no sign of life", { hop: "request" })
      if (attempt < limits.generateAttempts + 2) return generation.fail("unavailable", "nobody serves it", { hop: "request" })
      generation.prompt()
      generation.delta(0, "two", [12], "stop")
      generation.done(3, 2)
    }
    const answers = Object.values(losses).map(async (seed) => (await server.post("/v1/chat/completions", { ...chat, seed, return_token_ids: true })).json())
    expect(await Promise.all(answers)).toMatchObject([{ choices: [{ token_ids: [11, 12] }] }, { choices: [{ token_ids: [12] }] }])
  })

  it("is not retried for ever, nor where it happened behind the request actor, nor when overloaded", async () => {
    server.actor.script = (generation) => generation.fail("unavailable", "said unavailable", { hop: "request fake" })
    expect((await server.post("/v1/chat/completions", chat)).status).toBe(503)
    expect(server.actor.generations).toHaveLength(limits.generateAttempts)
    server.actor.script = (generation) => generation.fail("overloaded")
    expect((await server.post("/v1/chat/completions", chat)).status).toBe(429)
    expect(server.actor.generations).toHaveLength(limits.generateAttempts + 1)
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "x", [1])
      generation.fail("disconnected", "said disconnected", { hop: "decode d0" })
    }
    expect((await server.post("/v1/chat/completions", chat)).status).toBe(502)
    expect(server.actor.generations).toHaveLength(limits.generateAttempts + 2)
  })
})

describe("admission", () => {
  it("a gateway that leaves lets nobody in, and has left when the last request has ended", async () => {
    server.actor.script = (generation) => generation.prompt()
    const open = server.post("/v1/completions", { model: "tiny", prompt: "x" })
    const begun = await server.actor.nth(0)
    const leaving = Effect.runFork(server.gateway.leave())
    expect((await server.post("/v1/completions", { model: "tiny", prompt: "x" })).status).toBe(503)
    expect((await fetch(`${server.url}/ready`)).status).toBe(503)
    expect(leaving.pollUnsafe()).toBeUndefined()
    begun.delta(0, "x", [1], "stop")
    begun.done()
    expect((await open).status).toBe(200)
    await Effect.runPromise(Fiber.join(leaving))
  })

  it("beyond its open requests the gateway answers 429, and admits again when one has ended", async () => {
    server.actor.script = (generation) => generation.prompt()
    const open = [server.post("/v1/chat/completions", { ...chat, stream: true }), server.post("/v1/completions", { model: "tiny", prompt: "x" })]
    await server.actor.nth(1)
    const refused = await server.post("/v1/chat/completions", chat)
    expect(refused.status).toBe(429)
    expect(refused.headers.get("retry-after")).toBe("1")
    expect(((await refused.json()) as ErrorBody).error.code).toBe("rate_limit_exceeded")
    expect((await fetch(`${server.url}/health`)).status).toBe(200)
    for (const generation of server.actor.generations) {
      generation.delta(0, "x", [1], "stop")
      generation.done()
    }
    for (const response of open) await (await response).text()
    server.actor.script = (generation) => generation.say(["x"])
    expect((await server.post("/v1/chat/completions", chat)).status).toBe(200)
  })
})
