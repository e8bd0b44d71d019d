import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it, vi } from "vitest"
import { kvChunkHeaderBytes, readChunkHeader } from "../../actors/messages/kv-chunk.ts"
import { decodePrefillFrame, Prefill } from "../../actors/messages/prefill.ts"
import { decodeGenerateEvent } from "../../actors/messages/request.ts"
import { subject } from "../../actors/messages/subjects.ts"
import { header, protocolVersion } from "../../actors/runtime/bus.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { openStream } from "../../actors/runtime/stream-reader.ts"
import { limits } from "../../config/limits.ts"
import type { Topology } from "../../config/topology.ts"
import { Cluster, type Answer, type Asked } from "../support/cluster.ts"
import type { Faults } from "../support/faulty-bus.ts"
import { natsStartTimeoutMs, startNats } from "../support/start-nats.ts"
import { startNode, streamCompletion } from "../support/start-node.ts"
import { startPair, type PairOptions, type StartedPair } from "../support/start-pair.ts"
import { randomNumbers, type TinyModelOptions } from "../support/tiny-model.ts"

const transferVerb = (to: string): string | undefined => /\.kv\.[0-9a-f]{32}\.(\w+)$/.exec(to)?.[1]

const random = randomNumbers(11)
const promptOf = (tokens: number): ReadonlyArray<number> => Array.from({ length: tokens }, () => 3 + Math.floor(random() * 256))
const shared = promptOf(48)

/** One token, exact blocks, a token more or less, several steps, several choices, stops, scores, resumed, a shared prefix. */
const mixed: ReadonlyArray<Asked> = [
  ...[1, 15, 16, 17, 32, 48, 200, 400].map((length): Asked => ({ prompt: promptOf(length) })),
  { prompt: promptOf(37), sampling: { temperature: 1, seed: 5 } },
  { prompt: promptOf(64), choices: 3, sampling: { temperature: 1, seed: 6 } },
  { prompt: promptOf(33), choices: 4, maxTokens: 1, sampling: { temperature: 1.2, seed: 7 } },
  { prompt: promptOf(50), promptLogprobs: true, logprobs: 2 },
  { prompt: promptOf(20), maxTokens: 0, promptLogprobs: true, logprobs: 1 },
  { prompt: promptOf(40), delivered: [promptOf(5)], attempt: 1 },
  { prompt: [...shared, ...promptOf(30)] },
  { prompt: [...shared, ...promptOf(5)], sampling: { temperature: 0.7, seed: 8 } },
]

// Ten times as fast as the clock on the wall: a deadline of ten seconds takes one, and a slow machine misses none.
const wait = setTimeout
const quickly = () => {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "setInterval", "clearInterval", "performance", "Date"] })
  const beat = () => void (vi.isFakeTimers() && vi.advanceTimersByTimeAsync(20).then(() => wait(beat, 2)))
  beat()
}
const normally = () => void vi.useRealTimers()

