/** Workers whose roles and bounds change while they run, and streams that go on elsewhere; on a memory bus with a tiny model. */
import { Effect } from "effect"
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { Configure, Drain, type ConfigureMessage, type Drained } from "../../actors/messages/worker.ts"
import { Place, Release, type Role } from "../../actors/messages/scheduler.ts"
import { decodeGenerateEvent } from "../../actors/messages/request.ts"
import { Cluster, type Answer, type Asked } from "../support/cluster.ts"
import { until } from "../support/scoped.ts"

const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)

interface Workers {
  readonly [name: string]: ReadonlyArray<Role>
}

const startWith = async (workers: Workers, bounds: { readonly maxBatch?: number; readonly blocks?: number } = {}): Promise<Cluster> => {
  const cluster = await Cluster.start({
    change: (topology) => {
      const [like] = topology.workers
      const made = Object.entries(workers).map(([name, roles]) => ({ ...like!, name, roles: roles.length === 0 ? (["decode"] as const) : roles, threads: 1, maxBatch: bounds.maxBatch ?? 8, kv: { ...like!.kv, blocks: bounds.blocks ?? 80 } }))
      return { ...topology, workers: made }
    },
  })
  for (const [name, roles] of Object.entries(workers)) if (roles.length === 0) await configure(cluster, name, { roles: [] })
  return cluster.fetchAlways()
}

const configure = (cluster: Cluster, worker: string, message: ConfigureMessage) => Effect.runPromise(cluster.link.ask(Configure, subject(cluster.node.namespace, "worker", worker, Configure.verb), message, { hop: `worker ${worker}` }))
const drain = (cluster: Cluster, worker: string, deadlineMs = 10_000): Promise<Drained> =>
  Effect.runPromise(cluster.link.ask(Drain, subject(cluster.node.namespace, "worker", worker, Drain.verb), { deadlineMs }, { hop: `worker ${worker}`, deadlineMs: deadlineMs + 5_000 }))

const engineOf = (cluster: Cluster, worker: string) => cluster.node.workers.get(worker)!.worker.engine
const countersOf = (cluster: Cluster, worker: string) => ({ ...engineOf(cluster, worker).counters })

const story = "The water comes down the penstock and turns the wheel, and the wheel turns the stones."
const kinds: Readonly<Record<string, Asked>> = {
  "a greedy stream": { prompt: story, maxTokens: 60 },
  "a sampled stream": { prompt: story, maxTokens: 60, sampling: { temperature: 1, seed: 5 } },
  "several choices": { prompt: story, maxTokens: 40, choices: 3, sampling: { temperature: 1, seed: 6 } },
  "log probabilities": { prompt: story, maxTokens: 40, logprobs: 3, sampling: { temperature: 1, seed: 7, repetitionPenalty: 1.2 } },
  "scores of the prompt": { prompt: story, maxTokens: 40, logprobs: 1, promptLogprobs: true },
}

const said = ({ tokens, texts, finishes, logprobs, promptScores, usage }: Answer) => ({ tokens, texts, finishes, logprobs, promptScores, completionTokens: usage.completionTokens })

