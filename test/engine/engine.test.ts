/** The engine over kernels whose every token depends on all KV before it, and over the real ones on a tiny model. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { Engine } from "../../actors/engine/engine.ts"
import type { ReturningKv } from "../../actors/engine/missing-kv.ts"
import type { GenerationSpec } from "../../actors/engine/sequence.ts"
import type { BlockHash } from "../../actors/messages/hashes.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { crc32c, Engine as Kernels } from "../../kernels/index.ts"
import { FakeKernels, fakeLogprob, fakeStopToken, fakeToken } from "../support/fake-kernels.ts"
import { Generation, specOf, turn } from "../support/generation.ts"
import { randomNumbers, writeTinyModel } from "../support/tiny-model.ts"

const budget = { tokens: 9, mixedTokens: 7, outputs: 12 }

const start = (options: { readonly blocks?: number; readonly blockTokens?: number; readonly context?: number; readonly maxBatch?: number } = {}) => {
  const kernels = new FakeKernels({ blocks: 12, blockTokens: 4, context: 48, ...options })
  const engine = new Engine(kernels, { name: "worker w0", maxBatch: options.maxBatch ?? 6, budget })
  return { kernels, engine }
}

/** The tokens of a choice by the definition: what is drawn after the prompt and everything so far. */
const expectedTokens = (spec: GenerationSpec, choice: number): Array<number> => {
  const tokens = [...(spec.delivered[choice] ?? [])]
  if (spec.finished.includes(choice)) return tokens
  while (tokens.length < spec.maxTokens) {
    const token = fakeToken([...spec.prompt, ...tokens], { seed: spec.sampling.seed, choice })
    tokens.push(token)
    if (spec.stopTokens.has(token)) break
  }
  return tokens
}

const expectIdle = (engine: Engine, kernels: FakeKernels): void => {
  engine.checkInvariants()
  expect(engine.requestIds).toEqual([])
  expect(engine.load).toMatchObject({ sequences: 0, waiting: 0 })
  expect(engine.blocks.available).toBe(engine.blocks.total)
  expect(kernels.samplers.size).toBe(0)
}

const upTo = (count: number, from = 0): Array<number> => Array.from({ length: count }, (_, i) => from + i)

