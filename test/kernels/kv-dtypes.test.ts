/**
 * KV as codes of 8 and 4 bits: what lies in the pool and on the wire, and that every instruction set makes and reads the same.
 * That nothing depends on batch, chunk, threads or block size is batch-invariance.test.ts, over all dtypes.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import fc from "fast-check"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { bestInstructionSet, Engine, instructionSets, kvBytes, type EngineOptions, type KvDtype } from "../../kernels/index.ts"
import { firstDifference, randomEnds, sequenceLogits, shuffled, upTo } from "../support/engine-runs.ts"
import { numberOfHalf } from "../support/quantise.ts"
import { randomNumbers, writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const available = instructionSets.slice(0, instructionSets.indexOf(bestInstructionSet()) + 1)
const codes = ["int8", "int4"] as const

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-kv-dtypes-"))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

let files = 0
const load = async ({ model = {}, ...options }: Partial<EngineOptions> & { readonly model?: TinyModelOptions }): Promise<Engine> => {
  const path = join(folder, `tiny-${files++}.gguf`)
  await writeTinyModel(path, model)
  return Engine.load({ path, blocks: 64, blockTokens: 16, threads: 2, maxRows: 512, maxOutputs: 512, ...options })
}

const tokensOf = (length: number, seed: number): Array<number> => {
  const random = randomNumbers(seed)
  return upTo(length).map(() => Math.floor(random() * 320))
}

/** The wire format, written a second time: keys or values of one head in one block, [token][head dim]. */
const read = (dtype: KvDtype, bytes: Uint8Array, blockTokens: number, headDim: number): { readonly x: Array<Array<number>>; readonly scale: Array<number>; readonly zero: Array<number> } => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const half = (at: number): number => numberOfHalf(view.getUint16(at, true))
  if (dtype === "f16") return { x: upTo(blockTokens).map((t) => upTo(headDim).map((d) => half(2 * (t * headDim + d)))), scale: [], zero: [] }
  const row = dtype === "int8" ? headDim : headDim / 2
  const scale = upTo(blockTokens).map((t) => half(blockTokens * row + 2 * t))
  const zero = upTo(blockTokens).map((t) => half(blockTokens * (row + 2) + 2 * t))
  const code = (t: number, d: number): number => (dtype === "int8" ? bytes[t * row + d]! : d < row ? bytes[t * row + d]! & 15 : bytes[t * row + d - row]! >> 4)
  return { x: upTo(blockTokens).map((t) => upTo(headDim).map((d) => zero[t]! + scale[t]! * code(t, d))), scale, zero }
}

test.each(codes)("%s on the wire is zero + scale x code of what f16 holds, to half a code, the least number being zero", async (dtype) => {
  for (const [blockTokens, headDim] of [[16, 64], [5, 12], [8, 24]] as const) {
    const model: TinyModelOptions = { layers: 1, headDim, kvHeads: 2, heads: 2 }
    const [plain, coded] = [await load({ blockTokens, model }), await load({ blockTokens, kvDtype: dtype, model })]
    const blocks = new Map<KvDtype, Uint8Array>()
    for (const engine of [plain, coded]) {
      await sequenceLogits(engine, tokensOf(blockTokens, 3), [0])
      const bytes = new Uint8Array(engine.info.blockBytes)
      engine.exportBlock(0, bytes)
      blocks.set(engine.info.kvDtype, bytes)
    }
    for (const piece of upTo(4)) {
      const of = (kind: KvDtype) => {
        const bytes = kvBytes(kind, headDim) * blockTokens
        return read(kind, blocks.get(kind)!.subarray(piece * bytes, (piece + 1) * bytes), blockTokens, headDim)
      }
      const [exact, found] = [of("f16"), of(dtype)]
      for (let t = 0; t < blockTokens; t++) {
        const size = Math.max(...exact.x[t]!.map(Math.abs)) // what the roundings to f16 are a share of
        const range = Math.max(...exact.x[t]!) - Math.min(...exact.x[t]!)
        expect(Math.abs(found.zero[t]! - Math.min(...exact.x[t]!))).toBeLessThan(size / 1000)
        expect(found.scale[t]! / (range / (dtype === "int8" ? 255 : 15))).toBeCloseTo(1, 2)
        for (let d = 0; d < headDim; d++) expect(Math.abs(found.x[t]![d]! - exact.x[t]![d]!)).toBeLessThan(0.502 * found.scale[t]! + size / 1000)
      }
    }
    await Promise.all([plain.close(), coded.close()])
  }
})