describe("two workers with KV between them", () => {
  let expected: ReadonlyArray<Answer>
  beforeAll(async () => {
    const single = await Cluster.start()
    expected = await Promise.all(mixed.map((asked) => single.generate(asked)))
    await single.stop()
  })

  let pair: StartedPair | undefined
  beforeEach(quickly)
  afterEach(async () => {
    await pair?.stop()
    pair = undefined
    normally()
  })
  const start = async (options: PairOptions) => (pair = await startPair({ apart: true, ...options }))
  const ways = [["in messages", true], ["from pool to pool", false]] as const

  /** What everybody holds comes back: blocks, samplers, reservations, and after a while every subscription. */
  const nothingLeft = async ({ cluster, bus, decode }: StartedPair, listeners: number) => {
    await cluster.untilIdle()
    expect(decode.worker.receiving.size).toBe(0)
    for (let waitedMs = 0; bus.listeners > listeners && waitedMs < 2 * limits.storeTransferLeaseMs; waitedMs += 100) await new Promise((resolve) => setTimeout(resolve, 100))
    expect(bus.listeners).toBe(listeners)
  }

  /** Calls back with each chunk to a worker that is published, before anybody has it. */
  const eachChunk = ({ memory }: StartedPair, visit: (chunk: Uint8Array, transferId: string) => void) => {
    const { publish } = memory
    memory.publish = function (to, data, options) {
      publish.call(this, to, data, options)
      if (transferVerb(to) === "chunk") visit(data, to.split(".").at(-2)!)
    }
  }

  /** The same answers; what each request has from a cache is its own. */
  const alike = (answers: ReadonlyArray<Answer>) => answers.map(({ usage, ...answer }) => ({ ...answer, completionTokens: usage.completionTokens }))

  const answersUnder = async (verb: "chunk" | "progress" | "status" | "all", faults: Faults, seed = 1, apart = true) => {
    let calm = false
    const started = await start({ seed, apart, faultsOf: (to) => (!calm && transferVerb(to) !== undefined && (verb === "all" || transferVerb(to) === verb) ? faults : undefined) })
    const { listeners } = started.bus
    const answers = await Promise.all(mixed.map((asked) => started.cluster.generate(asked)))
    expect(alike(answers)).toEqual(alike(expected))
    calm = true // or what goes to the KV store in the background would have no end
    await nothingLeft(started, listeners)
    return started
  }

  it("give what one gives", async () => {
    const { prefill } = await answersUnder("all", {})
    expect(prefill.worker.totals.failed).toBe(0)
    expect(prefill.worker.totals.completed).toBeGreaterThan(10)
  })

  it("of one process give what one gives, and no KV crosses the bus", async () => {
    const started = await start({ apart: false, stores: 0, faultsOf: () => undefined })
    const { listeners } = started.bus
    const chunks: Array<Uint8Array> = []
    eachChunk(started, (chunk) => chunks.push(chunk))
    const answers = await Promise.all(mixed.map((asked) => started.cluster.generate(asked)))
    expect(alike(answers)).toEqual(alike(expected))
    const { totals } = started.prefill.worker
    expect(totals).toMatchObject({ failed: 0, completed: expect.any(Number) as number })
    expect(started.decode.worker.totals.fallbacks).toBe(0)
    expect(chunks.length).toBeGreaterThan(10)
    expect(new Set(chunks.map(({ byteLength }) => byteLength))).toEqual(new Set([kvChunkHeaderBytes]))
    // What was moved is counted as where messages hold it.
    expect(totals.bytes).toBe(chunks.reduce((sum, chunk) => sum + kvChunkHeaderBytes + readChunkHeader(chunk).header.payloadBytes, 0))
    await nothingLeft(started, listeners)
  })

  it("of one process compute prompts where they are decoded when their KV is gone from the other pool before it is copied", async () => {
    const started = await start({ apart: false, faultsOf: () => undefined })
    const { listeners } = started.bus
    eachChunk(started, (_, id) => started.prefill.worker.engine.cancel(id))
    const answers = await Promise.all(mixed.map((asked) => started.cluster.generate(asked)))
    expect(alike(answers)).toEqual(alike(expected))
    expect(started.decode.worker.totals.fallbacks).toBeGreaterThan(10)
    await nothingLeft(started, listeners)
  })

  it.each([
    ["dropped", "chunk", { drop: 0.3 }],
    ["duplicated", "chunk", { duplicate: 0.7 }],
    ["reordered", "chunk", { reorder: 0.7 }],
    ["late", "chunk", { delay: 0.7 }],
    ["corrupted", "chunk", { corrupt: 0.5 }],
    ["lost", "progress", { drop: 0.7 }],
    ["lost", "status", { drop: 0.7 }],
    ["doubled, reordered and late", "progress", { duplicate: 0.5, reorder: 0.5, delay: 0.3 }],
    ["doubled, reordered and late", "status", { duplicate: 0.5, reorder: 0.5, delay: 0.3 }],
  ] as const)("give what one gives though messages are %s: %s", async (_, verb, faults) => {
    const { bus, prefill, decode } = await answersUnder(verb, faults, 2)
    for (const fault of Object.keys(faults) as Array<keyof Faults>) expect(bus.met[fault]).toBeGreaterThan(0)
    expect([prefill.worker.totals.failed, decode.worker.totals.fallbacks]).toEqual([0, 0])
  })

  it.each(["int8", "int4"] as const)("give what one gives in pools of %s", async (dtype) => {
    const inDtype = (topology: Topology): Topology => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, kv: { ...worker.kv, dtype } })) })
    normally()
    const single = await Cluster.start({ change: inDtype })
    const alone = await Promise.all(mixed.map((asked) => single.generate(asked)))
    await single.stop()
    const started = await start({ faultsOf: () => undefined, dtype })
    const { listeners } = started.bus
    expect(started.decode.worker.kv).toMatchObject({ dtype, layerBlockBytes: 2 * 2 * 16 * ((dtype === "int8" ? 16 : 8) + 4) })
    expect(started.decode.worker.formatId).toContain(`-${dtype}-`)
    expect(alike(await Promise.all(mixed.map((asked) => started.cluster.generate(asked))))).toEqual(alike(alone))
    expect(alike(alone)).not.toEqual(alike(expected)) // of f16: the pool does hold something else
    await nothingLeft(started, listeners)
    expect(started.prefill.worker.totals).toMatchObject({ failed: 0, completed: expect.any(Number) })
    expect(started.prefill.worker.totals.completed).toBeGreaterThan(0)
    expect(started.decode.worker.totals.fallbacks).toBe(0)
  })

  it.each(ways)("give what one gives though every fault comes at once: %s", async (_, apart) => {
    for (const seed of [31, 32, 33]) {
      await answersUnder("all", { drop: 0.2, duplicate: 0.2, reorder: 0.2, delay: 0.2 }, seed, apart)
      await pair!.stop()
    }
  })

  it.each(ways)("give no other token though one bit of any chunk is wrong: %s", async (_, apart) => {
    for (const seed of [41, 42, 43]) {
      const { bus } = await answersUnder("chunk", { corrupt: 0.7 }, seed, apart)
      expect(bus.met.corrupt).toBeGreaterThan(15)
      await pair!.stop()
    }
  })

  it.each([
    ["no chunk comes: decode computes the prompt itself", "chunk", { drop: 1 }],
    ["every chunk is corrupted: decode computes the prompt itself", "chunk", { corrupt: 1 }],
    ["the sender's control messages are not heard", "progress", { drop: 1 }],
    ["nothing of the sender comes", "all", { drop: 1 }],
  ] as const)("give what one gives though %s", async (_, verb, faults) => {
    const { decode, prefill } = await answersUnder(verb, faults)
    expect(prefill.worker.totals.failed).toBeGreaterThan(0)
    expect(decode.worker.totals.fallbacks).toBeGreaterThan(0)
  })

  it("give what one gives though prefill fails after its KV has come, since nobody told it so", async () => {
    const started = await start({ faultsOf: (to) => (transferVerb(to) === "status" ? { drop: 1 } : undefined) })
    const { listeners } = started.bus
    const asked = { ...mixed[8]!, maxTokens: 200 } // more than may be on their way to a reader
    let ordered = new Uint8Array(0)
    const { publish } = started.memory
    started.memory.publish = function (to, data, options) {
      if (to.includes(".prefill.p0.")) ordered = data.slice()
      publish.call(this, to, data, options)
    }
    const undisturbed = await started.cluster.generate(asked)
    await started.cluster.untilIdle()
    const { totals } = started.prefill.worker
    const failedBefore = totals.failed
    const stream = await started.cluster.open(asked, 2) // and nothing is read, so that decode waits
    while (totals.failed === failedBefore) await new Promise((resolve) => setTimeout(resolve, 100))
    // What decode answers to whoever missed the first token.
    const again = openStream(started.bus, subject(started.namespace, "prefill", "d0", Prefill.verb), ordered, { headers: { [header.version]: protocolVersion }, hop: "prefill d0" })
    const frames = []
    for await (const frame of again) frames.push(decodePrefillFrame(frame))
    expect(frames.map(({ type }) => type)).toEqual(["token", "done"])
    const tokens: Array<number> = []
    for await (const frame of stream) {
      const event = decodeGenerateEvent(frame)
      if (event.type === "delta") tokens.push(...event.tokens)
    }
    expect(tokens).toEqual(undisturbed.tokens[0])
    expect(frames[0]).toMatchObject({ event: { token: tokens[0] } })
    expect(started.decode.worker.totals.fallbacks).toBe(0)
    await nothingLeft(started, listeners)
  })

  it.each(ways)("give what one gives though the receiver goes away in the middle: %s", async (_, apart) => {
    const started = await start({ apart, faultsOf: (to) => (transferVerb(to) === "chunk" ? { delay: 0.5 } : undefined), seed: 6 })
    const gone = new Set<string>()
    const { publish } = started.memory
    started.memory.publish = function (to, data, options) {
      publish.call(this, to, data, options)
      const id = to.split(".").at(-2)!
      if (transferVerb(to) !== "chunk" || gone.has(id)) return
      gone.add(id)
      // As where its subscriptions are lost: nothing is told.
      const receiving = started.decode.worker.receiving.get(id)
      receiving?.stop()
    }
    const answers = await Promise.all(mixed.map((asked) => started.cluster.generate(asked)))
    expect(alike(answers)).toEqual(alike(expected))
    expect(gone.size).toBeGreaterThan(10)
    await started.cluster.untilIdle()
  })

  it.each(ways)("free everything where clients go away while KV is on its way: %s", async (_, apart) => {
    const started = await start({ apart, faultsOf: (to) => (transferVerb(to) === undefined ? undefined : { delay: 0.6 }), seed: 8, delayMs: 600 })
    const { listeners } = started.bus
    for (let round = 0; round < 5; round++) {
      const streams = await Promise.all(mixed.map((asked) => started.cluster.open(asked)))
      await new Promise((resolve) => setTimeout(resolve, 100 * round))
      for (const stream of streams) stream.cancel("the client has gone")
    }
    await nothingLeft(started, listeners)
    const answers = await Promise.all(mixed.map((asked) => started.cluster.generate(asked)))
    expect(alike(answers)).toEqual(alike(expected))
  })

  it("refuse each other's KV by name where their formats differ", async () => {
    const started = await start({ faultsOf: () => undefined, prefillDigest: "f".repeat(64) })
    const { listeners } = started.bus
    const refused = await started.cluster.generate(mixed[5]!).catch((fault: unknown) => fault)
    expect(refused).toMatchObject({ code: "invalid_request", hop: "prefill p0" })
    expect((refused as Fault).message).toMatch(/holds KV of format f{16}-f16-.*, d0 wants 0{16}-f16-/)
    await nothingLeft(started, listeners)
  })

  it("stream 16 long prompts at once within the window of each", async () => {
    // Much KV for little computing.
    const wide: TinyModelOptions = { layers: 8, heads: 8, kvHeads: 8, headDim: 128, seed: 4 }
    const bytesPerToken = 8 * 2 * 8 * 128 * 2
    const started = await start({ tiny: wide, blocks: 4 * 20, stores: 0, delayMs: 1, seed: 12, faultsOf: (to) => (transferVerb(to) === undefined ? undefined : { delay: 1 }) })
    const { listeners } = started.bus
    const prompts = Array.from({ length: 16 }, () => promptOf(300))
    expect(300 * bytesPerToken).toBeGreaterThan(limits.kvWindowBytes)
    const answers = await Promise.all(prompts.map((prompt) => started.cluster.generate({ prompt, maxTokens: 4 })))
    expect(answers.every(({ tokens }) => tokens[0]!.length === 4)).toBe(true)
    const peaks = [...started.bus.peakBytes].filter(([to]) => transferVerb(to) === "chunk").map(([, bytes]) => bytes)
    expect(peaks).toHaveLength(16)
    expect(Math.max(...peaks)).toBeGreaterThan(limits.kvChunkBytes)
    expect(Math.max(...peaks)).toBeLessThanOrEqual(limits.kvWindowBytes)
    expect(started.decode.worker.totals.fallbacks).toBe(0)
    await nothingLeft(started, listeners)
  })
})