describe("an engine over fake kernels", () => {
  it("draws what the tokens before say, chunk by chunk and token by token", async () => {
    const { engine, kernels } = start()
    const spec = specOf("a", upTo(23, 10), { maxTokens: 12 })
    const generation = await new Generation(engine, spec).run()
    expect(generation.tokens[0]).toEqual(expectedTokens(spec, 0))
    expect(generation.finishes).toEqual(["length"])
    expectIdle(engine, kernels)
  })

  it("ends a choice with the token that means the end, and others at their own length", async () => {
    const { engine, kernels } = start()
    let seed = 0
    const spec = () => specOf("a", upTo(5, 10), { maxTokens: 20, choices: 3, stopTokens: new Set([fakeStopToken]), sampling: { ...specOf("", []).sampling, seed } })
    while (expectedTokens(spec(), 1).at(-1) !== fakeStopToken) seed++
    const generation = await new Generation(engine, spec()).run()
    expect(generation.tokens).toEqual(upTo(3).map((choice) => expectedTokens(spec(), choice)))
    expect(generation.finishes[1]).toBe("stop")
    expectIdle(engine, kernels)
  })

  it("goes on with a generation that waits for blocks which are being written out, as soon as they are", async () => {
    const { engine, kernels } = start()
    await new Generation(engine, specOf("a", Array.from({ length: 44 }, (_, i) => i), { maxTokens: 1 })).run()
    const held = engine.hold(engine.blocks.knownHashes())
    expect(held.hashes).toHaveLength(11)
    const waits = new Generation(engine, specOf("b", Array.from({ length: 20 }, (_, i) => 100 + i), { maxTokens: 1 }))
    const run = waits.run()
    for (let i = 0; i < 5; i++) await turn()
    expect(engine.load).toMatchObject({ sequences: 0, waiting: 1 })
    held.release()
    await run
    expect(waits.tokens[0]).toEqual(expectedTokens(waits.spec, 0))
    expectIdle(engine, kernels)
  })

  it("computes a prompt once for all its choices, on shared blocks", async () => {
    const { engine, kernels } = start()
    const generation = await new Generation(engine, specOf("a", upTo(18, 10), { maxTokens: 3, choices: 4 })).run()
    expect(new Set(generation.tokens.map(String)).size).toBe(4)
    expect(engine.counters).toMatchObject({ promptTokens: 18, outputTokens: 12 })
    expect(kernels.steps).toBe(4) // two chunks of the prompt, and one for each token after the first
    expectIdle(engine, kernels)
  })

  it("goes on with choices that share their last block although the pool has no block left for a copy", async () => {
    const { engine, kernels } = start({ blocks: 2, context: 8 })
    const spec = specOf("a", upTo(6, 10), { maxTokens: 2, choices: 2 })
    const generation = await new Generation(engine, spec).run()
    expect(generation.tokens).toEqual([expectedTokens(spec, 0), expectedTokens(spec, 1)])
    expect(engine.load.preemptions).toBeGreaterThan(0)
    expectIdle(engine, kernels)
  })

  it("goes on with many resumed choices that do not fit the pool together", async () => {
    const { engine, kernels } = start()
    const fresh = specOf("a", upTo(20, 10), { maxTokens: 16, choices: 4 })
    const delivered = upTo(4).map((choice) => Int32Array.from(expectedTokens(fresh, choice).slice(0, 5 * choice)))
    const spec = { ...fresh, delivered }
    const other = specOf("b", upTo(30, 500), { maxTokens: 10 })
    const [generation, second] = await Promise.all([new Generation(engine, spec).run(), new Generation(engine, other).run()])
    expect(generation.tokens).toEqual(upTo(4).map((choice) => expectedTokens(fresh, choice)))
    expect(second.tokens[0]).toEqual(expectedTokens(other, 0))
    expectIdle(engine, kernels)
  })

  it("leaves finished choices of a resumed generation alone", async () => {
    const { engine, kernels } = start()
    const fresh = specOf("a", upTo(9, 10), { maxTokens: 6, choices: 3 })
    const delivered = upTo(3).map((choice) => Int32Array.from(expectedTokens(fresh, choice).slice(0, 2)))
    const generation = await new Generation(engine, { ...fresh, delivered, finished: [1] }).run()
    expect(generation.tokens).toEqual([expectedTokens(fresh, 0), expectedTokens(fresh, 1).slice(0, 2), expectedTokens(fresh, 2)])
    expect(generation.finishes).toEqual(["length", "", "length"])
    expectIdle(engine, kernels)
  })

  it("computes a prompt without drawing where no tokens are asked for", async () => {
    const { engine, kernels } = start()
    const generation = await new Generation(engine, specOf("a", upTo(11, 10), { maxTokens: 0, choices: 2, promptLogprobs: true, logprobs: 0 })).run()
    expect(generation.tokens).toEqual([[], []])
    expect([...generation.scores.keys()]).toEqual(upTo(10, 1))
    expectIdle(engine, kernels)
  })

  it("scores every token of a prompt although its first blocks are known, also when it is preempted on the way", async () => {
    const { engine, kernels } = start()
    const prompt = upTo(30, 10)
    const older = new Generation(engine, specOf("older", upTo(12, 700), { maxTokens: 30 }))
    const scored = new Generation(engine, specOf("scored", prompt, { maxTokens: 2, promptLogprobs: true, logprobs: 1 }))
    await Promise.all([older.run(), scored.run()])
    expect([...scored.scores]).toEqual(prompt.slice(1).map((token, i) => [i + 1, Math.fround(fakeLogprob(prompt.slice(0, i + 1), token))]))
    expect(scored.cachedTokens).toBe(0)
    expectIdle(engine, kernels)
  })

  it("finds the prefix of an earlier generation, and the last token is computed all the same", async () => {
    const { engine, kernels } = start()
    const spec = specOf("a", upTo(16, 10), { maxTokens: 3 })
    expect((await new Generation(engine, spec).run()).cachedTokens).toBe(0)
    const again = await new Generation(engine, { ...spec, id: "b" }).run()
    expect(again.cachedTokens).toBe(12)
    expect(again.tokens[0]).toEqual(expectedTokens(spec, 0))
    const strange = await new Generation(engine, { ...spec, id: "c", hashRoot: "another tenant's" }).run()
    expect(strange.cachedTokens).toBe(0)
    expectIdle(engine, kernels)
  })

  it("computes once what several prompts begin with, though they come at the same moment", async () => {
    const { engine, kernels } = start({ blocks: 40 })
    const specs = [upTo(4, 30), upTo(2, 40), []].map((rest, i) => specOf(`g${i}`, [...upTo(18, 10), ...rest], { maxTokens: 3 }))
    const generations = specs.map((spec) => new Generation(engine, spec))
    await Promise.all(generations.map((generation) => generation.run()))
    expect(generations.map(({ tokens }) => tokens[0])).toEqual(specs.map((spec) => expectedTokens(spec, 0)))
    // The first four full blocks, by the two that come later.
    expect(engine.counters).toMatchObject({ promptTokens: 22 + 20 + 18, cachedTokens: 2 * 16 })
    expectIdle(engine, kernels)
  })

  it("does not wait for a prompt that is given up", async () => {
    const { engine, kernels } = start({ blocks: 40 })
    const spec = (id: string) => specOf(id, upTo(30, 10), { maxTokens: 4 })
    const first = new Generation(engine, spec("first"))
    const second = new Generation(engine, spec("second"))
    const running = [first.run(), second.run()]
    await turn()
    engine.cancel("first")
    await running[1]
    expect(second.tokens[0]).toEqual(expectedTokens(spec("second"), 0))
    await running[0]
    expectIdle(engine, kernels)
  })

  it("takes imported blocks for computed ones until the prefill begins, in order only", async () => {
    const donor = start()
    const spec = specOf("a", upTo(18, 10), { maxTokens: 4 })
    const waiting = new Generation(donor.engine, spec)
    await waiting.reserved
    const { hashes } = donor.engine.missingBlocks("a")
    await waiting.run()
    const held = donor.engine.hold(hashes)
    expect(held.hashes).toEqual(hashes)
    const oneBlock = (place: number) => ({ firstLayer: 0, layers: 1, firstBlock: place, blocks: 1 })
    const blocks = hashes.map((_, place) => {
      const bytes = new Uint8Array(donor.kernels.info.blockBytes)
      return { bytes, crc: held.at(upTo(hashes.length)).write(oneBlock(place), bytes, 0, 0) }
    })
    held.release()
    expectIdle(donor.engine, donor.kernels)

    const { engine, kernels } = start()
    const generation = new Generation(engine, spec)
    await generation.reserved
    expect(engine.missingBlocks("a")).toEqual({ from: 0, hashes })
    const take = (place: number) => engine.reserved("a").take(oneBlock(place), blocks[place]!.bytes, 0, blocks[place]!.crc)
    expect(upTo(3).map(take)).toEqual([true, true, true])
    expect([engine.acceptPrefix("a", 1, 2), engine.acceptPrefix("a", 0, 3), engine.acceptPrefix("a", 3, 9)]).toEqual([false, true, false])
    generation.prefill()
    expect(() => take(3)).toThrow(/no reservation/)
    expect(engine.acceptPrefix("a", 3, 1)).toBe(false)
    await generation.ended
    expect(generation.cachedTokens).toBe(12)
    expect(generation.tokens[0]).toEqual(expectedTokens(spec, 0))
    expectIdle(engine, kernels)
  })

  it("lets others run while a reader is behind, also with the blocks that its sequence holds, and goes on where it was", async () => {
    const { engine, kernels } = start()
    const slow = new Generation(engine, specOf("slow", upTo(20, 10), { maxTokens: 20 }))
    slow.onToken = () => (slow.writable = false)
    await slow.reserved
    slow.prefill()
    while (slow.events.length === 0) await turn()
    const others = await Promise.all(upTo(4).map((i) => new Generation(engine, specOf(`other ${i}`, upTo(20, 100 * i), { maxTokens: 24 })).run()))
    for (const other of others) expect(other.tokens[0]).toEqual(expectedTokens(other.spec, 0))
    expect(slow.events).toHaveLength(1)
    slow.onToken = () => {}
    slow.writable = true
    engine.resume()
    await slow.ended
    expect(slow.tokens[0]).toEqual(expectedTokens(slow.spec, 0))
    expectIdle(engine, kernels)
  })

  it("frees everything of a generation that is cancelled: waiting, reserved, in prefill, in a step, preempted or paused", async () => {
    const { engine, kernels } = start({ maxBatch: 3 })
    const reserved = new Generation(engine, specOf("reserved", upTo(8, 10)))
    await reserved.reserved
    const running = new Generation(engine, specOf("running", upTo(8, 100), { maxTokens: 40, choices: 2 }))
    await running.reserved
    const waiting = new Generation(engine, specOf("waiting", upTo(8, 200)))
    running.prefill()
    while (running.events.length < 5) await turn()
    await new Promise<void>((resolve) => {
      kernels.pause = () => {
        resolve()
        return turn()
      }
    }) // a step is in flight now
    for (const { spec } of [waiting, reserved, running]) engine.cancel(spec.id)
    const faults = await Promise.all([reserved.ended, running.ended, waiting.ended])
    expect(faults.map((fault) => fault?.code)).toEqual(["cancelled", "cancelled", "cancelled"])
    engine.cancel("running")
    while (engine.requestIds.length > 0) await turn()
    expectIdle(engine, kernels)
  })

  it("ends one choice by request while the others go on", async () => {
    const { engine, kernels } = start()
    const spec = specOf("a", upTo(8, 10), { maxTokens: 12, choices: 3 })
    const generation = new Generation(engine, spec)
    generation.onToken = ({ choice, index }) => {
      if (choice === 1 && index === 3) engine.finish("a", 1)
    }
    await generation.run()
    expect(generation.tokens).toEqual([expectedTokens(spec, 0), expectedTokens(spec, 1).slice(0, 4), expectedTokens(spec, 2)])
    expectIdle(engine, kernels)
  })

  it("refuses what can never fit, by name, and what its kernels refuse, before anybody else is harmed", async () => {
    const { engine, kernels } = start({ blocks: 6 })
    const other = new Generation(engine, specOf("other", upTo(4, 10), { maxTokens: 15 }))
    const refusal = (spec: GenerationSpec): Fault => {
      try {
        new Generation(engine, spec)
      } catch (error) {
        return error as Fault
      }
      throw new Error("it was not refused")
    }
    const { sampling } = specOf("", [])
    expect(refusal(specOf("a", upTo(40), { maxTokens: 9 })).message).toContain("over the context of 48")
    expect(refusal(specOf("a", upTo(20), { maxTokens: 9 })).message).toContain("over the 24 tokens that the KV pool of worker w0 holds")
    expect(refusal(specOf("a", [1], { choices: 7 }))).toMatchObject({ code: "invalid_request", param: "n" })
    expect(refusal(specOf("a", []))).toMatchObject({ code: "invalid_request", param: "prompt" })
    expect(refusal(specOf("a", [1, 1000])).message).toContain("token 1000 is not in the vocabulary")
    expect(refusal(specOf("a", [1], { delivered: [Int32Array.of(-1)] })).message).toContain("token -1 is not in the vocabulary")
    expect(refusal(specOf("a", [1], { delivered: [Int32Array.of(1), Int32Array.of(1)] })).message).toContain("the tokens of 1 choices")
    expect(refusal(specOf("a", [1], { delivered: [Int32Array.from(upTo(9))] })).message).toContain("at most 8 of each")
    expect(refusal(specOf("a", [1], { sampling: { ...sampling, logitBias: [[1000, 1]] } })).message).toContain("logitBias: token 1000")
    expect(refusal(specOf("a", [1], { sampling: { ...sampling, minTokens: 1 }, suppressedTokens: upTo(1000) })).message).toContain("every token")
    expect(refusal(specOf("other", [1])).message).toContain("exists already")
    expect((await other.run()).tokens[0]).toEqual(expectedTokens(other.spec, 0))
    expectIdle(engine, kernels)
  })

  it("fails everybody with a retryable fault when a step fails, says that it is broken, and takes nothing more", async () => {
    const { engine, kernels } = start()
    const generations = upTo(3).map((i) => new Generation(engine, specOf(`g${i}`, upTo(8, 10 * i), { maxTokens: 30 })))
    await Promise.all(generations.map(({ reserved }) => reserved))
    for (const generation of generations.slice(0, 2)) generation.prefill()
    while (generations[0]!.events.length < 3) await turn()
    kernels.failure = new Error("the device is gone")
    expect((await engine.broken).message).toBe("the device is gone")
    const faults = await Promise.all(generations.map(({ ended }) => ended))
    for (const fault of faults) expect(fault).toMatchObject({ code: "disconnected", retryable: true })
    expect(() => new Generation(engine, specOf("late", [1]))).toThrow("is stopping")
    engine.checkInvariants()
    await engine.close()
  })

  it("counts its blocks when it has nothing to do, and says that it is broken where one is lost", async () => {
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] })
    try {
      const { engine } = start()
      const counted = vi.spyOn(engine, "checkInvariants")
      const idle = async () => {
        await turn()
        vi.advanceTimersByTime(limits.idleCheckMs)
        await turn()
      }
      await new Generation(engine, specOf("a", upTo(8, 10))).run()
      expect(counted).not.toHaveBeenCalled()
      await idle()
      await idle()
      expect(counted).toHaveBeenCalledTimes(1)
      await new Generation(engine, specOf("b", upTo(8, 10))).run()
      engine.blocks.allocate() // nobody's
      await idle()
      expect((await engine.broken).message).toMatch(/block \d+ has 0 holders but 1 references/)
      expect(() => new Generation(engine, specOf("late", [1]))).toThrow("is stopping")
    } finally {
      vi.useRealTimers()
    }
  })

  it("tells everybody when it is closed, after the step in flight", async () => {
    const { engine, kernels } = start()
    const generation = new Generation(engine, specOf("a", upTo(8, 10), { maxTokens: 30 }))
    await generation.reserved
    generation.prefill()
    while (generation.events.length < 3) await turn()
    await engine.close()
    expect(await generation.ended).toMatchObject({ code: "shutting_down", retryable: true })
    expectIdle(engine, kernels)
  })
})

