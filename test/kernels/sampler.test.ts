import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { Engine, type SamplerOptions } from "../../kernels/index.ts"
import { referenceLogSoftmax } from "../support/reference-forward.ts"
import { generate, greedy, Sequence } from "../support/sequence.ts"
import { randomNumbers, writeTinyModel } from "../support/tiny-model.ts"

// Two blocks of 1024 ids and a remainder, so that every path over a vocabulary is taken.
const vocabulary = 2500
const maxOutputs = 256
const prompt = [1, 40, 77, 260, 300, 12]

let folder: string
let engine: Engine

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-sampler-"))
  const path = join(folder, "tiny.gguf")
  await writeTinyModel(path, { vocabulary, types: "Q8_0" })
  engine = await Engine.load({ path, blocks: 16, blockTokens: 16, threads: 2, maxRows: 64, maxOutputs })
})

afterAll(async () => {
  await engine.close()
  await rm(folder, { recursive: true })
})

/** Raw logits after the tokens: [vocabulary]. */
const logitsAfter = async (tokens: ReadonlyArray<number>): Promise<Float32Array> => (await new Sequence(engine).feed(tokens, [{ row: -1 }], true)).logits!

/** What `count` samplers draw after the prompt; the choice is the sampler's index. */
const drawMany = async (options: SamplerOptions, count: number): Promise<Array<number>> => {
  const drawn: Array<number> = []
  while (drawn.length < count) {
    const samplers = Array.from({ length: Math.min(maxOutputs, count - drawn.length) }, (_, i) =>
      engine.createSampler({ ...options, choice: drawn.length + i }, Int32Array.from(prompt), new Int32Array(0)),
    )
    const { tokens } = await new Sequence(engine).feed(prompt, samplers.map((sampler) => ({ row: -1, sampler })))
    drawn.push(...tokens)
    for (const sampler of samplers) engine.freeSampler(sampler)
  }
  return drawn
}

const drawOne = async (options: SamplerOptions): Promise<number> => (await generate(engine, options, prompt, [], 1))[0]!

/** Ids by (logit descending, id ascending). */
const ranked = (logits: ArrayLike<number>): Array<number> => Array.from(logits, (_, id) => id).sort((a, b) => logits[b]! - logits[a]! || a - b)

/** Probabilities at a temperature, in float64. */
const probabilities = (logits: Float32Array, temperature: number): Float64Array =>
  referenceLogSoftmax(Float64Array.from(logits, (logit) => logit / temperature)).map(Math.exp)

/** The smallest set of the most likely tokens whose probability reaches p. */
const nucleus = (p: number, chances: Float64Array, order: ReadonlyArray<number>): Set<number> => {
  const kept = new Set<number>()
  let sum = 0
  for (const id of order) {
    if (sum >= p) break
    kept.add(id)
    sum += chances[id]!
  }
  return kept
}

/**
 * Pearson's statistic of the counts against the chances, in standard deviations from its mean; tokens that are expected
 * fewer than five times count together.
 */
const deviation = (drawn: ReadonlyArray<number>, chances: ReadonlyMap<number, number>): number => {
  const counts = new Map<number, number>()
  for (const token of drawn) counts.set(token, (counts.get(token) ?? 0) + 1)
  const cells: Array<readonly [observed: number, expected: number]> = []
  let rare: [number, number] = [0, 0]
  for (const [token, chance] of chances) {
    const cell = [counts.get(token) ?? 0, chance * drawn.length] as const
    if (cell[1] >= 5) cells.push(cell)
    else rare = [rare[0] + cell[0], rare[1] + cell[1]]
  }
  if (rare[1] > 0) cells.push(rare)
  const statistic = cells.reduce((sum, [observed, expected]) => sum + (observed - expected) ** 2 / expected, 0)
  return (statistic - (cells.length - 1)) / Math.sqrt(2 * (cells.length - 1))
}

/** The chances of the kept tokens, which add up to 1. */
const renormalised = (kept: Iterable<number>, chances: Float64Array): Map<number, number> => {
  const ids = [...kept]
  const total = ids.reduce((sum, id) => sum + chances[id]!, 0)
  return new Map(ids.map((id) => [id, chances[id]! / total]))
}

