import { execFileSync } from "node:child_process"
import { once } from "node:events"
import { createServer, type RequestListener, type Server } from "node:http"
import type { AddressInfo } from "node:net"
import { NodeWS } from "@effect/platform-node/NodeSocket"
import { Effect, Tracer } from "effect"
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { crc32c } from "../../kernels/index.ts"
import { StoreWriter } from "../../actors/decode/store-writer.ts"
import type { Engine } from "../../actors/engine/engine.ts"
import { kvStoreActor } from "../../actors/kv-store/kv-store.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { OtlpCollector, type CollectedSpan } from "../support/otlp-collector.ts"
import { testScope, until } from "../support/scoped.ts"
import { treeOf } from "../support/span-tree.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"

const secret = "Wintergreen"
const prompt = `The ${secret} lighthouse: a long story of the keeper and the sea, which he told to whoever came by.`

const ended = (found: ReadonlyArray<CollectedSpan>) => [spans.gatewayRequest, spans.kvStorePut].every((name) => found.some((span) => span.name === name))
const named = (found: ReadonlyArray<CollectedSpan>, name: string): CollectedSpan => found.find((span) => span.name === name)!

describe("with a collector", () => {
  let collector: OtlpCollector
  let node: StartedNode
  beforeAll(async () => {
    collector = await OtlpCollector.start()
    node = await startNode({ change: (topology) => ({ ...topology, telemetry: { otlp: `${collector.endpoint}/` } }) })
    await streamCompletion(node, { prompt: "Hello", max_tokens: 2 }) // until the scheduler has heard of all
  })
  afterAll(async () => {
    await node.stop()
    await collector.stop()
  })

  const complete = async (id: string, body: object, path = "/v1/completions") =>
    fetch(`${node.url}${path}`, { method: "POST", headers: { "x-request-id": id }, body: JSON.stringify({ model: node.modelName, ignore_eos: true, seed: 3, max_tokens: 40, ...body }) })

  it("one request is one trace, with every step under the one that asked for it", async () => {
    const answer = (await (await complete("tree", { prompt, temperature: 0.5, top_p: 0.9, top_k: 7 })).json()) as { id: string; usage: { prompt_tokens: number } }
    const found = await collector.trace(attributes.requestId, "tree", ended)
    expect(treeOf(found)).toEqual([
      "gateway.request @ penstock",
      "  request.generate @ penstock",
      "    decode.run @ penstock",
      "    kv_store.put @ penstock",
      "      kv_store.put @ penstock",
      "    prefill.run @ penstock",
      "      kv_store.get @ penstock",
      "    scheduler.place @ penstock",
    ])
    expect(found.some(({ failed }) => failed)).toBe(false)
    expect(named(found, spans.gatewayRequest)).toMatchObject({
      kind: 2,
      attributes: {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "penstock",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 40,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 3,
        "gen_ai.response.id": answer.id,
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": expect.any(Number),
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": 40,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
      },
    })
    expect(named(found, spans.requestGenerate).attributes).toMatchObject({ "messaging.system": "memory", "messaging.destination.name": expect.stringMatching(/^ps\.main\.[0-9a-f]{8}\.request\.any\.generate$/), [attributes.placements]: 1, "gen_ai.usage.output_tokens": 40 })
    expect(named(found, spans.schedulerPlace).attributes).toMatchObject({ [attributes.policy]: "cache-aware", [attributes.placedDecode]: "w0", [attributes.placedPrefill]: "w0", [attributes.prefixBlocks]: 0, [attributes.queueWaitMs]: expect.any(Number) })
    expect(named(found, spans.prefillRun).attributes).toMatchObject({ [attributes.worker]: "w0", [attributes.computedTokens]: answer.usage.prompt_tokens, [attributes.cachedTokens]: 0 })
    const wanted = Math.floor((answer.usage.prompt_tokens - 1) / 16)
    expect(named(found, spans.kvStoreGet).attributes).toMatchObject({ [attributes.wantedBlocks]: wanted, [attributes.movedBlocks]: 0, [attributes.prefixSource]: "compute", [attributes.prefixComputeMs]: expect.any(Number) })
    // The first token is prefill's.
    expect(named(found, spans.decodeRun).attributes).toMatchObject({ [attributes.worker]: "w0", [attributes.drawnTokens]: 39 })
  })

  it("decode.run lasts from the reservation to the last token, and no span is a token's", async () => {
    await streamCompletion(node, { prompt, max_tokens: 200, ignore_eos: true })
    const found = await collector.trace(attributes.requestMaxTokens, 200, ended)
    const [decode, prefill, generate] = [spans.decodeRun, spans.prefillRun, spans.requestGenerate].map((name) => named(found, name))
    expect(decode!.startMs).toBeLessThan(prefill!.startMs)
    expect(decode!.endMs - prefill!.endMs).toBeGreaterThan(0.8 * (generate!.endMs - prefill!.endMs))
    expect(found.length).toBeLessThan(40)
  })

  it("goes on with a client's trace, and leaves one out that is not to be sampled", async () => {
    const ids = { taken: "0af7651916cd43dd8448eb211c80319c", left: "1bf7651916cd43dd8448eb211c80319c" }
    for (const [id, flags] of [[ids.left, "00"], [ids.taken, "01"]]) {
      await fetch(`${node.url}/v1/completions`, { method: "POST", headers: { traceparent: `00-${id}-b7ad6b7169203331-${flags}` }, body: JSON.stringify({ model: "tiny", prompt: "Hello", max_tokens: 2 }) })
    }
    await vi.waitUntil(() => collector.spans.some(({ traceId, name }) => traceId === ids.taken && name === spans.gatewayRequest), { timeout: 10_000 })
    expect(collector.spans.find(({ traceId, name }) => traceId === ids.taken && name === spans.gatewayRequest)!.parentId).toBe("b7ad6b7169203331")
    expect(collector.spans.some(({ traceId }) => traceId === ids.left)).toBe(false)
  })

  it("an answer over the WebSocket is a trace of its own", async () => {
    const socket = new NodeWS.WebSocket(`${node.url.replace("http", "ws")}/v1/responses`)
    await new Promise((resolve) => socket.on("open", resolve))
    const done = new Promise<string>((resolve) =>
      socket.on("message", (data) => {
        const event = JSON.parse(String(data)) as { type: string; response: { id: string } }
        if (event.type === "response.completed" || event.type === "response.incomplete") resolve(event.response.id)
      }),
    )
    socket.send(JSON.stringify({ type: "response.create", model: "tiny", input: "Say something nice.", max_output_tokens: 4 }))
    const id = await done
    socket.close()
    const found = await collector.trace("gen_ai.response.id", id, (all) => all.some(({ name }) => name === spans.gatewayRequest))
    expect(named(found, spans.gatewayRequest).attributes).toMatchObject({ "gen_ai.operation.name": "chat", "http.route": "/v1/responses", "gen_ai.request.stream": true })
  })

  it("a request that is wrong is a span with its status, and not a failure of the server's", async () => {
    await complete("wrong", { prompt, temperature: secret })
    const [span] = await collector.trace(attributes.requestId, "wrong", () => true)
    expect(span).toMatchObject({ failed: false, attributes: { "http.response.status_code": 400 } })
  })

  it("no text of a prompt or an answer leaves, nor of an error that quotes it", async () => {
    await complete("stop", { prompt, max_tokens: 1 })
    await collector.trace(attributes.requestId, "stop", () => true)
    expect(collector.bytes.includes("gen_ai.usage")).toBe(true)
    expect(collector.bytes.includes(secret)).toBe(false)
  })
})

