import { Effect, Fiber } from "effect"
import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { FakeRequestActor } from "../support/fake-request-actor.ts"
import { servedModel, sseEvents, startGateway, type StartedGateway } from "../support/start-gateway.ts"

describe("a gateway that is switched to another generation", () => {
  let server: StartedGateway
  let next: FakeRequestActor
  beforeEach(async () => {
    server = await startGateway()
    next = new FakeRequestActor(server.bus, "next")
  })
  afterEach(() => server.close())

  const switchTo = (model: Partial<typeof servedModel> = {}) => server.gateway.switchTo({ id: "next", namespace: "next", model: { ...servedModel, ...model } })
  const other = { id: "other", contextLength: 100, digest: "1".repeat(64) }

  it("sends new requests to its actors and knows its model; those that run stay where they are", async () => {
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "Hel", [1])
    }
    const running = server.post("/v1/completions", { model: "tiny", prompt: "x", stream: true })
    const begun = await server.actor.nth(0)
    const idle = Effect.runFork(server.gateway.untilIdle("test"))
    switchTo(other)
    expect(await (await fetch(`${server.url}/v1/models`)).json()).toMatchObject({ data: [{ id: "other", max_model_len: 100 }] })
    expect((await server.post("/v1/completions", { model: "tiny", prompt: "x" })).status).toBe(404)
    expect(await (await server.post("/v1/completions", { model: "other", prompt: "x" })).json()).toMatchObject({ model: "other", choices: [{ text: "Hello world" }] })
    expect(next.generations).toHaveLength(1)
    expect(idle.pollUnsafe()).toBeUndefined()
    begun.delta(0, "lo", [2], "stop")
    begun.done()
    const events = sseEvents(await (await running).text()) as ReadonlyArray<{ model?: string; choices?: ReadonlyArray<{ text: string }> }>
    expect(events.flatMap(({ choices }) => choices?.map(({ text }) => text) ?? []).join("")).toBe("Hello")
    expect(events[0]!.model).toBe("tiny")
    await Effect.runPromise(Fiber.join(idle))
  })

  it("goes on from a kept response by its text where another model has other ids, and by its ids where the model is the same", async () => {
    const first = await server.client.responses.create({ model: "tiny", input: "one" })
    switchTo(other)
    const second = await server.client.responses.create({ model: "other", input: "two", previous_response_id: first.id })
    expect(next.last.message.prompt).toEqual({ kind: "chat", param: "input", messages: [{ role: "user", content: "one" }, { role: "assistant", content: "Hello world" }, { role: "user", content: "two" }] })
    // Another type of KV under the same model.
    const third = new FakeRequestActor(server.bus, "third")
    server.gateway.switchTo({ id: "third", namespace: "third", model: { ...servedModel, ...other } })
    await server.client.responses.create({ model: "other", input: "three", previous_response_id: second.id })
    expect(third.last.message.prompt).toMatchObject({ continues: { messages: 4 } })
  })
})