describe("the most likely token", () => {
  test("temperature 0 draws the greatest logit at every position, and the output varies", async () => {
    const output = await generate(engine, greedy, prompt, [], 40)
    for (const length of [0, 1, 7, 39]) expect(output[length]).toBe(ranked(await logitsAfter([...prompt, ...output.slice(0, length)]))[0])
    expect(new Set(output).size).toBeGreaterThan(8)
  })

  test("top-k of 1, a tiny top-p, a min-p of 1 and a tiny temperature all equal it", async () => {
    const expected = await generate(engine, greedy, prompt, [], 20)
    const warm = { ...greedy, temperature: 1, seed: 3 }
    for (const options of [{ ...warm, topK: 1 }, { ...warm, topP: 1e-6 }, { ...warm, minP: 1 }, { ...warm, temperature: 1e-5 }, { ...warm, temperature: 1e-30 }]) {
      expect(await generate(engine, options, prompt, [], 20)).toEqual(expected)
    }
  })

  test("equal logits: the lowest id wins", async () => {
    const path = join(folder, "ties.gguf")
    await writeTinyModel(path, { types: "F32", tied: false, alter: (name, weights) => void (name === "output.weight" && weights.fill(0.25)) })
    const ties = await Engine.load({ path, blocks: 2, blockTokens: 16, threads: 1, maxRows: 8, maxOutputs: 4 })
    const first = await new Sequence(ties).feed(prompt, [{ row: -1, sampler: ties.createSampler(greedy, Int32Array.from(prompt), new Int32Array(0)), top: 3 }])
    expect([first.tokens[0], ...first.topTokens]).toEqual([0, 0, 1, 2])
    const options = { ...greedy, temperature: 1, topK: 2 }
    const sampler = ties.createSampler(options, Int32Array.from(prompt), new Int32Array(0))
    const second = await new Sequence(ties).feed(prompt, [{ row: -1, sampler }])
    expect([0, 1]).toContain(second.tokens[0])
    await ties.close()
  })
})

/** Philox 4x32-10 (Salmon et al. 2011) by its definition: the first two words. */
const philox = (counter: readonly [number, number, number, number], key: readonly [number, number]): ReadonlyArray<number> => {
  let [a, b, c, d] = counter.map(BigInt) as [bigint, bigint, bigint, bigint]
  let [k0, k1] = key.map(BigInt) as [bigint, bigint]
  const low = 0xffffffffn
  for (let round = 0; round < 10; round++) {
    const p0 = a * 0xd2511f53n
    const p1 = c * 0xcd9e8d57n
    ;[a, b, c, d] = [(p1 >> 32n) ^ b ^ k0, p1 & low, (p0 >> 32n) ^ d ^ k1, p0 & low]
    k0 = (k0 + 0x9e3779b9n) & low
    k1 = (k1 + 0xbb67ae85n) & low
  }
  return [a, b, c, d].map(Number)
}

const uniform = (seed: number, choice: number, position: number): number => {
  const [w0, w1] = philox([position, 0, choice, 0], [seed % 2 ** 32, Math.floor(seed / 2 ** 32)]) as [number, number]
  return ((w0 >>> 5) * 2 ** 26 + (w1 >>> 6)) / 2 ** 53
}