describe("a collector that", () => {
  const servers: Array<Server> = []
  const listening = async (listener: RequestListener): Promise<string> => {
    const server = createServer(listener).listen(0, "127.0.0.1")
    servers.push(server)
    await once(server, "listening")
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  }
  afterAll(() => servers.forEach((server) => server.closeAllConnections() ?? server.close()))

  it.each([
    ["is not there", async () => "http://127.0.0.1:9", 0],
    ["never answers", () => listening(() => {}), 0],
    ["refuses", () => listening((_, response) => response.writeHead(400).end()), 1],
  ])("%s costs no request, at most one line, and little at the end", async (_, endpoint, least) => {
    const shown = vi.spyOn(console, "error").mockImplementation(() => {})
    const otlp = await endpoint()
    const node = await startNode({ change: (topology) => ({ ...topology, telemetry: { otlp } }) })
    for (let i = 0; i < 3; i++) {
      expect((await streamCompletion(node, { prompt: "Hello", max_tokens: 4, ignore_eos: true })).tokens).toHaveLength(4)
      await new Promise((resolve) => setTimeout(resolve, limits.telemetryDelayMs + 100))
    }
    const stoppedAtMs = performance.now()
    await node.stop()
    expect(performance.now() - stoppedAtMs).toBeLessThan(limits.telemetryFlushDeadlineMs + 1_500)
    const lines = shown.mock.calls.map(String).filter((line) => line.includes(`telemetry: ${new URL(otlp).host} `))
    shown.mockRestore()
    expect([0, 1].slice(least)).toContain(lines.length)
  })
})