test("a token of a head of 64 dimensions takes 128, 68 and 36 bytes of key and of value", () => {
  expect((["f16", "int8", "int4"] as const).map((dtype) => kvBytes(dtype, 64))).toEqual([128, 68, 36])
})

test("heads, groups, blocks and chunks of any size give the same bits in every instruction set, and the same bytes on the wire", async () => {
  const shapes = fc.record({
    kvDtype: fc.constantFrom(...codes),
    headDim: fc.integer({ min: 1, max: 36 }).map((n) => 4 * n),
    kvHeads: fc.integer({ min: 1, max: 3 }),
    group: fc.integer({ min: 1, max: 7 }),
    blockTokens: fc.oneof(fc.integer({ min: 1, max: 40 }), fc.constantFrom(16, 32, 48)),
    length: fc.integer({ min: 1, max: 280 }),
    seed: fc.nat(1000),
  })
  await fc.assert(
    fc.asyncProperty(shapes, async ({ kvDtype, headDim, kvHeads, group, blockTokens, length, seed }) => {
      const model: TinyModelOptions = { layers: 1, hidden: 32, ffn: 32, headDim, kvHeads, heads: kvHeads * group, seed }
      const tokens = tokensOf(length, seed)
      const table = shuffled(upTo(300), randomNumbers(seed)).slice(0, Math.ceil(length / blockTokens))
      const path = join(folder, "shape.gguf")
      await writeTinyModel(path, model)
      let expected: ReadonlyArray<Buffer> | undefined
      let stored: Buffer | undefined
      for (const isa of available) {
        const engine = await Engine.load({ path, blocks: 300, blockTokens, threads: 2, maxRows: 512, maxOutputs: 512, isa, kvDtype })
        const found = await sequenceLogits(engine, tokens, table, isa === "reference" ? [length] : randomEnds(length, randomNumbers(seed)))
        expect(firstDifference(found, (expected ??= found))).toBe(-1)
        const bytes = Buffer.alloc(engine.info.blockBytes * table.length)
        engine.exportLayers(Int32Array.from(table), 0, 1, bytes, 0, 0)
        expect(Buffer.compare(bytes, (stored ??= bytes))).toBe(0)
        await engine.close()
      }
    }),
    { numRuns: 25, seed: 5 },
  )
})

describe.each(codes)("numbers that %s cannot hold", (kvDtype) => {
  const weights = (name: string, factor: number): TinyModelOptions => ({ layers: 1, alter: (tensor, values) => void (tensor.endsWith(name) && values.forEach((value, i) => (values[i] = value * factor))) })

  test("keys and values that are all the same are exact", async () => {
    for (const name of ["attn_k.weight", "attn_v.weight"]) {
      const logits: Array<Array<Buffer>> = []
      for (const isa of available) {
        const engine = await load({ isa, kvDtype, model: weights(name, 0) })
        logits.push(await sequenceLogits(engine, tokensOf(40, 1), [0, 1, 2]))
        const bytes = new Uint8Array(engine.info.blockBytes)
        engine.exportBlock(0, bytes)
        const half = bytes.length / 2
        expect((name === "attn_k.weight" ? bytes.subarray(0, half) : bytes.subarray(half)).every((byte) => byte === 0)).toBe(true)
        await engine.close()
      }
      for (const found of logits) expect(firstDifference(found, logits[0]!)).toBe(-1)
    }
  })

  test.each([
    ["tiny", 1e-9],
    ["huge", 3e3],
  ])("%s ones give the same bits in every instruction set", async (_, factor) => {
    const logits: Array<Array<Buffer>> = []
    for (const isa of available) {
      const engine = await load({ isa, kvDtype, model: weights("attn_v.weight", factor) })
      logits.push(await sequenceLogits(engine, tokensOf(150, 1), upTo(10)))
      await engine.close()
    }
    for (const found of logits) expect(firstDifference(found, logits[0]!)).toBe(-1)
  })

  test("those beyond f16 fail the step that reads them, in every instruction set, as with f16", async () => {
    for (const isa of available) {
      for (const dtype of [kvDtype, "f16"] as const) {
        const engine = await load({ isa, kvDtype: dtype, model: weights("attn_v.weight", 1e6) })
        await expect(sequenceLogits(engine, tokensOf(20, 1), [0, 1])).rejects.toThrow("the logits of this row are not finite")
        await engine.close()
      }
    }
  })
})

