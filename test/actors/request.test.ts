/** The request actor over real workers, scheduler and store with a tiny model: from text to text. */
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest"
import { decodeGenerateEvent } from "../../actors/messages/request.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { Cluster, type Asked } from "../support/cluster.ts"
import { until } from "../support/scoped.ts"

const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)

const fault = async (work: Promise<unknown>): Promise<Fault> => {
  const outcome = await work.then(
    () => new Error("it did not fail"),
    (error: unknown) => error,
  )
  if (!(outcome instanceof Fault)) throw outcome
  return outcome
}

const crowd = (size: number): ReadonlyArray<Asked> =>
  upTo(size).map((i) => ({
    prompt: `${"The water comes down. ".repeat(i % 5)}Number ${i} says`,
    maxTokens: 6 + (i % 7) * 3,
    choices: i % 6 === 5 ? 3 : 1,
    sampling: { temperature: i % 2, seed: i, ...(i % 4 === 3 ? { repetitionPenalty: 1.2, topP: 0.9 } : {}) },
  }))

describe("a request", () => {
  let cluster: Cluster
  beforeAll(async () => {
    cluster = await Cluster.start({ change: (topology) => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, threads: 1, maxBatch: 8, kv: { ...worker.kv, blocks: 40 } })) }) })
  })
  afterAll(() => cluster.stop())

  it("gets the tokens that it gets alone among many, in a pool too small for all of them", async () => {
    const requests = crowd(24)
    const alone = []
    for (const request of requests) alone.push((await cluster.generate(request)).tokens)
    const together = await Promise.all(requests.map((request) => cluster.generate(request)))
    expect(together.map(({ tokens }) => tokens)).toEqual(alone)
    await cluster.untilIdle()
  })

  it("has the text of its tokens, its lengths and finish reasons", async () => {
    const answer = await cluster.generate({ prompt: "The water", maxTokens: 9, choices: 2, sampling: { temperature: 1 } })
    expect(answer.finishes).toEqual(["length", "length"])
    expect(answer.usage).toMatchObject({ promptTokens: answer.promptTokens.length, completionTokens: 18 })
    expect(answer.tokens[0]).not.toEqual(answer.tokens[1])
    for (const text of answer.texts) expect(text.length).toBeGreaterThan(0)
  })

  it("stops at a stop string, without a letter of it, and all the same in one of several choices", async () => {
    const asked: Asked = { prompt: "The water", maxTokens: 40, choices: 3, sampling: { temperature: 1, seed: 3 } }
    const free = await cluster.generate(asked)
    const stop = free.texts[1]!.slice(10, 13)
    const stopped = await cluster.generate({ ...asked, stop: [stop] })
    for (const choice of upTo(3)) {
      const at = free.texts[choice]!.indexOf(stop)
      expect(stopped.texts[choice]).toBe(at < 0 ? free.texts[choice] : free.texts[choice]!.slice(0, at))
      expect(stopped.finishes[choice]).toBe(at < 0 ? "length" : "stop")
      expect(free.tokens[choice]!.slice(0, stopped.tokens[choice]!.length)).toEqual(stopped.tokens[choice])
    }
    expect(stopped.tokens[1]!.length).toBeLessThan(40)
    await cluster.untilIdle()
  })

  it("ends with the token that means the end, which has no text, and an end that is ignored is drawn through", async () => {
    const asked: Asked = { prompt: "The water", maxTokens: 12, sampling: { temperature: 1, seed: 4 } }
    const free = await cluster.generate(asked)
    const last = free.tokens[0]!.findIndex((token, i) => free.tokens[0]!.indexOf(token) === i && i >= 4)
    const ended = await cluster.generate({ ...asked, stopTokenIds: [free.tokens[0]![last]!, 1_000_000] })
    expect(ended.tokens[0]).toEqual(free.tokens[0]!.slice(0, last + 1))
    expect(ended.finishes).toEqual(["stop"])
    expect(free.texts[0]!.startsWith(ended.texts[0]!)).toBe(true)
  })

  it("carries log probabilities of its tokens and of its prompt", async () => {
    const asked: Asked = { prompt: "The water comes down the penstock and turns the wheel", maxTokens: 5, logprobs: 3, promptLogprobs: true }
    const answer = await cluster.generate(asked)
    expect(answer.promptScores.map(({ token }) => token)).toEqual(answer.promptTokens)
    expect(answer.promptScores[0]!.logprob).toBeNull()
    for (const { logprob, top } of answer.promptScores.slice(1)) {
      expect(logprob).toBeLessThanOrEqual(0)
      expect(top).toHaveLength(3)
    }
    expect(answer.logprobs[0]!.map(({ token }) => token)).toEqual(answer.tokens[0])
    for (const { token, top } of answer.logprobs[0]!) expect(top[0]!.token).toBe(token) // greedy
    const scored = await cluster.generate({ ...asked, maxTokens: 0, prompt: [...answer.promptTokens, ...answer.tokens[0]!] })
    expect(scored.promptScores.slice(answer.promptTokens.length).map(({ logprob }) => logprob)).toEqual(answer.logprobs[0]!.map(({ logprob }) => logprob))
    expect(scored.promptScores.slice(0, answer.promptTokens.length)).toEqual(answer.promptScores)
  })

  it("is done at once where no tokens are asked for", async () => {
    const answer = await cluster.generate({ prompt: "The water", maxTokens: 0, choices: 2 })
    expect(answer).toMatchObject({ tokens: [[], []], texts: ["", ""], finishes: ["length", "length"], usage: { completionTokens: 0 } })
    await cluster.untilIdle()
  })

  it("is refused by the field at fault, and harms nobody else", async () => {
    const other = cluster.generate({ prompt: "Meanwhile", maxTokens: 30 })
    expect(await fault(cluster.generate({ prompt: [5], sampling: { logitBias: [[320, 1]] } }))).toMatchObject({ code: "invalid_request", param: "logit_bias" })
    expect(await fault(cluster.generate({ prompt: [5], sampling: { topP: 0 } }))).toMatchObject({ code: "invalid_request" })
    expect(await fault(cluster.generate({ prompt: [5, 320] }))).toMatchObject({ code: "invalid_request", param: "prompt" })
    expect(await fault(cluster.generate({ prompt: [] }))).toMatchObject({ code: "invalid_request", param: "prompt" })
    expect(await fault(cluster.generate({ prompt: [5], choices: 9 }))).toMatchObject({ code: "invalid_request", param: "n" })
    expect(await fault(cluster.generate({ prompt: upTo(512).map(() => 5) }))).toMatchObject({ code: "context_length_exceeded", message: expect.stringContaining("511") })
    expect((await other).tokens[0]).toHaveLength(30)
    await cluster.untilIdle()
  })

  it.each(["greedy", "sampled"] as const)("goes on from any point of a %s stream with the same tokens and text", async (kind) => {
    const asked: Asked = { prompt: "The mill", maxTokens: 14, choices: 2, stop: ["zzz"], sampling: { temperature: kind === "greedy" ? 0 : 1, seed: 9, repetitionPenalty: 1.1 } }
    const whole = await cluster.generate(asked)
    const cuts = upTo(15).map((cut) => whole.tokens.map((tokens, choice) => tokens.slice(0, choice === 0 ? cut : Math.floor(cut / 2))))
    const resumed = await Promise.all(cuts.map((delivered) => cluster.generate({ ...asked, delivered, attempt: 1 })))
    for (const [cut, answer] of resumed.entries()) {
      expect(answer.tokens, `cut at ${cut}`).toEqual(whole.tokens)
      answer.texts.forEach((text, choice) => expect(whole.texts[choice]!.endsWith(text)).toBe(true))
      expect(answer.usage.completionTokens).toBe(28)
    }
    expect(resumed[0]!.texts).toEqual(whole.texts)
    await cluster.untilIdle()
  })

  it("fences an older attempt, and an attempt that comes twice", async () => {
    const asked: Asked = { requestId: "fenced", prompt: "The wheel", maxTokens: 60, sampling: { temperature: 1 } }
    const whole = await cluster.generate({ ...asked, requestId: "free" })
    const older = await cluster.open(asked, 1) // reads slowly, so that it is not over too soon
    await older.next()
    expect(await fault(cluster.generate(asked))).toMatchObject({ code: "invalid_request", message: expect.stringContaining("attempt 0 of request fenced is served already") })
    const newer = await cluster.generate({ ...asked, attempt: 1 })
    expect(newer.tokens).toEqual(whole.tokens)
    const drained = (async () => {
      while ((await older.next()) !== undefined);
    })()
    expect(await fault(drained)).toMatchObject({ code: "cancelled", message: expect.stringContaining("taken over") })
    await cluster.untilIdle()
  })

  it("pauses while its reader is behind, and others go on; a reader that goes away frees everything", async () => {
    const slow = await cluster.open({ prompt: "The stones", maxTokens: 200 }, 2)
    await slow.next()
    const engine = cluster.node.workers.get("w0")!.worker.engine
    await until(() => engine.load.sequences === 1)
    const others = await Promise.all(crowd(6).map((request) => cluster.generate(request)))
    expect(others).toHaveLength(6)
    expect(engine.requestIds).toHaveLength(1) // it is still there, and not finished
    const before = engine.counters.steps
    slow.cancel("the client is gone")
    await cluster.untilIdle()
    expect(engine.counters.steps - before).toBeLessThanOrEqual(1)
  })

  it("gives up at once when it is cancelled, wherever it is", async () => {
    for (const turns of [0, 1, 2, 3, 5, 8, 13, 21]) {
      const readers = await Promise.all(upTo(12).map((i) => cluster.open({ prompt: `${"The river to the sea. ".repeat(10)} ${i}`, maxTokens: 100, choices: 1 + (i % 3) })))
      for (let i = 0; i < turns; i++) await new Promise((resolve) => setImmediate(resolve))
      for (const reader of readers) reader.cancel("changed my mind")
    }
    await cluster.untilIdle()
    expect((await cluster.generate({ prompt: "After that" })).tokens[0]).toHaveLength(12)
  })

  it("loses no place at the scheduler, however requests end", async () => {
    // More than the scheduler has places, one after the other: a place that was lost would be missed.
    for (let round = 0; round < 3; round++) {
      const answers = await Promise.all(upTo(9).map((i) => cluster.generate({ prompt: `Round ${round} ${i}`, maxTokens: 2 })))
      expect(answers.map(({ usage }) => usage.completionTokens)).toEqual(upTo(9).map(() => 2))
    }
  })
})