/** Requests of all kinds from a seed; `solo` gives what each gets alone. */
const randomSpec = (id: string, random: () => number, solo: (spec: GenerationSpec, choice: number) => ReadonlyArray<number>): GenerationSpec => {
  const below = (bound: number) => Math.floor(random() * bound)
  const family = below(3)
  const prompt = [...upTo(below(20), 100 * family), ...upTo(1 + below(12), random() < 0.5 ? 50 : 3 + below(900))]
  const choices = random() < 0.3 ? 2 + below(2) : 1
  const spec = specOf(id, prompt, {
    choices,
    maxTokens: random() < 0.05 ? 0 : 1 + below(48 - prompt.length > 16 ? 16 : 48 - prompt.length),
    sampling: { ...specOf("", []).sampling, seed: below(5) },
    stopTokens: random() < 0.5 ? new Set([fakeStopToken]) : new Set(),
    promptLogprobs: random() < 0.15,
    logprobs: below(4) - 1,
  })
  if (random() < 0.7 || spec.maxTokens === 0) return spec
  const delivered = upTo(choices).map((choice) => Int32Array.from(solo(spec, choice).slice(0, below(spec.maxTokens + 1))))
  const isFinished = (tokens: Int32Array) => tokens.length >= spec.maxTokens || (tokens.length > 0 && spec.stopTokens.has(tokens.at(-1)!))
  const finished = upTo(choices).filter((choice) => isFinished(delivered[choice]!))
  return finished.length === choices ? spec : { ...spec, delivered, finished }
}

