import { NodeWS } from "@effect/platform-node/NodeSocket"
import type OpenAI from "openai"
import { ResponsesWS } from "openai/resources/responses/ws"
import { createHash } from "node:crypto"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterEach, describe, expect, it } from "vitest"
import { limits } from "../../config/limits.ts"
import { unpackTokens } from "../../actors/messages/tokens.ts"
import { Turns } from "../../gateway/turns.ts"
import type { FakeGeneration } from "../support/fake-request-actor.ts"
import { startGateway, type StartedGateway } from "../support/start-gateway.ts"

type Event = OpenAI.Responses.ResponseStreamEvent

let server: StartedGateway
const open: Array<NodeWS.WebSocket> = []
afterEach(async () => {
  for (const socket of open.splice(0)) socket.terminate()
  await server.close()
})

const order = [
  "response.created",
  "response.in_progress",
  "response.output_item.added",
  "response.content_part.added",
  "response.output_text.delta",
  "response.output_text.delta",
  "response.output_text.done",
  "response.content_part.done",
  "response.output_item.done",
  "response.completed",
]

const prompts = () => server.actor.generations.map(({ message }) => (message.prompt.kind === "chat" ? message.prompt.messages.map(({ role, content }) => `${role}: ${content}`) : []))

/** A WebSocket client whose events can be waited for one by one. */
const connect = async (headers: Record<string, string> = {}, path = "/v1/responses") => {
  const socket = new NodeWS.WebSocket(`ws://127.0.0.1:${server.port}${path}`, { headers })
  open.push(socket)
  const events: Array<Event & { status?: number; error?: { code: string | null } }> = []
  let wake = () => {}
  socket.on("message", (data) => {
    events.push(JSON.parse(String(data)))
    wake()
  })
  const closed = new Promise<{ code: number; reason: string }>((resolve) => socket.on("close", (code, reason) => resolve({ code, reason: String(reason) })))
  await new Promise<void>((resolve, reject) => {
    socket.on("open", () => resolve())
    socket.on("unexpected-response", (_, response) => reject(Object.assign(new Error("refused"), { status: response.statusCode })))
    socket.on("error", reject)
  })
  let taken = 0
  const next = async () => {
    while (events.length <= taken) await new Promise<void>((resolve) => (wake = resolve))
    return events[taken++]!
  }
  return {
    socket,
    closed,
    events,
    next,
    send: (message: unknown) => socket.send(typeof message === "string" ? message : JSON.stringify({ type: "response.create", model: "tiny", ...(message as object) })),
    /** The events of one response, its last included. */
    response: async () => {
      const list = [await next()]
      while (!/^(error|response\.(completed|incomplete|failed))$/.test(list.at(-1)!.type)) list.push(await next())
      return list
    },
  }
}