it("with no collector nothing of OpenTelemetry is loaded, and messages carry no trace", () => {
  const run = (...args: ReadonlyArray<string>) => {
    const { OTEL_EXPORTER_OTLP_ENDPOINT: _, ...env } = process.env
    return JSON.parse(execFileSync(process.execPath, ["--import", "tsx", "test/support/traced-node.ts", ...args], { env, encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] })) as { loaded: number; traced: number }
  }
  expect(run()).toEqual({ loaded: 0, traced: 0 })
  const on = run("http://127.0.0.1:9")
  expect([on.loaded > 0, on.traced > 0]).toEqual([true, true])
})

it("blocks of several requests that are put together are one span: of the first request, linked to the others", async () => {
  const scope = testScope()
  const bus = new MemoryBus()
  const link = new Link(bus, "store-writer w0", 1)
  const made: Array<Tracer.Span> = []
  const tracer = Tracer.make({
    span: (options) => {
      const span = new Tracer.NativeSpan(options)
      made.push(span)
      return span
    },
  })
  const writer = new StoreWriter()
  const traces = ["a", "b"].map((digit) => ({ traceId: digit.repeat(32), spanId: digit.repeat(16) }))
  for (const [i, block] of [0, 1, 0, 1].entries()) writer.stored(`block${i}`.padStart(16, "h"), `00-${traces[block]!.traceId}-${traces[block]!.spanId}-01`)
  const engine = { hold: (hashes: ReadonlyArray<string>) => ({ hashes, at: () => ({ write: (_: unknown, into: Uint8Array, offset: number, seed: number) => crc32c(into.subarray(offset), seed) }), release: () => {} }) } as unknown as Engine
  const kv = { dtype: "f16", blockTokens: 4, layers: 1, layerBlockBytes: 8 } as const
  const buses = { control: bus, bulk: bus }
  await scope.start(kvStoreActor({ link: new Link(bus, "kv-store k0", 1), buses, namespace: "test", id: "k0", memoryBytes: 1_000 }))
  await scope.start(writer.run({ link, buses, namespace: "test", worker: { engine, formatId: "f", kv } }).pipe(Effect.withTracer(tracer)))
  await until(() => made[0]?.status._tag === "Ended")
  await scope.close()
  const [put, ...others] = made
  expect(others).toEqual([])
  expect(put).toMatchObject({ name: spans.kvStorePut, traceId: traces[0]!.traceId, parent: { value: { spanId: traces[0]!.spanId } }, links: [{ span: traces[1] }] })
  expect([put!.attributes.get(attributes.wantedBlocks), put!.attributes.get(attributes.movedBlocks)]).toEqual([4, 4])
})