describe("the random draw", () => {
  test("Philox 4x32-10 gives the published answers", () => {
    expect(philox([0, 0, 0, 0], [0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8])
    expect(philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0])).toEqual([0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1])
  })

  test("each draw inverts the distribution at the number of (seed, choice, position)", async () => {
    const chances = probabilities(await logitsAfter(prompt), 1)
    for (const seed of [0, 1, 2 ** 32 + 5, 2 ** 53 - 1]) {
      const drawn = await drawMany({ ...greedy, temperature: 1, seed }, 500)
      drawn.forEach((token, choice) => {
        const u = uniform(seed, choice, prompt.length)
        const before = chances.slice(0, token).reduce((sum, chance) => sum + chance, 0)
        expect(u).toBeGreaterThanOrEqual(before - 1e-6)
        expect(u).toBeLessThan(before + chances[token]! + 1e-6)
      })
    }
  })

  test("frequencies follow the softmax at each temperature", async () => {
    const logits = await logitsAfter(prompt)
    for (const temperature of [0.7, 1, 1.5]) {
      const drawn = await drawMany({ ...greedy, temperature, seed: 17 }, 4096)
      const chances = probabilities(logits, temperature)
      expect(Math.abs(deviation(drawn, new Map(chances.entries())))).toBeLessThan(4)
      // The test itself sees a distribution that is a little off.
      const other = probabilities(logits, temperature * 1.15)
      expect(deviation(drawn, new Map(other.entries()))).toBeGreaterThan(4)
    }
  }, 30_000)

  test("a resumed sequence continues identically, whatever the filters and penalties", async () => {
    const random: SamplerOptions = { ...greedy, temperature: 1, seed: 2 ** 52 + 12345, choice: 3 }
    for (const options of [
      random,
      { ...random, topK: 20, topP: 0.95 },
      { ...random, topP: 0.8, minP: 0.01 },
      { ...random, repetitionPenalty: 1.3, presencePenalty: 0.5, frequencyPenalty: 0.25, minP: 0.02 },
      { ...random, logitBias: [[5, 4]] as const, suppressedTokens: [2], minTokens: 20 },
    ]) {
      const whole = await generate(engine, options, prompt, [], 24)
      for (const length of [1, 11, 23]) expect(await generate(engine, options, prompt, whole.slice(0, length), 24 - length)).toEqual(whole.slice(length))
      // Where the prompt ends does not matter to the generator's position, only to the penalties.
      if (options === random) expect(await generate(engine, options, [...prompt, ...whole.slice(0, 5)], [], 19)).toEqual(whole.slice(5))
    }
  })

  test("another seed or choice draws other tokens", async () => {
    const base = { ...greedy, temperature: 1 }
    const texts = new Set<string>()
    for (const options of [base, { ...base, seed: 1 }, { ...base, seed: 2 ** 32 }, { ...base, choice: 1 }]) texts.add((await generate(engine, options, prompt, [], 12)).join())
    expect(texts.size).toBe(4)
  })
})

describe("filters", () => {
  test("top-k keeps the k most likely tokens and their proportions", async () => {
    const logits = await logitsAfter(prompt)
    const chances = probabilities(logits, 1.2)
    for (const topK of [2, 7, 50]) {
      const kept = ranked(logits).slice(0, topK)
      const drawn = await drawMany({ ...greedy, temperature: 1.2, topK, seed: 5 }, 2048)
      expect(drawn.filter((token) => !kept.includes(token))).toEqual([])
      expect(Math.abs(deviation(drawn, renormalised(kept, chances)))).toBeLessThan(4)
    }
  }, 30_000)

  test("top-p keeps the nucleus, no more and no less", async () => {
    const logits = await logitsAfter(prompt)
    for (const [topP, temperature] of [[0.3, 1], [0.9, 0.8], [0.99, 1.5]] as const) {
      const chances = probabilities(logits, temperature)
      // Single precision may decide the last token differently: a hair's breadth to each side.
      const widest = nucleus(topP + 1e-5, chances, ranked(logits))
      const narrowest = nucleus(topP - 1e-5, chances, ranked(logits))
      const drawn = await drawMany({ ...greedy, temperature, topP, seed: 6 }, 3072)
      expect(drawn.filter((token) => !widest.has(token))).toEqual([])
      expect(Math.abs(deviation(drawn, renormalised(narrowest, chances)))).toBeLessThan(4)
    }
  }, 30_000)

  test("min-p keeps the tokens with that share of the most likely one's probability", async () => {
    const logits = await logitsAfter(prompt)
    const chances = probabilities(logits, 1)
    const most = chances.reduce((a, b) => Math.max(a, b))
    for (const minP of [0.5, 0.1, 0.01]) {
      const drawn = await drawMany({ ...greedy, temperature: 1, minP, seed: 8 }, 2048)
      expect(drawn.filter((token) => chances[token]! < minP * most * (1 - 1e-5))).toEqual([])
      const kept = [...chances.keys()].filter((token) => chances[token]! >= minP * most)
      expect(Math.abs(deviation(drawn, renormalised(kept, chances)))).toBeLessThan(4)
    }
  }, 30_000)

  test("top-k, then top-p on what is left, then min-p", async () => {
    const logits = await logitsAfter(prompt)
    const chances = probabilities(logits, 1)
    const left = ranked(logits).slice(0, 30)
    const shares = renormalised(left, chances)
    const kept = [...nucleus(0.8, Float64Array.from(chances, (_, id) => shares.get(id) ?? 0), left)].filter((id) => chances[id]! >= 0.2 * chances[left[0]!]!)
    const drawn = await drawMany({ ...greedy, temperature: 1, topK: 30, topP: 0.8, minP: 0.2, seed: 9 }, 2048)
    expect(new Set(drawn)).toEqual(new Set(kept))
    expect(Math.abs(deviation(drawn, renormalised(kept, chances)))).toBeLessThan(4)
  }, 30_000)
})