describe("a worker that breaks in the middle of streams", () => {
  let cluster: Cluster
  const shown = vi.spyOn(console, "error").mockImplementation(() => {})
  beforeAll(async () => {
    cluster = await Cluster.start({ change: (topology) => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, threads: 1 })) }) })
  })
  afterAll(async () => {
    await cluster.stop()
    expect(shown.mock.calls.join()).toContain("worker w0 failed and is restarted")
    shown.mockRestore()
  })

  it("costs time and no token: every stream goes on with the same text, choices and log probabilities included", async () => {
    const requests: ReadonlyArray<Asked> = upTo(5).map((i) => ({ prompt: `Story ${i}: the gate`, maxTokens: 40, choices: 1 + (i % 3), logprobs: i % 2 === 0 ? 1 : undefined, sampling: { temperature: 1, seed: i } }))
    const undisturbed = await Promise.all(requests.map((request) => cluster.generate(request)))
    const broken = cluster.node.workers.get("w0")!
    let closing: Promise<void> | undefined
    const disturbed = await Promise.all(
      requests.map((request, i) =>
        cluster.generate(request, (tokens) => {
          if (i === 0 && tokens === 15) closing = broken.kernels.close()
        }),
      ),
    )
    await closing
    for (const [i, answer] of disturbed.entries()) {
      const { tokens, texts, finishes, logprobs } = undisturbed[i]!
      expect(answer).toMatchObject({ tokens, texts, finishes, logprobs })
    }
    expect(cluster.node.workers.get("w0")!.worker.epoch).toBeGreaterThan(broken.worker.epoch)
    await cluster.untilIdle()
  })

  it("is announced: readers see a stream that goes on, and no second prompt", async () => {
    const reader = await cluster.open({ prompt: "Again", maxTokens: 30 })
    const types: Array<string> = []
    for await (const frame of reader) {
      types.push(decodeGenerateEvent(frame).type)
      if (types.length === 8) await cluster.node.workers.get("w0")!.kernels.close()
    }
    expect(types).toEqual(["prompt", ...upTo(30).map(() => "delta"), "done"])
  })
})