describe("a decode worker that is drained in the middle of streams", () => {
  let cluster: Cluster
  beforeAll(async () => {
    cluster = await startWith({ p0: ["prefill"], d0: ["decode"], d1: ["decode"] }, { blocks: 400 })
  })
  afterAll(() => cluster.stop())
  beforeEach(async () => {
    await configure(cluster, "d0", { roles: ["decode"] })
    await configure(cluster, "d1", { roles: [] })
  })

  /** Runs a request on d0, and drains that after so many tokens, when d1 decodes. */
  const disturbed = async (asked: Asked, after: number): Promise<{ readonly answer: Answer; readonly drained: Drained }> => {
    let drained: Promise<Drained> | undefined
    const answer = await cluster.generate(asked, (tokens) => {
      if (tokens >= after) drained ??= configure(cluster, "d1", { roles: ["decode"] }).then(() => drain(cluster, "d0"))
    })
    return { answer, drained: await drained! }
  }

  /** Rows that a worker computes while `work` runs. */
  const rowsOf = async <A>(worker: string, work: () => Promise<A>): Promise<readonly [A, rows: number]> => {
    const step = vi.spyOn(cluster.node.workers.get(worker)!.kernels, "step")
    try {
      const done = await work()
      return [done, step.mock.calls.reduce((sum, [{ tokens }]) => sum + tokens.length, 0)]
    } finally {
      step.mockRestore()
    }
  }

  it.each(Object.entries(kinds))("%s: the client sees what it sees undisturbed, wherever it is cut, and nothing is computed twice", async (kind, asked) => {
    const undisturbed = said(await cluster.generate(asked))
    for (const after of [1, 2, 17, 33, 70].filter((cut) => cut < undisturbed.completionTokens - 10)) {
      await configure(cluster, "d0", { roles: ["decode"] })
      await configure(cluster, "d1", { roles: [] })
      const before = countersOf(cluster, "d1")
      // A prompt of its own, so that what is known of it is known of this request only.
      const fresh = { ...asked, cacheSalt: `${kind} ${after}` }
      const [[{ answer, drained }, rows], prefillRows] = await rowsOf("p0", () => rowsOf("d1", () => disturbed(fresh, after)))
      expect(said(answer), `after ${after}`).toEqual(undisturbed)
      expect(drained).toEqual({ moved: 1, finished: 0, left: 0 })
      expect(prefillRows).toBe(answer.promptTokens.length) // once, for d0
      const drawn = countersOf(cluster, "d1").outputTokens - before.outputTokens
      expect(drawn).toBeGreaterThan(0)
      // What is not a full block yet, of each choice.
      expect(rows, `after ${after}`).toBeLessThan(drawn + 16 * answer.tokens.length)
    }
    await cluster.untilIdle()
  })

  it("stop strings: text and end are the same, though the string begins before the move and ends after it", async () => {
    const free = await cluster.generate({ prompt: story, maxTokens: 60, choices: 2, sampling: { temperature: 1, seed: 8 } })
    const stop = free.texts[1]!.slice(30, 36)
    const asked: Asked = { prompt: story, maxTokens: 60, choices: 2, stop: [stop], sampling: { temperature: 1, seed: 8 } }
    const undisturbed = said(await cluster.generate(asked))
    const total = undisturbed.completionTokens
    for (const after of [3, Math.floor(total / 2), total - 6]) {
      await configure(cluster, "d0", { roles: ["decode"] })
      await configure(cluster, "d1", { roles: [] })
      expect(said((await disturbed(asked, after)).answer), `after ${after}`).toEqual(undisturbed)
    }
  })

  it("twenty streams at once, moved to and fro: all of them go on, and each worker gets what the other had", async () => {
    const requests = upTo(20).map((i): Asked => ({ prompt: `${story.slice(0, 20 + 3 * i)} ${i}`, maxTokens: 300, choices: 1 + Number(i % 7 === 3), sampling: { temperature: i % 2, seed: i } }))
    await configure(cluster, "d1", { roles: ["decode"] })
    for (const worker of ["d0", "d1"]) await configure(cluster, worker, { maxBatch: 32 })
    const undisturbed = await Promise.all(requests.map((request) => cluster.generate(request)))
    let over = false
    const toAndFro = async () => {
      let moved = 0
      for (let i = 0; !over; i++) {
        const [from, to] = i % 2 === 0 ? (["d0", "d1"] as const) : (["d1", "d0"] as const)
        await configure(cluster, to, { roles: ["decode"] })
        moved += (await drain(cluster, from)).moved
      }
      return moved
    }
    const moving = toAndFro()
    const disturbed = await Promise.all(requests.map((request) => cluster.generate(request)))
    over = true
    expect(await moving).toBeGreaterThan(0) // how many is the machine's business
    expect(disturbed.map(said)).toEqual(undisturbed.map(said))
    await cluster.untilIdle()
  })
})