describe("penalties, bias and suppression", () => {
  test("each changes the logits as documented, in the documented order", async () => {
    const random = randomNumbers(21)
    for (let round = 0; round < 12; round++) {
      const output = await generate(engine, { ...greedy, temperature: 0.5, seed: round }, prompt, [], 10)
      const logits = await logitsAfter([...prompt, ...output])
      const likely = ranked(logits).slice(0, 6)
      const options: SamplerOptions = {
        ...greedy,
        repetitionPenalty: 1 + random(),
        presencePenalty: 2 * random() - 0.5,
        frequencyPenalty: random(),
        logitBias: [[likely[0]!, -1], [likely[2]!, 0.5], [likely[2]!, 0.25], [output[0]!, 8]],
        suppressedTokens: [likely[1]!],
        minTokens: round % 2 === 0 ? 11 : 10,
      }
      const expected = Float64Array.from(logits)
      for (const [token, bias] of options.logitBias) expected[token]! += bias
      for (const token of new Set([...prompt, ...output])) {
        expected[token] = expected[token]! > 0 ? expected[token]! / options.repetitionPenalty : expected[token]! * options.repetitionPenalty
      }
      for (const token of new Set(output)) {
        expected[token]! -= options.presencePenalty + options.frequencyPenalty * output.filter((other) => other === token).length
      }
      if (options.minTokens > output.length) for (const token of options.suppressedTokens) expected[token] = -Infinity
      expect(await generate(engine, options, prompt, output, 1)).toEqual([ranked(expected)[0]])
    }
  })

  test("tokens are suppressed exactly until the output is long enough", async () => {
    const free = await generate(engine, greedy, prompt, [], 12)
    const banned = [...new Set(free)]
    const output = await generate(engine, { ...greedy, suppressedTokens: banned, minTokens: 5 }, prompt, [], 5)
    expect(output.filter((token) => banned.includes(token))).toEqual([])
    const [next] = await generate(engine, { ...greedy, suppressedTokens: banned, minTokens: 5 }, prompt, output, 1)
    expect(next).toBe(ranked(await logitsAfter([...prompt, ...output]))[0])
  })

  test("a bias of -100 bans and one of +100 forces, also where tokens are drawn at random", async () => {
    const logits = await logitsAfter(prompt)
    const likely = ranked(logits).slice(0, 5)
    const base = { ...greedy, temperature: 1, seed: 4 }
    const banned = await drawMany({ ...base, logitBias: likely.map((token) => [token, -100] as const) }, 512)
    expect(banned.filter((token) => likely.includes(token))).toEqual([])
    expect(new Set(await drawMany({ ...base, logitBias: [[99, 100]] }, 64))).toEqual(new Set([99]))
  })

  test("a repetition penalty sees the prompt, presence and frequency penalties do not", async () => {
    const [first] = ranked(await logitsAfter(prompt)) as [number]
    const options = { ...greedy, logitBias: [[prompt[2]!, 50]] as const }
    expect(await drawOne(options)).toBe(prompt[2])
    expect(await drawOne({ ...options, presencePenalty: 100, frequencyPenalty: 100 })).toBe(prompt[2])
    expect(await drawOne({ ...options, repetitionPenalty: 1000 })).toBe(first)
  })

  test("a vocabulary without a token left is an error", async () => {
    const all = Array.from({ length: vocabulary }, (_, token) => token)
    await expect(drawOne({ ...greedy, suppressedTokens: all, minTokens: 1 })).rejects.toThrow(/every token of the vocabulary is suppressed/)
    await expect(drawOne({ ...greedy, temperature: 1, suppressedTokens: all, minTokens: 1 })).rejects.toThrow(/suppressed/)
  })
})