describe("a sequence that was preempted", () => {
  const oneBlock = (place: number) => ({ firstLayer: 0, layers: 1, firstBlock: place, blocks: 1 })
  /** A younger sequence that gave way to an older one and has blocks again; of its blocks all but the first are lost. */
  const returned = async () => {
    const kernels = new FakeKernels({ blocks: 12, blockTokens: 4, context: 48 })
    const parked: Array<ReadonlyArray<BlockHash>> = []
    const returning: Array<ReturningKv> = []
    const engine = new Engine(kernels, { name: "worker w0", maxBatch: 4, budget, onPreempt: (hashes) => void parked.push(hashes), onReturn: (missing) => void returning.push(missing) })
    const older = new Generation(engine, specOf("older", upTo(12, 500), { maxTokens: 36 }))
    const younger = new Generation(engine, specOf("younger", upTo(15, 10), { maxTokens: 20 }))
    const runs = [older.run(), younger.run()]
    while (returning.length === 0) await turn()
    const [missing] = returning
    const bytesOf = (place: number) => new Uint8Array(Int32Array.from([...younger.spec.prompt, ...younger.tokens[0]!].slice(4 * place, 4 * place + 4)).buffer)
    const take = (place: number) => missing!.blocks.take(oneBlock(place), bytesOf(place), 0, crc32c(bytesOf(place), 0))
    return { engine, kernels, older, younger, runs, parked, missing: missing!, take }
  }

  it("says what it gives away, and is in no batch until what it lacks has come, which it does not compute again", async () => {
    const { engine, kernels, younger, runs, parked, missing, take } = await returned()
    expect(parked[0]!.length).toBeGreaterThan(3)
    expect(missing.hashes.length).toBeGreaterThan(0)
    expect(parked[0]).toEqual(expect.arrayContaining([...missing.hashes]))
    const drawn = younger.events.length
    for (let i = 0; i < 20; i++) await turn()
    expect(younger.events).toHaveLength(drawn)
    missing.hashes.forEach((_, i) => expect(take(missing.from + i)).toBe(true))
    expect(missing.accept(missing.hashes.length)).toBe(true)
    const { steps } = kernels
    missing.settle()
    await runs[1]
    expect(younger.tokens[0]).toEqual(expectedTokens(younger.spec, 0))
    // One for each token that was left, since only those of its last block were to be computed.
    expect(kernels.steps - steps).toBe(20 - drawn)
    await runs[0]
    expectIdle(engine, kernels)
  })

  it("computes what does not come", async () => {
    const { engine, kernels, younger, runs, missing, take } = await returned()
    expect(take(missing.from)).toBe(true)
    missing.settle()
    expect(() => take(missing.from)).toThrow("has given its blocks away")
    expect(missing.accept(1)).toBe(false)
    await Promise.all(runs)
    expect(younger.tokens[0]).toEqual(expectedTokens(younger.spec, 0))
    expectIdle(engine, kernels)
  })

  it("takes nothing more from the moment that it is cancelled", async () => {
    const { engine, kernels, runs, missing, take } = await returned()
    engine.cancel("younger")
    expect(() => take(missing.from)).toThrow("has given its blocks away")
    expect(missing.accept(1)).toBe(false)
    missing.settle()
    await Promise.all(runs)
    expectIdle(engine, kernels)
  })
})

