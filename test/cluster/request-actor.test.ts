import { Effect } from "effect"
import { afterEach, describe, expect, it } from "vitest"
import { subject } from "../../actors/messages/subjects.ts"
import { Drain, type Drained } from "../../actors/messages/worker.ts"
import { Link } from "../../actors/runtime/link.ts"
import { startNode, streamCompletion, type Answer, type StartedNode } from "../support/start-node.ts"

const request = { prompt: "A long story about a lighthouse keeper and the sea:", max_tokens: 400, ignore_eos: true, temperature: 1, seed: 7 }

let node: StartedNode
afterEach(() => node.stop())

describe("the only request actor, in the middle of a stream", () => {
  const pidOf = async (): Promise<number> => {
    const { actors } = (await (await fetch(`${node.url}/actors`)).json()) as { actors: ReadonlyArray<{ kind: string; pid: number }> }
    return actors.find(({ kind }) => kind === "request")!.pid
  }

  it.each(["SIGKILL", "SIGTERM"] as const)("ended by %s: the gateway goes on with what it has delivered, and the client sees the same text", async (signal) => {
    node = await startNode({ preset: "disaggregated" })
    const undisturbed = await streamCompletion(node, request)
    const pid = await pidOf()
    expect(await streamCompletion(node, request, () => process.kill(pid, signal))).toEqual(undisturbed)
  }, 120_000)
})

describe("one of two request actors, drained in the middle of streams", () => {
  const drain = (id: string): Promise<Drained> =>
    Effect.runPromise(new Link(node.bus, "test", 1).ask(Drain, subject(node.namespace, "request", id, Drain.verb), { deadlineMs: 5_000 }, { hop: `request ${id}`, deadlineMs: 10_000 }))

  it("gives them to the other, and the clients see the same text, choices, log probabilities and scores of the prompt", async () => {
    node = await startNode({ change: (topology) => ({ ...topology, request: { replicas: 2 }, workers: topology.workers.map((worker) => ({ ...worker, threads: 1 })) }) })
    const requests = [request, { ...request, temperature: 0 }, { ...request, n: 2, max_tokens: 150 }, { ...request, logprobs: 2 }, { ...request, echo: true, logprobs: 1 }, { ...request, stop: ["zq"] }]
    const all = (each: (answer: number) => void = () => {}): Promise<ReadonlyArray<Answer>> => Promise.all(requests.map((asked, i) => streamCompletion(node, asked, () => each(i))))
    const undisturbed = await all()
    let begun = 0
    let drained: Promise<Drained> | undefined
    expect(await all(() => void (++begun === requests.length && (drained = drain("r0"))))).toEqual(undisturbed)
    const { moved, left } = (await drained)!
    expect(moved).toBeGreaterThan(0)
    expect(moved).toBeLessThan(requests.length) // the queue group gives each of them some
    expect(left).toBe(0)
    expect(await all()).toEqual(undisturbed)
    expect(await drain("r0")).toEqual({ moved: 0, finished: 0, left: 0 })
  })
})