describe("responses over HTTP", () => {
  it("a plain response is what the official client expects", async () => {
    server = await startGateway()
    const response = await server.client.responses.create({ model: "tiny", input: "Hi", instructions: "Be brief", metadata: { a: "b" }, max_output_tokens: 5, temperature: 0.5, top_p: 0.9 })
    expect(response).toMatchObject({ object: "response", status: "completed", model: "tiny", output_text: "Hello world", error: null, incomplete_details: null, instructions: "Be brief", metadata: { a: "b" }, max_output_tokens: 5, temperature: 0.5, top_p: 0.9 })
    expect(response.id).toMatch(/^resp_/)
    expect(response.output).toMatchObject([{ type: "message", role: "assistant", status: "completed", content: [{ type: "output_text", text: "Hello world", annotations: [] }] }])
    expect(response.usage).toEqual({ input_tokens: 3, input_tokens_details: { cached_tokens: 0 }, output_tokens: 2, output_tokens_details: { reasoning_tokens: 0 }, total_tokens: 5 })
    expect(prompts()).toEqual([["system: Be brief", "user: Hi"]])
    expect(server.actor.last.message).toMatchObject({ maxTokens: 5, sampling: { temperature: 0.5, topP: 0.9 } })
  })

  it("input may be messages with text parts", async () => {
    server = await startGateway()
    await server.client.responses.create({
      model: "tiny",
      input: [
        { role: "developer", content: "d" },
        { role: "user", content: [{ type: "input_text", text: "u" }] },
        { type: "message", id: "msg_1", status: "completed", role: "assistant", content: [{ type: "output_text", text: "a", annotations: [] }] },
        { role: "user", content: "v" },
      ],
    })
    expect(prompts()).toEqual([["system: d", "user: u", "assistant: a", "user: v"]])
  })

  it("a stream has the protocol's events in order, numbered without gaps", async () => {
    server = await startGateway()
    const events: Array<Event> = []
    for await (const event of await server.client.responses.create({ model: "tiny", input: "Hi", stream: true })) events.push(event)
    expect(events.map(({ type }) => type)).toEqual(order)
    expect(events.map(({ sequence_number }) => sequence_number)).toEqual(order.map((_, index) => index))
    const helper = server.client.responses.stream({ model: "tiny", input: "Hi" })
    expect((await helper.finalResponse()).output_text).toBe("Hello world")
  })

  it("an answer cut at its length is incomplete and says so", async () => {
    server = await startGateway()
    server.actor.script = (generation) => generation.say(["Hel"], "length")
    expect(await server.client.responses.create({ model: "tiny", input: "Hi" })).toMatchObject({ status: "incomplete", incomplete_details: { reason: "max_output_tokens" } })
  })

  it("log probabilities come where they are included", async () => {
    server = await startGateway()
    const response = await server.client.responses.create({ model: "tiny", input: "Hi", include: ["message.output_text.logprobs"], top_logprobs: 1 })
    expect(server.actor.last.message.logprobs).toBe(1)
    expect(response.output[0]).toMatchObject({ content: [{ logprobs: [{ token: "Hello", logprob: -0.5, top_logprobs: [{ token: "Hello" }] }, { token: " world" }] }] })
  })

  it.each<[body: object, param: string, code: string | null]>([
    [{ input: 5 }, "input", null],
    [{}, "input", null],
    [{ input: [] }, "input", null],
    [{ input: [{ role: "user", content: [{ type: "input_image" }] }] }, "input[0].content[0].type", null],
    [{ input: [{ type: "function_call_output", output: "x" }] }, "input[0].type", null],
    [{ input: "x", temperature: 3 }, "temperature", null],
    [{ input: "x", tools: [{ type: "web_search" }] }, "tools", "unsupported_parameter"],
    [{ input: "x", text: { format: { type: "json_schema" } } }, "text.format", "unsupported_parameter"],
    [{ input: "x", background: true }, "background", "unsupported_parameter"],
    [{ input: "x", previous_response_id: "resp_1" }, "previous_response_id", "previous_response_not_found"],
  ])("%j is a 400 that names %s", async (body, param, code) => {
    server = await startGateway()
    const response = await server.post("/v1/responses", { model: "tiny", ...body })
    expect(response.status).toBe(400)
    expect(await response.json()).toMatchObject({ error: { param, code } })
  })

  it("a failure mid-stream is response.failed and an error event", async () => {
    server = await startGateway()
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "Hel", [1])
      generation.fail("disconnected", "decode w0: gone")
    }
    const types: Array<string> = []
    const stream = await server.client.responses.create({ model: "tiny", input: "Hi", stream: true })
    await expect(async () => {
      for await (const event of stream) types.push(event.type)
    }).rejects.toMatchObject({ code: "disconnected" })
    expect(types.at(-1)).toBe("response.failed")
  })
})

