/**
 * What tracing costs: `node --import tsx test/bench/tracing.ts [ROUNDS] [REQUESTS]`. Two single topologies of a tiny model
 * in this process, one traced; each round sends the same number of requests to each, one after the other, in turns who is
 * first, and takes the processor time of the whole process, export included. The collector is a process of its own.
 */
import { spawn } from "node:child_process"
import { once } from "node:events"
import { setTimeout as sleep } from "node:timers/promises"
import { limits } from "../../config/limits.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"

const [rounds = 15, requests = 40] = process.argv.slice(2).map(Number)

const collector = spawn(process.execPath, ["-e", 'const s = require("http").createServer((q, r) => q.resume().on("end", () => r.end())).listen(0, "127.0.0.1", () => console.log(s.address().port))'], { stdio: ["ignore", "pipe", "inherit"] })
const port = Number(String(((await once(collector.stdout, "data")) as [Buffer])[0]))

const oneThread = (otlp: string | null) => startNode({ change: (topology) => ({ ...topology, telemetry: { otlp }, workers: topology.workers.map((worker) => ({ ...worker, threads: 1 })) }) })
const nodes = { off: await oneThread(null), on: await oneThread(`http://127.0.0.1:${port}`) }

let asked = 0
/** Microseconds of processor time of each request, until the last span has been sent. */
const cost = async (node: StartedNode): Promise<number> => {
  const before = process.cpuUsage()
  for (let i = 0; i < requests; i++) await streamCompletion(node, { prompt: `Question ${asked++}: what is a lighthouse, and why do ships need one?`, max_tokens: 24, ignore_eos: true })
  await sleep(limits.telemetryDelayMs + 200)
  const { user, system } = process.cpuUsage(before)
  return (user + system) / requests
}

const median = (values: ReadonlyArray<number>): number => values.toSorted((a, b) => a - b)[values.length >> 1]!

for (let i = 0; i < 3; i++) await Promise.all([cost(nodes.on), cost(nodes.off)]) // warm
const pairs: Array<{ readonly off: number; readonly on: number }> = []
for (let round = 0; round < rounds; round++) {
  const first = round % 2 === 0 ? "off" : "on"
  const a = await cost(nodes[first])
  const b = await cost(nodes[first === "off" ? "on" : "off"])
  pairs.push(first === "off" ? { off: a, on: b } : { off: b, on: a })
}
const differences = pairs.map(({ off, on }) => on - off)
process.stdout.write(
  `${JSON.stringify({
    pairs: rounds,
    requestsEach: requests,
    offUsPerRequest: Math.round(median(pairs.map(({ off }) => off))),
    onUsPerRequest: Math.round(median(pairs.map(({ on }) => on))),
    tracingUsPerRequest: Math.round(median(differences)),
    lowest: Math.round(Math.min(...differences)),
    highest: Math.round(Math.max(...differences)),
  })}\n`,
)
collector.kill()
await nodes.on.stop()
await nodes.off.stop()
process.exit(0)