describe("log probabilities", () => {
  test("are the log-softmax of the raw logits, whatever the sampler does", async () => {
    const options: SamplerOptions = { ...greedy, temperature: 2, topK: 5, logitBias: [[7, 20]], repetitionPenalty: 2, seed: 1 }
    const sampler = engine.createSampler(options, Int32Array.from(prompt), new Int32Array(0))
    const result = await new Sequence(engine).feed(prompt, [{ row: -1, sampler, top: 20 }, { row: 2, target: 300, top: 0 }, { row: 3, target: 5, top: 4 }, { row: 4, target: 5 }], true)
    engine.freeSampler(sampler)
    expect(result.topWidth).toBe(20)
    for (const [output, top] of [[0, 20], [1, 0], [2, 4]] as const) {
      const logits = result.logits!.subarray(output * vocabulary, (output + 1) * vocabulary)
      const expected = referenceLogSoftmax(logits)
      expect(result.logprobs[output]).toBeCloseTo(expected[result.tokens[output]!]!, 5)
      const order = ranked(logits).slice(0, top)
      expect([...result.topTokens.subarray(output * 20, output * 20 + 20)]).toEqual([...order, ...Array<number>(20 - top).fill(-1)])
      order.forEach((token, i) => expect(result.topLogprobs[output * 20 + i]).toBeCloseTo(expected[token]!, 5))
    }
    expect([...result.tokens.subarray(1)]).toEqual([300, 5, 5])
    expect(result.logprobs[3]).toBeNaN()
  })

  test("of a whole vocabulary add up to 1", async () => {
    const { topTokens, topLogprobs } = await new Sequence(engine).feed(prompt, [{ row: -1, target: 0, top: vocabulary }])
    expect(new Set(topTokens).size).toBe(vocabulary)
    expect(topLogprobs.reduce((sum, logprob) => sum + Math.exp(logprob), 0)).toBeCloseTo(1, 5)
  })
})

describe("what cannot be drawn from is refused", () => {
  test("options out of range name the option", () => {
    const create = (options: Partial<SamplerOptions>): number => engine.createSampler({ ...greedy, ...options }, Int32Array.from(prompt), new Int32Array(0))
    for (const [options, name] of [
      [{ temperature: -1 }, "temperature"],
      [{ temperature: NaN }, "temperature"],
      [{ temperature: Infinity }, "temperature"],
      [{ topK: -1 }, "topK"],
      [{ topP: 0 }, "topP"],
      [{ topP: 1.5 }, "topP"],
      [{ minP: -0.1 }, "minP"],
      [{ minP: 2 }, "minP"],
      [{ repetitionPenalty: 0 }, "repetitionPenalty"],
      [{ presencePenalty: NaN }, "presencePenalty"],
      [{ frequencyPenalty: -Infinity }, "frequencyPenalty"],
      [{ logitBias: [[vocabulary, 1]] }, "logitBias"],
      [{ logitBias: [[0, NaN]] }, "logitBias"],
      [{ suppressedTokens: [-1] }, "suppressedTokens"],
      [{ suppressedTokens: [vocabulary] }, "suppressedTokens"],
      [{ minTokens: -1 }, "minTokens"],
      [{ seed: -1 }, "seed"],
      [{ seed: 2 ** 53 }, "seed"],
      [{ choice: 0.5 }, "choice"],
    ] as ReadonlyArray<readonly [Partial<SamplerOptions>, string]>) {
      expect(() => create(options), JSON.stringify(options)).toThrow(name)
    }
    expect(() => engine.createSampler(greedy, Int32Array.of(vocabulary), new Int32Array(0))).toThrow(/prompt: token 2500 is not in 0/)
    expect(() => engine.createSampler(greedy, new Int32Array(0), Int32Array.of(-1))).toThrow(/output: token -1 is not in 0/)
    expect(engine.samplers).toBe(0)
  })
})