describe("kept responses", () => {
  const continued = () => server.actor.generations.map(({ message }) => (message.prompt.kind === "chat" && message.prompt.continues !== undefined ? { tokens: [...unpackTokens(message.prompt.continues.tokens, "tokens")], messages: message.prompt.continues.messages } : undefined))
  const ask = (body: object = {}) => server.client.responses.create({ model: "tiny", input: "x", ...body })
  /** The prompt's three ids, and an answer of two. */
  const drawn = [1, 2, 3, 100, 101]

  it("go on over HTTP, plain and streamed, from the ids of the prompt and the answer", async () => {
    server = await startGateway()
    const first = await ask({ input: "one" })
    let second: string | undefined
    for await (const event of await server.client.responses.create({ model: "tiny", input: "two", previous_response_id: first.id, stream: true })) {
      if (event.type === "response.completed") second = event.response.id
    }
    await ask({ input: "three", previous_response_id: second })
    expect(prompts().at(-1)).toEqual(["user: one", "assistant: Hello world", "user: two", "assistant: Hello world", "user: three"])
    expect(continued()).toEqual([undefined, { tokens: drawn, messages: 2 }, { tokens: drawn, messages: 4 }])
  })

  it("are gone on from by whoever has seen the last event, on any connection", async () => {
    server = await startGateway()
    const first = await ask()
    const [one, other] = [await connect(), await connect()]
    one.send({ input: "y", previous_response_id: first.id })
    const { response } = (await one.response()).at(-1) as { response: { id: string; store?: boolean } }
    expect(response.store).toBe(true)
    one.socket.close()
    other.send({ input: "z", previous_response_id: response.id })
    expect((await other.response()).at(-1)!.type).toBe("response.completed")
    await ask({ previous_response_id: response.id })
    expect(continued().at(-1)).toEqual({ tokens: drawn, messages: 4 })
  })

  it("are told and deleted as OpenAI does it, on the connection that has them too", async () => {
    server = await startGateway()
    const client = await connect()
    client.send({ input: "x" })
    const { response } = (await client.response()).at(-1) as { response: OpenAI.Responses.Response }
    expect(await server.client.responses.retrieve(response.id)).toMatchObject({ ...response, output_text: "Hello world" })
    const deleted = await fetch(`${server.url}/v1/responses/${response.id}`, { method: "DELETE" })
    expect([deleted.status, await deleted.json()]).toEqual([200, { id: response.id, object: "response", deleted: true }])
    await expect(server.client.responses.retrieve(response.id)).rejects.toMatchObject({ status: 404 })
    await expect(server.client.responses.delete(response.id)).rejects.toMatchObject({ status: 404 })
    await expect(ask({ previous_response_id: response.id })).rejects.toMatchObject({ status: 400, code: "previous_response_not_found", param: "previous_response_id" })
    client.send({ input: "y", previous_response_id: response.id })
    expect(await client.next()).toMatchObject({ type: "error", code: "previous_response_not_found" })
  })

  it("with store: false live on their connection only, and over HTTP not at all", async () => {
    server = await startGateway()
    const plain = await ask({ store: false })
    expect(plain).toMatchObject({ store: false })
    await expect(server.client.responses.retrieve(plain.id)).rejects.toMatchObject({ status: 404 })
    const client = await connect()
    client.send({ input: "x", store: false })
    const { response } = (await client.response()).at(-1) as { response: { id: string } }
    await expect(ask({ previous_response_id: response.id })).rejects.toMatchObject({ status: 400 })
    client.send({ input: "y", previous_response_id: response.id })
    expect((await client.response()).at(-1)!.type).toBe("response.completed")
  })

  it("end after their lifetime, which the error names", async () => {
    server = await startGateway({ bounds: { storedResponseMs: 30 } })
    const first = await ask()
    await new Promise((resolve) => setTimeout(resolve, 40))
    await expect(ask({ previous_response_id: first.id })).rejects.toMatchObject({ status: 400, code: "previous_response_not_found", message: expect.stringMatching(/kept for [\d.]+ minutes/) })
    await expect(server.client.responses.retrieve(first.id)).rejects.toMatchObject({ status: 404 })
  })

  it("are nobody else's", async () => {
    const folder = mkdtempSync(join(tmpdir(), "gateway-"))
    const keysFile = join(folder, "keys.txt")
    writeFileSync(keysFile, ["alice", "bob"].map((name) => `${name}:${createHash("sha256").update(name).digest("hex")}\n`).join(""))
    server = await startGateway({ keysFile }, "alice")
    rmSync(folder, { recursive: true })
    const { id } = await ask()
    const bob = server.client.withOptions({ apiKey: "bob" })
    await expect(bob.responses.retrieve(id)).rejects.toMatchObject({ status: 404 })
    await expect(bob.responses.delete(id)).rejects.toMatchObject({ status: 404 })
    await expect(bob.responses.create({ model: "tiny", input: "x", previous_response_id: id })).rejects.toMatchObject({ status: 400, code: "previous_response_not_found" })
    const client = await connect({ authorization: "Bearer bob" })
    client.send({ input: "x", previous_response_id: id })
    expect(await client.next()).toMatchObject({ code: "previous_response_not_found" })
    expect((await ask({ previous_response_id: id })).status).toBe("completed")
  })

  it("are gone on from by their text where their ids would mean another prompt", async () => {
    server = await startGateway()
    const first = await ask({ instructions: "brief" })
    const same = await ask({ instructions: "brief", previous_response_id: first.id })
    await ask({ previous_response_id: first.id })
    await ask({ instructions: "long", previous_response_id: same.id })
    expect(continued().slice(1)).toEqual([{ tokens: drawn, messages: 3 }, undefined, undefined])
    // A stop of the client's own: its text has ended before its tokens; what came before that answer has its ids still.
    const start = await ask()
    const stopped = await ask({ previous_response_id: start.id, stop: ["!"] })
    await ask({ previous_response_id: stopped.id })
    expect(continued().at(-1)).toEqual({ tokens: drawn, messages: 2 })
    expect(prompts().at(-1)).toHaveLength(5)
  })

  it("are bounded in number and bytes, the oldest going first", () => {
    const turn = (chars: number) => ({ conversation: "c", messages: [{ role: "user", content: "x".repeat(chars) }], answered: undefined })
    const few = new Turns({ count: 2, bytes: 1000, lifetimeMs: 1000 })
    for (const id of ["a", "b", "c"]) few.add(id, turn(10))
    expect(["a", "b", "c"].map((id) => few.get(id) !== undefined)).toEqual([false, true, true])
    few.add("d", turn(490))
    expect(["b", "c", "d"].map((id) => few.get(id) !== undefined)).toEqual([false, true, true])
    few.add("e", turn(501))
    expect(few.size).toBe(0)
  })
})