test.each(codes)("hostile bytes of %s never crash: a scale or zero that is not finite fails the step that reads it, all others are numbers, and the engine goes on", async (kvDtype) => {
  const engines = await Promise.all(available.map((isa) => load({ isa, kvDtype, model: { headDim: 24, heads: 4 } })))
  const { blockBytes, layerBlockBytes, blockTokens } = engines[0]!.info
  const tokens = tokensOf(20, 4)
  const expected = await sequenceLogits(engines[0]!, tokens, [4, 5])
  const piece = blockTokens * kvBytes(kvDtype, 24)
  const hostile = fc.record({
    bytes: fc.integer().map((seed) => Uint8Array.from({ length: blockBytes }, ((random) => () => random() * 256)(randomNumbers(seed)))),
    spoilt: fc.option(fc.record({ at: fc.nat(2 * blockTokens - 1), piece: fc.nat(3), half: fc.constantFrom(0x7c00, 0xfc00, 0x7e00, 0xffff) })),
  })
  await fc.assert(
    fc.asyncProperty(hostile, async ({ bytes, spoilt }) => {
      // Scales and zeros that are finite, but for one at most.
      for (let start = 0; start < blockBytes; start += piece) {
        for (let at = start + piece - 4 * blockTokens; at < start + piece; at += 2) bytes[at + 1]! &= 0xbb
      }
      if (spoilt !== null) new DataView(bytes.buffer).setUint16(layerBlockBytes + spoilt.piece * piece + piece - 4 * blockTokens + 2 * spoilt.at, spoilt.half, true)
      const found: Array<string> = []
      for (const engine of engines) {
        engine.importBlock(0, bytes)
        const rows = await sequenceLogits(engine, tokens, [0, 1], [tokens.length], 16).catch((error: Error) => error.message)
        found.push(typeof rows === "string" ? "failed" : Buffer.concat(rows).toString("hex"))
        if (typeof rows === "string") expect(rows).toMatch(/the logits of this row are not finite/)
      }
      expect(new Set(found).size).toBe(1)
      if (spoilt === null) expect(found[0]).not.toBe("failed")
    }),
    { numRuns: 30, seed: 9 },
  )
  for (const engine of engines) expect(firstDifference(await sequenceLogits(engine, tokens, [4, 5]), expected)).toBe(-1)
  await Promise.all(engines.map((engine) => engine.close()))
})

test.each([
  ["int8", 7, "kv.dtype: int8 takes heads of a multiple of 2 dimensions, and this model's have 7; f16 takes any"],
  ["int4", 10, "kv.dtype: int4 takes heads of a multiple of 4 dimensions, and this model's have 10; f16 takes any"],
] as const)("%s is refused where a head has %i dimensions", async (kvDtype, headDim, message) => {
  const model: TinyModelOptions = { headDim, metadata: { "llama.rope.dimension_count": { type: "u32", value: 6 } } }
  await expect(load({ kvDtype, model })).rejects.toThrow(message)
  await (await load({ model })).close()
})
