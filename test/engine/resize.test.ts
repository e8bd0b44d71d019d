/** An engine whose bounds change while it runs: batch and pool, over kernels whose every token depends on all KV before it. */
import { describe, expect, it } from "vitest"
import { Engine } from "../../actors/engine/engine.ts"
import type { GenerationSpec } from "../../actors/engine/sequence.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { FakeKernels, fakeToken } from "../support/fake-kernels.ts"
import { Generation, specOf, turn } from "../support/generation.ts"
import { randomNumbers } from "../support/tiny-model.ts"

const upTo = (count: number, from = 0): Array<number> => Array.from({ length: count }, (_, i) => from + i)
const blockTokens = 4

const start = (options: { readonly blocks?: number; readonly maxBatch?: number } = {}) => {
  const kernels = new FakeKernels({ blocks: options.blocks ?? 12, blockTokens, context: 48 })
  return new Engine(kernels, { name: "worker w0", maxBatch: options.maxBatch ?? 6, budget: { tokens: 9, mixedTokens: 7, outputs: 12 } })
}

const expectedTokens = ({ prompt, maxTokens, sampling: { seed } }: GenerationSpec, choice: number): Array<number> => {
  const tokens: Array<number> = []
  while (tokens.length < maxTokens) tokens.push(fakeToken([...prompt, ...tokens], { seed, choice }))
  return tokens
}

const expectWhole = ({ spec, tokens }: Generation) => expect(tokens).toEqual(upTo(spec.choices).map((choice) => expectedTokens(spec, choice)))

/** Reserves, begins, and waits until so many tokens have been drawn. */
const begun = async (engine: Engine, spec: GenerationSpec, tokens = 2): Promise<Generation> => {
  const generation = new Generation(engine, spec)
  void generation.run()
  while (generation.events.length < tokens && !generation.over) await turn()
  return generation
}

describe("a pool that shrinks", () => {
  it("forgets what was used least recently, and no more than it has to", async () => {
    const engine = start()
    await new Generation(engine, specOf("old", upTo(16, 10), { maxTokens: 1 })).run()
    await new Generation(engine, specOf("new", upTo(16, 100), { maxTokens: 1 })).run()
    const [old, young] = [engine.blocks.knownHashes().slice(0, 4), engine.blocks.knownHashes().slice(4)]
    engine.resize({ blocks: 6 })
    expect([engine.blocks.countPrefix(old), engine.blocks.countPrefix(young)]).toEqual([2, 4])
    expect(engine.blocks.available).toBe(6)
    engine.checkInvariants()
  })

  it("has the youngest wait, who goes on with the same tokens when there is room, and takes up at once what may be used again", async () => {
    const engine = start()
    const [older, younger] = [await begun(engine, specOf("older", upTo(14, 10), { maxTokens: 30 })), await begun(engine, specOf("younger", upTo(14, 200), { maxTokens: 12 }))]
    engine.resize({ blocks: 7 })
    while (!older.over && engine.load.waiting === 0) await turn()
    expect(engine.load).toMatchObject({ sequences: 1, waiting: 1 })
    expect(engine.blocks.excess).toBe(0)
    const before = younger.events.length
    for (let i = 0; i < 4; i++) await turn()
    expect(younger.events).toHaveLength(before)
    engine.resize({ blocks: 12 })
    while (engine.load.waiting > 0) await turn()
    expect(older.over).toBe(false) // nobody had to end for it
    await Promise.all([older.ended, younger.ended])
    for (const generation of [older, younger]) expectWhole(generation)
    engine.checkInvariants()
  })

  it("gets its blocks back although nobody computes, since all their readers are behind", async () => {
    const engine = start()
    const generations = [await begun(engine, specOf("older", upTo(14, 10), { maxTokens: 30 })), await begun(engine, specOf("younger", upTo(14, 200), { maxTokens: 9 }))]
    for (const generation of generations) generation.writable = false
    for (let i = 0; i < 4; i++) await turn()
    expect(engine.load).toMatchObject({ sequences: 2, waiting: 0 })
    engine.resize({ blocks: 8 })
    for (let i = 0; i < 4; i++) await turn()
    expect(engine.load).toMatchObject({ sequences: 1, waiting: 1 })
    expect(engine.blocks.excess).toBe(0)
    engine.resize({ blocks: 12 })
    for (const generation of generations) generation.writable = true
    engine.resume()
    for (const generation of generations) {
      await generation.ended
      expectWhole(generation)
    }
  })

  it("gives away what has grown too large for it, refuses what is, and goes on with the others", async () => {
    const engine = start()
    const large = await begun(engine, specOf("large", upTo(30, 10), { maxTokens: 18 }))
    const waiting = new Generation(engine, specOf("waiting", upTo(24, 300), { maxTokens: 2 }))
    void waiting.run()
    const small = new Generation(engine, specOf("small", upTo(6, 200), { maxTokens: 8 }))
    void small.run()
    engine.resize({ blocks: 5 })
    for (const generation of [large, waiting]) expect(await generation.ended).toMatchObject({ code: "moved", retryable: true, hop: "worker w0" })
    expect(await small.ended).toBeUndefined()
    expectWhole(small)
    expect(() => new Generation(engine, specOf("new", upTo(18), { maxTokens: 4 }))).toThrow("over the 20 tokens")
    expect(engine.blocks.available).toBe(5)
    engine.checkInvariants()
  })

  it("lets what was admitted with more room run on as long as it fits, and gives it away when it has outgrown the pool", async () => {
    const engine = start()
    const growing = await begun(engine, specOf("growing", upTo(10, 10), { maxTokens: 30 }))
    engine.resize({ blocks: 5 })
    expect(await growing.ended).toMatchObject({ code: "moved" })
    expect(growing.tokens[0]).toEqual(expectedTokens(growing.spec, 0).slice(0, 11)) // the 20 tokens of five blocks have KV, and drew one more
    engine.checkInvariants()
  })
})