describe("responses over WebSocket", () => {
  it("keeps a bounded number of conversations, and forgets the oldest", async () => {
    server = await startGateway()
    const client = await connect()
    const ids: Array<string> = []
    for (let index = 0; index <= limits.webSocketTurns; index++) {
      client.send({ input: String(index), store: false })
      ids.push(((await client.response()).at(-1) as { response: { id: string } }).response.id)
    }
    client.send({ input: "x", previous_response_id: ids[0] })
    expect(await client.next()).toMatchObject({ code: "previous_response_not_found" })
    client.send({ input: "x", previous_response_id: ids[1] })
    expect((await client.response()).at(-1)!.type).toBe("response.completed")
  })

  it("the official client gets the same events as over HTTP", async () => {
    server = await startGateway()
    const ws = new ResponsesWS(server.client)
    const events: Array<Event> = []
    await new Promise<void>((resolve, reject) => {
      ws.on("error", reject)
      ws.on("event", (event) => events.push(event as Event))
      ws.on("response.completed", ({ response }) => {
        expect(response.output).toMatchObject([{ content: [{ text: "Hello world" }] }])
        resolve()
      })
      ws.send({ type: "response.create", model: "tiny", input: "Hi" })
    })
    ws.close()
    expect(events.map(({ type }) => type)).toEqual(order)
    expect(events.map(({ sequence_number }) => sequence_number)).toEqual(order.map((_, index) => index))
  })

  it("several responses asked for at once come one after the other, in the order asked", async () => {
    server = await startGateway()
    const client = await connect()
    for (const input of ["a", "b", "c"]) client.send({ input, metadata: { input } })
    for (const input of ["a", "b", "c"]) expect((await client.response()).at(-1)).toMatchObject({ type: "response.completed", response: { metadata: { input } } })
    expect(prompts()).toEqual([["user: a"], ["user: b"], ["user: c"]])
  })

  it("more than the queue holds are refused as overloaded, and the connection lives", async () => {
    server = await startGateway()
    server.actor.script = (generation) => generation.prompt()
    const client = await connect()
    for (let index = 0; index < limits.webSocketQueue + 2; index++) client.send({ input: String(index) })
    let event = await client.next()
    while (event.type !== "error") event = await client.next()
    expect(event).toMatchObject({ status: 429, error: { code: "rate_limit_exceeded" } })
    const first = await server.actor.nth(0)
    first.delta(0, "x", [1], "stop")
    first.done()
    await server.actor.nth(1)
  })

  it("a conversation goes on from previous_response_id, without its instructions, and an unknown one is an error", async () => {
    server = await startGateway()
    const client = await connect()
    client.send({ input: "one", instructions: "brief" })
    const first = (await client.response()).at(-1) as { response: { id: string } }
    client.send({ input: "two", previous_response_id: first.response.id })
    const second = (await client.response()).at(-1) as { response: { id: string } }
    expect(second).toMatchObject({ response: { previous_response_id: first.response.id } })
    client.send({ input: "three", previous_response_id: second.response.id })
    await client.response()
    expect(prompts()).toEqual([
      ["system: brief", "user: one"],
      ["user: one", "assistant: Hello world", "user: two"],
      ["user: one", "assistant: Hello world", "user: two", "assistant: Hello world", "user: three"],
    ])
    client.send({ input: "x", previous_response_id: "resp_unknown" })
    expect(await client.next()).toMatchObject({ type: "error", status: 400, code: "previous_response_not_found", param: "previous_response_id", error: { code: "previous_response_not_found" } })
  })

  it("a conversation is one by its name, the first response's, until its connection closes, it is deleted, or others have taken its place", async () => {
    server = await startGateway()
    const named = () => server.actor.last.message.conversation
    const [one, two] = [await connect(), await connect()]
    const ask = async (client: typeof one, more: object = {}) => {
      client.send({ input: "x", ...more })
      return ((await client.response()).at(-1) as { response: { id: string } }).response.id
    }
    const first = await ask(one)
    expect(named()).toBe(first)
    const second = await ask(one, { previous_response_id: first })
    expect(named()).toBe(first)
    const warmed = await ask(two, { generate: false, store: false })
    expect(named()).toBe(warmed)
    const overHttp = (await (await server.post("/v1/responses", { model: "tiny", input: "x", previous_response_id: second })).json()) as { id: string }
    expect(named()).toBe(first)
    await server.post("/v1/responses", { model: "tiny", input: "x", store: false })
    expect(named()).toBeUndefined() // nobody can go on from it
    expect(server.actor.ended).toEqual([])
    one.socket.close()
    await server.actor.untilEnded(1)
    expect(server.actor.ended).toEqual([{ tenant: "default", conversation: first }])
    await fetch(`${server.url}/v1/responses/${overHttp.id}`, { method: "DELETE" })
    await server.actor.untilEnded(2)
    const others: Array<string> = []
    for (let i = 0; i < limits.webSocketTurns; i++) others.push(await ask(two, { store: false }))
    await server.actor.untilEnded(3)
    expect(server.actor.ended.slice(1).map(({ conversation }) => conversation)).toEqual([first, warmed])
    two.socket.terminate()
    await server.actor.untilEnded(3 + others.length)
    expect(server.actor.ended.slice(3).map(({ conversation }) => conversation)).toEqual(others)
  })

  it("generate: false draws nothing and can be gone on from", async () => {
    server = await startGateway()
    server.actor.script = (generation) => generation.say([], "length")
    const client = await connect()
    client.send({ input: "warm", generate: false })
    const events = await client.response()
    expect(events.map(({ type }) => type)).toEqual(["response.created", "response.in_progress", "response.completed"])
    expect(server.actor.last.message.maxTokens).toBe(0)
    const { response } = events.at(-1) as { response: { id: string; output: Array<unknown> } }
    expect(response.output).toEqual([])
    client.send({ input: "go", previous_response_id: response.id })
    await client.response()
    expect(prompts().at(-1)).toEqual(["user: warm", "user: go"])
  })

  it("broken messages are error events, and the connection lives", async () => {
    server = await startGateway()
    const client = await connect()
    client.send("{")
    expect(await client.next()).toMatchObject({ type: "error", status: 400, code: "invalid_json" })
    client.send('{"type":"session.update"}')
    expect(await client.next()).toMatchObject({ type: "error", status: 400, param: "type" })
    client.socket.send(Buffer.from([1, 2]), { binary: true })
    expect(await client.next()).toMatchObject({ type: "error", status: 400 })
    client.send({ input: "x", temperature: "hot" })
    expect(await client.next()).toMatchObject({ type: "error", status: 400, param: "temperature", error: { type: "invalid_request_error" } })
    client.send({ input: "x", model: "other" })
    expect(await client.next()).toMatchObject({ type: "error", status: 404, code: "model_not_found" })
    client.send({ input: "x" })
    expect((await client.response()).map(({ type }) => type)).toEqual(order)
  })

  it("a fault before the first event is an error event, a later one response.failed", async () => {
    server = await startGateway()
    const client = await connect()
    server.actor.script = (generation) => generation.fail("context_length_exceeded", "too long")
    client.send({ input: "x" })
    expect(await client.next()).toMatchObject({ type: "error", status: 400, code: "context_length_exceeded", message: "too long" })
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "Hel", [1])
      generation.fail("disconnected", "gone")
    }
    client.send({ input: "x" })
    expect((await client.response()).at(-1)).toMatchObject({ type: "response.failed", response: { status: "failed", error: { code: "server_error", message: "gone" }, output: [{ status: "incomplete", content: [{ text: "Hel" }] }] } })
    server.actor.script = (generation) => generation.say(["x"])
    client.send({ input: "x" })
    expect((await client.response()).at(-1)!.type).toBe("response.completed") // and nothing in between
  })

  it("a client that closes cancels what runs and what waits", async () => {
    server = await startGateway()
    server.actor.script = (generation) => generation.endless("x")
    const client = await connect()
    client.send({ input: "a" })
    client.send({ input: "b" })
    await client.next()
    client.socket.close()
    expect(await server.actor.last.closed).toMatchObject({ code: "cancelled" })
    await client.closed
    expect(server.actor.generations).toHaveLength(1)
  })

  const settled = async (generation: FakeGeneration): Promise<number> => {
    for (let before = -1, calm = 0; ; before = generation.events) {
      await new Promise((resolve) => setTimeout(resolve, 10))
      calm = generation.events === before ? calm + 1 : 0
      if (calm >= 15) return generation.events
    }
  }

  it("a client that reads slowly stops the request actor, and goes on where it stopped", async () => {
    server = await startGateway()
    server.actor.script = (generation) => generation.endless("y".repeat(100_000))
    const client = await connect()
    client.socket.pause()
    client.send({ input: "a" })
    const generation = await server.actor.nth(0)
    const stopped = await settled(generation)
    expect(stopped).toBeLessThan(400)
    expect(generation.writer.writable).toBe(false)
    client.socket.resume()
    while (generation.events < stopped + 2 * limits.streamWindowFrames) await new Promise((resolve) => setTimeout(resolve, 1))
    client.socket.terminate()
    expect(await generation.closed).toMatchObject({ code: "cancelled" })
  })

  it("a client that is silent beyond the stall limit is closed; one that answers pings is not", async () => {
    server = await startGateway({ bounds: { keepAliveMs: 20, stallMs: 100 } })
    server.actor.script = (generation) => generation.prompt()
    const [dead, alive] = [await connect(), await connect()]
    dead.send({ input: "a" })
    const generation = await server.actor.nth(0)
    dead.socket.pause()
    expect(await generation.closed).toMatchObject({ code: "cancelled" })
    expect(alive.socket.readyState).toBe(alive.socket.OPEN)
  })

  it("shutdown: an error event says why, then the connection closes as going away", async () => {
    server = await startGateway({ bounds: { shutdownGraceMs: 50 } })
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "Hel", [1])
    }
    const [busy, idle] = [await connect(), await connect()]
    busy.send({ input: "a" })
    await server.actor.nth(0)
    await server.close()
    for (const client of [busy, idle]) {
      expect(await client.closed).toMatchObject({ code: 1001 })
      expect(client.events.at(-1)).toMatchObject({ type: "error", status: 503, code: "shutting_down" })
    }
    expect(busy.events.at(-2)).toMatchObject({ type: "response.failed" })
    expect(await server.actor.last.closed).toMatchObject({ code: "cancelled" })
  })

  it("a message over the size limit closes the connection and harms no other", async () => {
    server = await startGateway({ bounds: { bodyBytes: 100_000 } })
    const [big, other] = [await connect(), await connect()]
    big.send({ input: "x".repeat(100_001) })
    expect(await big.closed).toMatchObject({ code: 1009 })
    other.send({ input: "x" })
    expect((await other.response()).at(-1)!.type).toBe("response.completed")
  })

  it("the upgrade wants a key where there are keys, this path, and no foreign page", async () => {
    server = await startGateway()
    await expect(connect({}, "/v1/other")).rejects.toMatchObject({ status: 404 })
    await expect(connect({ origin: "http://evil.example" })).rejects.toMatchObject({ status: 403 })
    await connect({ origin: "http://localhost:3000" })
    await server.close()
    const folder = mkdtempSync(join(tmpdir(), "gateway-"))
    const keysFile = join(folder, "keys.txt")
    writeFileSync(keysFile, `alice:${createHash("sha256").update("k").digest("hex")}`)
    server = await startGateway({ keysFile })
    rmSync(folder, { recursive: true })
    await expect(connect()).rejects.toMatchObject({ status: 401 })
    await expect(connect({ authorization: "Bearer wrong" })).rejects.toMatchObject({ status: 401 })
    const client = await connect({ authorization: "Bearer k" })
    client.send({ input: "x" })
    await client.response()
    expect(server.actor.last.message.tenant).toBe("alice")
  })
})
