/**
 * A program: serves one request, with a collector's address as its argument or without, and prints what of OpenTelemetry
 * was loaded for it and how many messages carried a trace.
 */
import { createRequire } from "node:module"
import { startNode, streamCompletion } from "./start-node.ts"

const [otlp = null] = process.argv.slice(2)
const node = await startNode({ change: (topology) => ({ ...topology, telemetry: { otlp } }) })
const { bus } = node
const publish = bus.publish.bind(bus)
let traced = 0
bus.publish = (subject, data, options) => {
  if (options?.headers?.["traceparent"] !== undefined) traced++
  publish(subject, data, options)
}
await streamCompletion(node, { prompt: "Hello, a prompt of more than one block of tokens.", max_tokens: 4, ignore_eos: true })
await node.stop()
// Its packages are CommonJS.
const loaded = Object.keys(createRequire(import.meta.url).cache).filter((path) => path.includes("@opentelemetry")).length
process.stdout.write(`${JSON.stringify({ loaded, traced })}\n`, () => process.exit(0))