describe("a batch that changes", () => {
  it("takes nobody's slot, admits nobody until there are fewer, and more as soon as it may", async () => {
    const engine = start({ maxBatch: 3 })
    const running = [await begun(engine, specOf("a", upTo(5, 10), { maxTokens: 20 })), await begun(engine, specOf("b", upTo(5, 100), { maxTokens: 30 }))]
    engine.resize({ maxBatch: 1 })
    const next = new Generation(engine, specOf("next", upTo(5, 200), { maxTokens: 4 }))
    void next.run()
    while (!running[0]!.over) {
      expect(engine.load).toMatchObject({ sequences: 2, waiting: 1 })
      await turn()
    }
    expect(engine.load).toMatchObject({ sequences: 1, waiting: 1 })
    engine.resize({ maxBatch: 2 })
    expect(await next.ended).toBeUndefined()
    expect(running[1]!.over).toBe(false)
    await running[1]!.ended
    for (const generation of [...running, next]) expectWhole(generation)
  })

  it("gives away a request whose choices will never have their slots, and the ones behind it get on", async () => {
    const engine = start({ maxBatch: 3 })
    const first = await begun(engine, specOf("first", upTo(5, 10), { maxTokens: 12 }))
    const wide = new Generation(engine, specOf("wide", upTo(5, 100), { maxTokens: 4, choices: 3 }))
    const behind = new Generation(engine, specOf("behind", upTo(5, 200), { maxTokens: 4 }))
    void wide.run()
    void behind.run()
    engine.resize({ maxBatch: 2 })
    expect(await wide.ended).toMatchObject({ code: "moved" })
    await Promise.all([first.ended, behind.ended])
    for (const generation of [first, behind]) expectWhole(generation)
    expect(() => new Generation(engine, specOf("late", upTo(5), { choices: 3 }))).toThrow("the 2 sequences that worker w0 decodes at once")
  })
})

it.each(upTo(30))("whoever is not given away gets the tokens they get alone, and no block is lost, however the bounds change (seed %i)", async (seed) => {
  const random = randomNumbers(seed)
  const below = (bound: number) => Math.floor(random() * bound)
  const engine = start({ blocks: 14 })
  const generations = new Set<Generation>()
  const client = async (index: number): Promise<void> => {
    for (let wait = below(40); wait > 0; wait--) await turn()
    const spec = specOf(`g${index}`, upTo(1 + below(20), 100 * below(4)), { choices: 1 + Math.floor(below(5) / 3), maxTokens: 1 + below(16), sampling: { ...specOf("", []).sampling, seed: below(5) } })
    try {
      const generation = new Generation(engine, spec)
      generations.add(generation)
      await generation.run()
    } catch (error) {
      expect(error).toBeInstanceOf(Fault) // it does not fit as the bounds are now
    }
  }
  let over = false
  const change = async (): Promise<void> => {
    while (!over) {
      engine.resize(random() < 0.7 ? { blocks: 3 + below(12) } : { maxBatch: 1 + below(6) })
      engine.checkInvariants()
      for (let wait = below(12); wait > 0; wait--) await turn()
    }
  }
  const changing = change()
  await Promise.all(upTo(12).map(client))
  over = true
  await changing
  let whole = 0
  for (const generation of generations) {
    const fault = await generation.ended
    if (fault === undefined) {
      whole++
      expectWhole(generation)
    } else {
      expect(fault).toMatchObject({ code: "moved" })
      generation.tokens.forEach((tokens, choice) => expect(tokens).toEqual(expectedTokens(generation.spec, choice).slice(0, tokens.length)))
    }
  }
  expect(whole).toBeGreaterThan(0)
  engine.checkInvariants()
  expect(engine.blocks.available).toBe(engine.blocks.limit)
})