describe("a worker that is to decode no more", () => {
  let cluster: Cluster | undefined
  afterEach(() => cluster?.stop())
  const asked: Asked = { prompt: story, maxTokens: 450, sampling: { temperature: 1, seed: 3 } }

  it("runs on where nobody else decodes, says at the deadline what is left, and gives it away as soon as somebody does", async () => {
    cluster = await startWith({ d0: ["prefill", "decode"], d1: [] })
    const { tokens } = await cluster.generate({ ...asked, maxTokens: 150 })
    const before = countersOf(cluster, "d1")
    // Workers hear of each other's room at each beat, and a reader that takes its time makes the answer longer than that.
    const found: Array<number> = []
    for await (const frame of await cluster.open({ ...asked, maxTokens: 150 }, 4)) {
      const event = decodeGenerateEvent(frame)
      if (event.type !== "delta") continue
      found.push(...event.tokens)
      if (found.length === 5) expect(await drain(cluster, "d0", 100)).toEqual({ moved: 0, finished: 0, left: 1 })
      if (found.length === 20) await configure(cluster, "d1", { roles: ["decode"] })
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
    expect(found).toEqual(tokens[0])
    expect(countersOf(cluster, "d1").outputTokens).toBeGreaterThan(before.outputTokens)
  })

  it("gives away as many as the others have room for, and the rest as they get it", async () => {
    cluster = await startWith({ d0: ["prefill", "decode"], d1: [] }, { maxBatch: 4 })
    const requests = upTo(4).map((i): Asked => ({ ...asked, prompt: `${i} ${story}`, maxTokens: 100 + 100 * i, sampling: { temperature: 1, seed: i } }))
    const undisturbed = await Promise.all(requests.map((request) => cluster!.generate(request)))
    await configure(cluster, "d1", { maxBatch: 2 })
    const answers = requests.map((request) => cluster!.generate(request))
    await until(() => engineOf(cluster!, "d0").load.sequences === 4)
    await configure(cluster, "d1", { roles: ["decode"] })
    await configure(cluster, "d0", { roles: ["prefill"] })
    await until(() => engineOf(cluster!, "d1").load.sequences > 0)
    expect(engineOf(cluster, "d0").load.sequences).toBeGreaterThanOrEqual(2)
    expect((await Promise.all(answers)).map(said)).toEqual(undisturbed.map(said))
    expect(engineOf(cluster, "d1").load.waiting).toBe(0)
  })

  it("keeps its weights, its pool and its epoch, and others find what it knows", async () => {
    cluster = await startWith({ w0: ["prefill", "decode"], w1: [] })
    const { kernels, worker } = cluster.node.workers.get("w0")!
    const { promptTokens } = await cluster.generate({ prompt: story, maxTokens: 20 })
    const known = worker.engine.blocks.knownHashes()
    expect(known.length).toBeGreaterThan(0)
    for (const roles of [["prefill"], [], ["decode"], ["prefill", "decode"]] as const) {
      expect(await configure(cluster, "w0", { roles })).toEqual({ applied: ["roles"], restart: [] })
      expect(cluster.node.workers.get("w0")).toEqual({ kernels, worker })
      expect(cluster.node.workers.get("w0")!.worker).toBe(worker)
      expect(worker.engine.blocks.knownHashes()).toEqual(known)
    }
    expect((await cluster.generate({ prompt: story, maxTokens: 20 })).usage.cachedTokens).toBe(Math.floor((promptTokens.length - 1) / 16) * 16)
    // Where it has no role, it still sends its KV to those that have.
    await configure(cluster, "w1", { roles: ["prefill", "decode"] })
    await configure(cluster, "w0", { roles: [] })
    const before = countersOf(cluster, "w1")
    await cluster.generate({ prompt: story, maxTokens: 20 })
    expect(countersOf(cluster, "w1").cachedTokens - before.cachedTokens).toBe(Math.floor((promptTokens.length - 1) / 16) * 16)
  })

  it("is known for it at once: whatever is placed after the answer is placed elsewhere", async () => {
    cluster = await startWith({ w0: ["prefill", "decode"], w1: ["prefill", "decode"] })
    for (const i of upTo(6)) {
      const [off, on] = i % 2 === 0 ? (["w0", "w1"] as const) : (["w1", "w0"] as const)
      await configure(cluster, on, { roles: ["prefill", "decode"] })
      await configure(cluster, off, { roles: i < 3 ? ["prefill"] : [] })
      const to = (verb: string) => subject(cluster!.node.namespace, "scheduler", anyId, verb)
      const key = { requestId: `asked ${i}`, attempt: 0 }
      const placed = await Effect.runPromise(cluster.link.ask(Place, to(Place.verb), { ...key, tokens: 1, hashes: new Uint8Array(0), choices: 1, maxTokens: 1, exclude: [] }, { hop: "scheduler" }))
      expect(placed.decode).toBe(on)
      await Effect.runPromise(cluster.link.tell(Release, to(Release.verb), key))
      const before = countersOf(cluster, off)
      await Promise.all(upTo(4).map((n) => cluster!.generate({ prompt: `${i} ${n} ${story}` })))
      expect(countersOf(cluster, off)).toMatchObject({ outputTokens: before.outputTokens, ...(i < 3 ? {} : { promptTokens: before.promptTokens }) })
    }
  })

  it("says what it changed, what it had already, and what only a restart changes", async () => {
    cluster = await startWith({ w0: ["prefill", "decode"] }, { maxBatch: 8, blocks: 80 })
    const engine = engineOf(cluster, "w0")
    expect(await configure(cluster, "w0", { roles: ["decode", "prefill"], maxBatch: 8, blocks: 80, threads: 1, device: "cpu" })).toEqual({ applied: [], restart: [] })
    expect(await configure(cluster, "w0", { roles: ["prefill", "decode"], maxBatch: 3, blocks: 40, threads: 2, device: "cuda" })).toEqual({ applied: ["blocks", "maxBatch"], restart: ["threads", "device"] })
    expect([engine.maxBatch, engine.blocks.limit]).toEqual([3, 40])
    expect(await configure(cluster, "w0", { maxBatch: 5, blocks: 81 })).toEqual({ applied: ["maxBatch"], restart: ["blocks"] })
    expect([engine.maxBatch, engine.blocks.limit]).toEqual([5, 40])
    expect((await cluster.generate({ prompt: story, choices: 5 })).tokens).toHaveLength(5)
    await expect(configure(cluster, "w0", { maxBatch: 0 })).rejects.toMatchObject({ code: "invalid_request" })
  })

  it("moves what has outgrown its pool to a worker with a larger one", async () => {
    cluster = await startWith({ w0: ["prefill", "decode"], w1: [] })
    const { tokens } = await cluster.generate({ ...asked, maxTokens: 200 })
    const answer = await cluster.generate({ ...asked, maxTokens: 200 }, (count) => {
      if (count === 10) void configure(cluster!, "w1", { roles: ["prefill", "decode"] }).then(() => configure(cluster!, "w0", { blocks: 4 }))
    })
    expect(answer.tokens).toEqual(tokens)
    expect(engineOf(cluster, "w0").blocks.excess).toBe(0)
    await cluster.untilIdle()
  })
})

it("a prompt that is being computed for a worker which is drained is computed for another", async () => {
  const cluster = await startWith({ p0: ["prefill"], d0: ["decode"], d1: [] })
  try {
    const prompt = story.repeat(3)
    const whole = await cluster.generate({ prompt, cacheSalt: "whole" })
    for (const turns of upTo(12)) {
      await configure(cluster, "d0", { roles: ["decode"] })
      await configure(cluster, "d1", { roles: [] })
      const answer = cluster.generate({ prompt, cacheSalt: `${turns}` })
      for (let i = 0; i < 3 * turns; i++) await new Promise((resolve) => setImmediate(resolve))
      await configure(cluster, "d1", { roles: ["decode"] })
      await drain(cluster, "d0")
      expect((await answer).tokens).toEqual(whole.tokens)
    }
    // Given away more often than it may fail, before its first token.
    const kernels = cluster.node.workers.get("p0")!.kernels
    const step = kernels.step.bind(kernels)
    const slow = vi.spyOn(kernels, "step").mockImplementation(async (...batch) => {
      await new Promise((resolve) => setTimeout(resolve, 100))
      return step(...batch)
    })
    const answer = cluster.generate({ prompt, cacheSalt: "to and fro" })
    for (const i of upTo(limits.placementAttempts + 2)) {
      const [from, to] = i % 2 === 0 ? (["d1", "d0"] as const) : (["d0", "d1"] as const)
      await until(() => engineOf(cluster, from).requestIds.length > 0)
      await configure(cluster, to, { roles: ["decode"] })
      expect((await drain(cluster, from, 0)).moved).toBe(1)
    }
    slow.mockRestore()
    expect((await answer).tokens).toEqual(whole.tokens)
    await cluster.untilIdle()
  } finally {
    await cluster.stop()
  }
})
