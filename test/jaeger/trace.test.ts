/** The disaggregated topology, every component in a process of its own, as Jaeger sees it. */
import { afterAll, beforeAll, expect, it } from "vitest"
import { attributes, spans } from "../../config/telemetry.ts"
import { drawTrace, treeOf } from "../support/span-tree.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"
import { startJaeger, type JaegerSpan, type StartedJaeger } from "./start-jaeger.ts"

let jaeger: StartedJaeger
let node: StartedNode
beforeAll(async () => {
  jaeger = await startJaeger()
  node = await startNode({ preset: "disaggregated", change: (topology) => ({ ...topology, telemetry: { otlp: jaeger.otlp } }) })
  await streamCompletion(node, { prompt: "Hello", max_tokens: 2 }) // until the scheduler has heard of all
})
afterAll(async () => {
  await node?.stop()
  await jaeger?.stop()
})

/** Waits until the trace of a request is whole: the blocks of its answer are put after its end. */
const traceOf = async (id: string): Promise<ReadonlyArray<JaegerSpan>> => {
  for (;;) {
    const [trace, ...others] = await jaeger.traces("penstock-gateway", { [attributes.requestId]: id })
    expect(others).toEqual([])
    const isWhole = (found: ReadonlyArray<JaegerSpan>) => Object.values(spans).every((name) => found.some((span) => span.name === name)) && found.some(({ component }) => component === "kv-store k0")
    if (trace !== undefined && isWhole(trace)) return trace
    await new Promise((resolve) => setTimeout(resolve, 200))
  }
}

it("one request is one trace over six processes, every span under the one that asked for it", async () => {
  const prompt = "A long story about a lighthouse keeper and the sea, which he told to whoever came by in winter."
  const response = await fetch(`${node.url}/v1/completions`, { method: "POST", headers: { "x-request-id": "whole" }, body: JSON.stringify({ model: "tiny", prompt, max_tokens: 60, ignore_eos: true }) })
  expect(response.status).toBe(200)
  const trace = await traceOf("whole")
  process.stdout.write(`${drawTrace(trace).join("\n")}\n`)
  expect(treeOf(trace)).toEqual([
    "gateway.request @ penstock-gateway",
    "  request.generate @ penstock-request",
    "    decode.run @ penstock-worker",
    "    kv_store.put @ penstock-worker",
    "      kv_store.put @ penstock-kv-store",
    "    prefill.run @ penstock-worker",
    "      kv.transfer @ penstock-worker",
    "      kv_store.get @ penstock-worker",
    "    scheduler.place @ penstock-scheduler",
  ])
  expect([...new Set(trace.map(({ component }) => component))].sort()).toEqual(["gateway g0", "kv-store k0", "request r0", "scheduler s0", "worker d0", "worker p0"])
  expect(new Set(trace.map(({ instance }) => instance)).size).toBe(6)

  const span = (name: string) => trace.find((found) => found.name === name)!
  expect([span(spans.prefillRun).component, span(spans.kvTransfer).component, span(spans.decodeRun).component]).toEqual(["worker p0", "worker p0", "worker d0"])
  const { tags } = span(spans.kvTransfer)
  expect(tags).toMatchObject({ [attributes.transferFrom]: "p0", [attributes.transferTo]: "d0", [attributes.transferResent]: 0, [attributes.transferWaitedMs]: expect.any(Number) })
  for (const name of [attributes.transferBytes, attributes.transferChunks, attributes.transferMbPerS, attributes.transferBreakEvenMbPerS]) expect(Number(tags[name])).toBeGreaterThan(0)
  expect(span(spans.decodeRun).tags).toMatchObject({ [attributes.drawnTokens]: 59, "messaging.system": "nats", "messaging.destination.name": expect.stringMatching(/^ps\.main\.[0-9a-f]{8}\.decode\.d0\.reserve$/) })
  expect(trace.filter(({ tags }) => tags["error"] === true)).toEqual([])
})

it("there is one service for each kind of process", async () => {
  expect(await jaeger.services()).toEqual(["penstock-gateway", "penstock-kv-store", "penstock-request", "penstock-scheduler", "penstock-worker"])
})
