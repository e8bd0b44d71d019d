/**
 * The engine against a float64 forward that shares nothing with it.
 *
 * Before it multiplies with a quantised matrix the engine rounds activations to int8 in blocks of 32, and it keeps KV in
 * f16; the reference does neither. On random tiny models that costs about 3 % of the spread of the logits.
 */
import { readFileSync } from "node:fs"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { Engine, type KvDtype } from "../../kernels/index.ts"
import type { TensorTypeName } from "../support/gguf-writer.ts"
import { realModelPath } from "../support/model.ts"
import { readReferenceFile, referenceLogits, relativeError } from "../support/reference-forward.ts"
import { Sequence } from "../support/sequence.ts"
import { writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

let folder: string

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-accuracy-"))
})

afterAll(() => rm(folder, { recursive: true }))

/** `relativeError` of 48 positions, ascending. */
interface Errors {
  readonly exact: ReadonlyArray<number>
  /** Against the reference with the engine's roundings, which leaves the kernels' own errors. */
  readonly rounded: ReadonlyArray<number>
}

const relativeErrors = async (options: TinyModelOptions, kvDtype: KvDtype = "f16"): Promise<Errors> => {
  const path = join(folder, "tiny.gguf")
  await writeTinyModel(path, options)
  const vocabulary = options.vocabulary ?? 320
  const tokens = Array.from({ length: 48 }, (_, i) => (3 + i * i * 37 + i * 11) % vocabulary)
  const engine = await Engine.load({ path, blocks: 4, blockTokens: 16, kvDtype, threads: 2, maxRows: 48, maxOutputs: 48 })
  // Two chunks, so that the second attends to the first through the pool.
  const sequence = new Sequence(engine)
  const rows: Array<Float32Array> = []
  for (const chunk of [tokens.slice(0, 31), tokens.slice(31)]) {
    const { logits } = await sequence.feed(chunk, chunk.map((_, row) => ({ row })), true)
    for (let row = 0; row < chunk.length; row++) rows.push(logits!.subarray(row * vocabulary, (row + 1) * vocabulary))
  }
  await engine.close()
  const errorsTo = (expected: ReadonlyArray<Float64Array>): Array<number> => expected.map((row, n) => relativeError(rows[n]!, row)).sort((x, y) => x - y)
  const file = readReferenceFile(path)
  return { exact: errorsTo(referenceLogits(file, tokens)), rounded: errorsTo(referenceLogits(file, tokens, { rounded: true, kvDtype })) }
}

/**
 * Each position within 10 % of the exact forward (measured: 7 %), half of them within 4 % (measured: 3 %). Against the
 * rounded forward half of the positions within 1e-5 (measured: 2e-7) for one of three seeds at least: where a value lies
 * so close to the middle of two levels that single precision decides, it and all that follows it differ by a level.
 */
const expectClose = async (options: TinyModelOptions): Promise<void> => {
  const medians: Array<number> = []
  for (const seed of [1, 2, 3]) {
    const { exact, rounded } = await relativeErrors({ ...options, seed })
    expect(exact.at(-1)).toBeLessThan(0.1)
    expect(exact[24]).toBeLessThan(0.04)
    medians.push(rounded[24]!)
  }
  expect(Math.min(...medians)).toBeLessThan(1e-5)
}

const superBlocks = { hidden: 256, heads: 8, kvHeads: 2, headDim: 32, ffn: 256, layers: 1 } as const

describe("tiny models", () => {
  for (const type of ["F32", "F16", "BF16"] as const satisfies ReadonlyArray<TensorTypeName>) {
    test(`logits of a model in ${type} are those of the float64 forward within 0.2 % of their spread`, async () => {
      for (const tied of [true, false]) expect((await relativeErrors({ types: type, seed: 2, tied })).exact.at(-1)).toBeLessThan(0.002)
    })
  }

  for (const type of ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"] as const satisfies ReadonlyArray<TensorTypeName>) {
    test(`logits of a model in ${type} are those of the float64 forward, and the roundings explain all of the difference`, async () => {
      for (const tied of [true, false]) await expectClose({ types: type, tied })
    })
  }

  for (const type of ["Q4_K", "Q5_K", "Q6_K"] as const satisfies ReadonlyArray<TensorTypeName>) {
    test(`logits of a model in ${type}, whose rows are multiples of 256, likewise`, async () => {
      await expectClose({ types: type, ...superBlocks, tied: type === "Q6_K" })
    })
  }

  test("also with types mixed as Q4_K_M mixes them, where rows are multiples of 256 and where only some are", async () => {
    const types = { token_embd: "Q4_K", output: "Q6_K", attn_q: "Q4_K", attn_k: "Q4_K", attn_v: "Q6_K", attn_output: "Q4_K", ffn_gate: "Q4_K", ffn_up: "Q4_K", ffn_down: "Q6_K" } as const
    await expectClose({ types, ...superBlocks, tied: false })
    const narrow = { token_embd: "Q8_0", attn_q: "Q5_0", attn_k: "Q5_0", attn_v: "Q8_0", attn_output: "Q5_0", ffn_gate: "Q5_0", ffn_up: "Q5_0", ffn_down: "Q6_K" } as const
    await expectClose({ types: narrow, hidden: 96, heads: 3, kvHeads: 1, headDim: 32, ffn: 256, layerTypes: { "blk.0.ffn_down": "Q4_K" } })
  })

  // Weights in F32 round nothing else. Measured: half of the positions within 1.3 % (int8) and 21 % (int4) of the exact forward, and
  // within 0.08 % and 0.21 % of the one whose KV is rounded alike: what the integers of attention and levels next to it cost.
  test.each(["int8", "int4"] as const)("with KV in %s: its levels explain nine tenths of the difference and more", async (kvDtype) => {
    for (const headDim of [16, 64]) {
      for (const seed of [1, 2, 3]) {
        const { exact, rounded } = await relativeErrors({ types: "F32", seed, headDim }, kvDtype)
        expect(exact[24]).toBeLessThan(kvDtype === "int8" ? 0.02 : 0.3)
        expect(rounded[24]).toBeLessThan(0.1 * exact[24]!)
      }
    }
  })

  test("also with mixed types, other shapes, and a vocabulary that fills no whole panel", async () => {
    const mixed = { token_embd: "Q8_0", attn_q: "Q4_0", attn_k: "Q8_0", attn_v: "F16", attn_output: "Q4_1", ffn_gate: "Q4_1", ffn_up: "F32", ffn_down: "Q8_0" } as const
    await expectClose({ types: mixed, layers: 3, vocabulary: 307 })
    await expectClose({ types: "Q4_1", hidden: 96, heads: 3, kvHeads: 1, headDim: 32, ffn: 160, ropeBase: 100_000 })
    await expectClose({ types: "Q8_0", heads: 4, kvHeads: 4, headDim: 64, layers: 1, layerTypes: { "blk.0.ffn_up": "Q4_0" } })
  })
})