describe("a crowd over fake kernels and a pool far too small for it", () => {
  let preemptions = 0
  let restored = 0
  afterAll(() => {
    expect(preemptions).toBeGreaterThan(40)
    expect(restored).toBeGreaterThan(10)
  })

  it.each(upTo(40))("gives everybody the tokens they get alone and loses no block (seed %i)", async (seed) => {
    const random = randomNumbers(seed)
    const below = (bound: number) => Math.floor(random() * bound)
    const store = new Map<BlockHash, Uint8Array>()
    const fresh: Array<BlockHash> = []
    const kernels = new FakeKernels({ blocks: 12 + below(8), blockTokens: 4, context: 48 })
    if (random() < 0.5) kernels.pause = () => Promise.resolve()
    /** Brings what is stored, sooner or later, or nothing; what gives way meanwhile takes nothing more. */
    const bring = async (missing: ReturningKv): Promise<void> => {
      for (let wait = below(6); wait > 0; wait--) await turn()
      let blocks = 0
      try {
        for (const [i, hash] of missing.hashes.entries()) {
          const bytes = store.get(hash)
          if (bytes === undefined) break
          missing.blocks.take({ firstLayer: 0, layers: 1, firstBlock: missing.from + i, blocks: 1 }, bytes, 0, crc32c(bytes, 0))
          blocks++
          if (random() < 0.3) await turn()
        }
        if (blocks > 0 && missing.accept(blocks)) restored += blocks
      } catch (error) {
        expect((error as Fault).code).toBe("unavailable")
      }
      missing.settle()
    }
    const engine = new Engine(kernels, { name: "worker w0", maxBatch: 6, budget, events: { stored: (hash) => fresh.push(hash), removed: () => {} }, onReturn: (missing) => void bring(missing) })
    const generations: Array<Generation> = []
    const cut = new Set<Generation>() // cancelled, or ended by request
    const live = new Set<Generation>()

    const client = async (index: number): Promise<void> => {
      for (let wait = below(60); wait > 0; wait--) await turn()
      const generation = new Generation(engine, randomSpec(`g${index}`, random, expectedTokens))
      generations.push(generation)
      live.add(generation)
      await Promise.race([generation.reserved, generation.ended])
      for (let wait = below(4); wait > 0; wait--) await turn()
      const { from, hashes } = engine.missingBlocks(generation.spec.id)
      for (const [i, hash] of hashes.entries()) {
        const bytes = store.get(hash)
        if (bytes === undefined || generation.over) break
        engine.reserved(generation.spec.id).take({ firstLayer: 0, layers: 1, firstBlock: from + i, blocks: 1 }, bytes, 0, crc32c(bytes, 0))
        if (!engine.acceptPrefix(generation.spec.id, from + i, 1)) break
        if (random() < 0.3) await turn()
      }
      if (!generation.over) generation.prefill()
      await generation.ended
      live.delete(generation)
    }
    let over = false
    const disturb = async (): Promise<void> => {
      while (!over) {
        await turn()
        for (const hash of fresh.splice(0)) {
          const held = engine.hold([hash])
          if (held.hashes.length > 0) {
            const bytes = new Uint8Array(kernels.info.blockBytes)
            held.at([0]).write({ firstLayer: 0, layers: 1, firstBlock: 0, blocks: 1 }, bytes, 0, 0)
            store.set(hash, bytes)
          }
          held.release()
        }
        const chosen = [...live][below(live.size)]
        const dice = random()
        if (chosen === undefined) continue
        if (dice < 0.02) {
          cut.add(chosen)
          engine.cancel(chosen.spec.id)
        } else if (dice < 0.04 && chosen.events.length > 0) {
          cut.add(chosen)
          engine.finish(chosen.spec.id, below(chosen.spec.choices))
        } else if (dice < 0.2) {
          chosen.writable = false
        } else if (dice < 0.6) {
          for (const generation of live) generation.writable = true
          engine.resume()
        }
      }
    }
    const disturbing = disturb()
    await Promise.all(upTo(40).map(client))
    over = true
    await disturbing

    for (const generation of generations) {
      const { spec, tokens } = generation
      const expected = upTo(spec.choices).map((choice) => expectedTokens(spec, choice))
      if (cut.has(generation)) expect(expected.map((list, choice) => list.slice(0, tokens[choice]!.length))).toEqual(tokens)
      else expect(tokens, spec.id).toEqual(expected)
      if (!cut.has(generation) && spec.promptLogprobs) expect([...generation.scores.keys()].sort((a, b) => a - b)).toEqual(upTo(spec.prompt.length - 1, 1))
    }
    preemptions += engine.load.preemptions
    expectIdle(engine, kernels)
    await engine.close()
  })
})

