import { createConnection, type Socket } from "node:net"
import { afterEach, describe, expect, it } from "vitest"
import type { FakeGeneration } from "../support/fake-request-actor.ts"
import { limits } from "../../config/limits.ts"
import { sseEvents, startGateway, type StartedGateway } from "../support/start-gateway.ts"

let server: StartedGateway
const sockets: Array<Socket> = []
afterEach(async () => {
  for (const socket of sockets.splice(0)) socket.destroy()
  await server.close()
})

const chat = { model: "tiny", messages: [{ role: "user", content: "x" }], stream: true }

/** A client that sends a request and reads nothing until it is told to. */
const rawPost = (path: string, body: unknown): Socket => {
  const text = JSON.stringify(body)
  const socket = createConnection({ port: server.port, host: "127.0.0.1" })
  sockets.push(socket)
  socket.pause()
  socket.on("error", () => {})
  socket.write(`POST ${path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: ${Buffer.byteLength(text)}\r\n\r\n${text}`)
  return socket
}

/** Resolves with the number of events that the actor has sent once it stops growing. */
const settled = async (generation: FakeGeneration): Promise<number> => {
  for (let before = -1, calm = 0; ; before = generation.events) {
    await new Promise((resolve) => setTimeout(resolve, 10))
    calm = generation.events === before ? calm + 1 : 0
    if (calm >= 15) return generation.events
  }
}

describe("a client that goes away", () => {
  it.each([["streaming", true], ["waiting for a plain answer", false]])("while %s: the request actor's stream is cancelled", async (_, stream) => {
    server = await startGateway()
    server.actor.script = (generation) => generation.prompt()
    const abort = new AbortController()
    const asked = fetch(`${server.url}/v1/chat/completions`, { method: "POST", body: JSON.stringify({ ...chat, stream }), signal: abort.signal })
    const generation = await server.actor.nth(0)
    if (stream) await asked
    abort.abort()
    await asked.then((response) => response.text()).catch(() => {})
    expect(await generation.closed).toMatchObject({ code: "cancelled", message: expect.stringContaining("the client went away") })
  })

  it("leaves its place to others", async () => {
    server = await startGateway({ bounds: { requests: 1 } })
    server.actor.script = (generation) => generation.endless("x")
    const stream = await server.client.chat.completions.create({ model: "tiny", messages: [{ role: "user", content: "x" }], stream: true })
    for await (const _ of stream) break
    await server.actor.last.closed
    server.actor.script = (generation) => generation.say(["x"])
    expect((await server.post("/v1/chat/completions", { ...chat, stream: false })).status).toBe(200)
  })
})

describe("a client that reads slowly", () => {
  it("stops the request actor, whose memory and the gateway's stay bounded, and goes on where it stopped", async () => {
    server = await startGateway()
    server.actor.script = (generation) => generation.endless("y".repeat(100_000))
    const socket = rawPost("/v1/chat/completions", chat)
    const generation = await server.actor.nth(0)
    const stopped = await settled(generation)
    // What the sockets of both sides hold (some megabytes), and the window of the stream.
    expect(stopped).toBeLessThan(400)
    expect(generation.writer.writable).toBe(false)
    expect(generation.writer.closed).toBe(false)
    socket.resume()
    while (generation.events < stopped + 2 * limits.streamWindowFrames) await new Promise((resolve) => setTimeout(resolve, 1))
    socket.destroy()
    expect(await generation.closed).toMatchObject({ code: "cancelled" })
  })

  it("and takes nothing for the stall limit is closed, and its generation cancelled", async () => {
    server = await startGateway({ bounds: { keepAliveMs: 50, stallMs: 150 } })
    server.actor.script = (generation) => generation.endless("y".repeat(100_000))
    rawPost("/v1/chat/completions", chat)
    expect(await (await server.actor.nth(0)).closed).toMatchObject({ code: "cancelled" })
  })
})

describe("keep-alive", () => {
  it("comments go out while a request is queued and between tokens, and the stream stays whole", async () => {
    server = await startGateway({ bounds: { keepAliveMs: 10 } })
    server.actor.script = () => {}
    const response = await server.post("/v1/chat/completions", chat)
    expect(response.status).toBe(200) // sent with the first comment: the actor has said nothing yet
    const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader()
    let text = ""
    const until = async (wanted: string) => {
      while (!text.includes(wanted)) text += (await reader.read()).value ?? ""
    }
    await until(": ping\n\n: ping\n\n")
    const generation = server.actor.last
    generation.prompt()
    generation.delta(0, "a", [1])
    await until('"content":"a"')
    const before = text.length
    while (!text.slice(before).includes(": ping")) text += (await reader.read()).value ?? ""
    generation.delta(0, "", [], "stop")
    generation.done()
    await until("[DONE]")
    expect(sseEvents(text).at(-1)).toBe("[DONE]")
  })

  it("a request that fails after the first comment ends with an error event", async () => {
    server = await startGateway({ bounds: { keepAliveMs: 10 } })
    server.actor.script = () => {}
    const response = await server.post("/v1/chat/completions", chat)
    server.actor.last.fail("context_length_exceeded", "too long")
    expect(sseEvents(await response.text())).toEqual([{ error: { message: "too long", type: "invalid_request_error", param: null, code: "context_length_exceeded" } }])
  })

  it("a stream that is busy gets no comments", async () => {
    server = await startGateway()
    expect(await (await server.post("/v1/chat/completions", chat)).text()).not.toContain(": ping")
  })
})

describe("shutdown", () => {
  it("tells open streams why, cancels their generations, and closes what waits", async () => {
    server = await startGateway({ bounds: { shutdownGraceMs: 50 } })
    server.actor.script = (generation) => {
      generation.prompt()
      generation.delta(0, "a", [1])
    }
    const streaming = await server.post("/v1/chat/completions", chat)
    const waiting = server.post("/v1/chat/completions", { ...chat, stream: false })
    await server.actor.nth(1)
    await server.close()
    expect(sseEvents(await streaming.text()).at(-1)).toMatchObject({ error: { code: "shutting_down" } })
    const refused = await waiting
    expect(refused.status).toBe(503)
    expect(await refused.json()).toMatchObject({ error: { code: "shutting_down" } })
    for (const generation of server.actor.generations) expect(await generation.closed).toMatchObject({ code: "cancelled" })
    await expect(fetch(`${server.url}/health`)).rejects.toThrow()
  })

  it("streams that end within the grace end normally, and new requests are refused", async () => {
    server = await startGateway({ bounds: { shutdownGraceMs: 5_000 } })
    server.actor.script = (generation) => generation.prompt()
    const streaming = await server.post("/v1/chat/completions", chat)
    const closing = server.close()
    server.actor.last.delta(0, "a", [1], "stop")
    server.actor.last.done()
    expect(sseEvents(await streaming.text()).at(-1)).toBe("[DONE]")
    await closing
  })

  it("with nothing open it is done at once, kept-alive connections or not", async () => {
    server = await startGateway()
    await (await fetch(`${server.url}/health`)).text()
    await server.close()
  })

  it("a client that reads nothing cannot hold it up", async () => {
    server = await startGateway({ bounds: { shutdownGraceMs: 20 } })
    server.actor.script = (generation) => generation.endless("y".repeat(100_000))
    rawPost("/v1/chat/completions", chat)
    await settled(await server.actor.nth(0))
    await server.close()
    expect(await server.actor.last.closed).toMatchObject({ code: "cancelled" })
  })
})