/** What test/support/make-fixtures.ts wrote. */
interface TeacherForced {
  readonly tokens: ReadonlyArray<number>
  readonly argmax: ReadonlyArray<number> // [tokens - 1] of the exact forward
  readonly logprob: ReadonlyArray<number> // [tokens - 1]
  /** Of llama.cpp on the same file and tokens: the mean of |log p - exact log p|, and positions with the exact argmax. */
  readonly llamaCpp: { readonly meanDifference: number; readonly sameArgmax: number }
}

const modelPath = realModelPath()

describe.skipIf(modelPath === undefined)("SmolLM2-135M", () => {
  /** Against the exact forward: positions with the same most likely token, and mean |delta log p|. */
  const teacherForced = async (kvDtype: KvDtype, mostPositions = Number.POSITIVE_INFINITY) => {
    const { tokens, argmax, logprob, llamaCpp } = JSON.parse(readFileSync(new URL("../fixtures/smollm2-teacher-forced.json", import.meta.url), "utf8")) as TeacherForced
    const positions = Math.min(mostPositions, tokens.length - 1)
    const engine = await Engine.load({ path: modelPath!, blocks: Math.ceil(tokens.length / 16), blockTokens: 16, kvDtype, threads: 2, maxRows: 256, maxOutputs: 256 })
    const sequence = new Sequence(engine)
    let same = 0
    let difference = 0
    for (let start = 0; start < positions; start += 256) {
      const chunk = tokens.slice(start, Math.min(start + 256, positions))
      const result = await sequence.feed(chunk, chunk.map((_, row) => ({ row, target: tokens[start + row + 1]!, top: 1 })))
      for (let row = 0; row < chunk.length; row++) {
        if (result.topTokens[row] === argmax[start + row]) same++
        difference += Math.abs(result.logprobs[row]! - logprob[start + row]!)
      }
    }
    await engine.close()
    return { positions, same, difference: difference / positions, llamaCpp }
  }
  // Both tests want it, and it takes long.
  let f16: ReturnType<typeof teacherForced> | undefined
  const inF16 = () => (f16 ??= teacherForced("f16"))

  test("teacher-forced over 2,000 tokens: log p as close to the exact forward's as llama.cpp's, the most likely token as often the same", async () => {
    const { positions, same, difference, llamaCpp } = await inF16()
    expect(positions).toBeGreaterThanOrEqual(2000)
    expect(difference).toBeLessThanOrEqual(1.1 * llamaCpp.meanDifference)
    // Measured: 0.0439 against llama.cpp's 0.0529, and 2,229 against 2,233 of 2,289. Both miss only where two tokens are nearly as
    // likely as each other, which is a coin's toss, so that counts of misses differ by twice their root without a reason.
    expect(same).toBeGreaterThanOrEqual(llamaCpp.sameArgmax - 2 * Math.sqrt(positions - llamaCpp.sameArgmax))
  }, 120_000)

  /**
   * Compared is how far each dtype is from the exact forward: f16 0.0439, int8 0.0460, int4 0.3030. That is not how far int8 is
   * from f16, position by position, which is 0.049 on this file and shows little of KV: activations rounded to int8 turn any
   * change of the keys, were it of a millionth, into 0.044. On the same weights in F16, where nothing but KV is
   * rounded, int8 is 0.019 from f16 over a page of prose (keys 0.020 by themselves, values 0.006), and int4 0.35.
   */
  test("with KV in int8 it is as near to the exact forward as with f16, within 0.01 on average; int4 is far from it, within 0.4", async () => {
    // int4 is so far away that fewer positions show it.
    const [exactly, int8, int4] = [await inF16(), await teacherForced("int8"), await teacherForced("int4", 512)]
    expect(Math.abs(int8.difference - exactly.difference)).toBeLessThanOrEqual(0.01)
    expect(int8.same).toBeGreaterThanOrEqual(0.92 * int8.positions)
    expect(int4.difference).toBeLessThanOrEqual(0.4)
    expect(int4.same).toBeGreaterThanOrEqual(0.7 * int4.positions)
  }, 120_000)
})