describe("a crowd over the real kernels", () => {
  let folder: string
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "penstock-crowd-"))
    await writeTinyModel(join(folder, "tiny.gguf"))
  })
  afterAll(() => rm(folder, { recursive: true, force: true }))

  const load = (blocks: number) => Kernels.load({ path: join(folder, "tiny.gguf"), blocks, blockTokens: 8, threads: 1, maxRows: 64, maxOutputs: 64, maxContext: 128 })
  const specs = upTo(16).map((i) =>
    specOf(`g${i}`, [...upTo(i % 2 === 0 ? 24 : 3, 20), ...upTo(1 + (5 * i) % 17, 3 + i)], {
      maxTokens: 10 + i,
      choices: i % 5 === 0 ? 3 : 1,
      logprobs: i % 3,
      promptLogprobs: i % 7 === 0,
      sampling: { ...specOf("", []).sampling, temperature: i % 3 === 0 ? 0 : 1, seed: i, repetitionPenalty: i % 4 === 0 ? 1.2 : 1 },
    }),
  )
  const answer = ({ tokens, events, scores }: Generation) => ({ tokens, scores: [...scores], events: [...events].sort((a, b) => a.choice - b.choice || a.index - b.index) })

  it("gives everybody the tokens and log probabilities they get alone, preempted, resumed or from a known prefix", async () => {
    const kernels = await load(24)
    const engine = new Engine(kernels, { name: "worker w0", maxBatch: 8, budget: { tokens: 24, mixedTokens: 16, outputs: 64 } })
    const alone: Array<ReturnType<typeof answer>> = []
    for (const spec of specs) alone.push(answer(await new Generation(engine, spec).run()))
    const crowd = await Promise.all(specs.map((spec) => new Generation(engine, { ...spec, id: `${spec.id} again` }).run()))
    expect(crowd.map(answer)).toEqual(alone)
    expect(engine.load.preemptions).toBeGreaterThan(0)

    const resumed = await Promise.all(
      specs.map(async (spec, i) => {
        const delivered = alone[i]!.tokens.map((tokens, choice) => Int32Array.from(tokens.slice(0, (i + 3 * choice) % spec.maxTokens)))
        return new Generation(engine, { ...spec, id: `${spec.id} resumed`, promptLogprobs: false, delivered }).run()
      }),
    )
    expect(resumed.map(({ tokens }) => tokens)).toEqual(alone.map(({ tokens }) => tokens))
    engine.checkInvariants()
    expect(engine.blocks.available).toBe(engine.blocks.total)
    expect(kernels.samplers).toBe(0)
    await engine.close()
    await kernels.close()
  })

  it("fails everybody with a retryable fault when the kernels are gone", async () => {
    const kernels = await load(64)
    const engine = new Engine(kernels, { name: "worker w0", maxBatch: 8 })
    const generations = upTo(3).map((i) => new Generation(engine, specOf(`g${i}`, upTo(8, 3 + i), { maxTokens: 90 })))
    const running = generations.map((generation) => generation.run())
    while (generations.some(({ events }) => events.length < 3)) await turn()
    await kernels.close()
    for (const generation of await Promise.all(running)) expect(await generation.ended).toMatchObject({ code: "disconnected", retryable: true })
    expect((await engine.broken).message).toContain("closed")
    await engine.close()
  })
})