describe("the disaggregated topology whose nats-server is killed while KV is on its way", () => {
  const tiny: TinyModelOptions = { layers: 4, hidden: 128, ffn: 256, context: 2048 }
  const requests = Array.from({ length: 6 }, (_, i) => ({ prompt: promptOf(400 + 200 * i), max_tokens: 40, ignore_eos: true, temperature: 1, seed: i }))
  let expected: ReadonlyArray<Awaited<ReturnType<typeof streamCompletion>>>
  let nats: Awaited<ReturnType<typeof startNats>>
  let node: Awaited<ReturnType<typeof startNode>>
  beforeAll(async () => {
    const single = await startNode({ tiny })
    expected = await Promise.all(requests.map((request) => streamCompletion(single, request)))
    await single.stop()
    nats = await startNats()
    node = await startNode({ tiny, preset: "disaggregated", change: (topology) => ({ ...topology, bus: { nats: { url: nats.server.url, token: nats.server.token } } }) })
  }, natsStartTimeoutMs)
  afterAll(async () => {
    await node?.stop()
    await nats?.stop()
  })

  interface Actors {
    readonly workers: ReadonlyArray<{ readonly load: { readonly sequences: number; readonly waiting: number }; readonly kv: { readonly blocks: number; readonly freeBlocks: number } }>
  }
  const workers = async () => ((await (await fetch(`${node.url}/actors`)).json()) as Actors).workers
  const until = async (holds: () => Promise<boolean>) => {
    while (!(await holds())) await new Promise((resolve) => setTimeout(resolve, 20))
  }

  it("gives the same tokens, or an error that names the hop, and frees every block", async () => {
    for (const afterMs of [50, 250]) {
      const running = requests.map((request) => streamCompletion(node, request).catch((error: Error) => error))
      await new Promise((resolve) => setTimeout(resolve, afterMs))
      const { pid } = nats.server
      process.kill(pid, "SIGKILL")
      const answers = await Promise.all(running)
      answers.forEach((answer, i) => {
        if (answer instanceof Error) expect(answer.message).toMatch(/request|scheduler|decode|prefill|worker|bus/)
        else expect(answer).toEqual(expected[i])
      })
      await until(async () => nats.server.pid !== pid && (await workers()).length === 2)
      await Promise.all(requests.slice(0, 2).map((request) => streamCompletion(node, request).catch(() => undefined)))
      await until(async () => (await workers()).every(({ load, kv }) => load.sequences + load.waiting === 0 && kv.freeBlocks === kv.blocks))
    }
    expect(await Promise.all(requests.map((request) => streamCompletion(node, request)))).toEqual(expected)
  }, 120_000)
})
