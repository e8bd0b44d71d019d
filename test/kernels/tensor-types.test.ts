/** Every type of tensor, in every matrix: read exactly, refused where it is damaged, and multiplied to the same bits by all instruction sets. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { bestInstructionSet, Engine, instructionSets, type EngineOptions } from "../../kernels/index.ts"
import { firstDifference, randomEnds, sequenceLogits, stepLogits, upTo } from "../support/engine-runs.ts"
import { tensorTypeIds, type TensorTypeName } from "../support/gguf-writer.ts"
import { codecs, dequantise, halvesOf } from "../support/quantise.ts"
import { randomNumbers, writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const types = Object.keys(tensorTypeIds) as ReadonlyArray<TensorTypeName>
const quantised = types.filter((type) => codecs[type].weights > 1)
const available = instructionSets.slice(0, instructionSets.indexOf(bestInstructionSet()) + 1)

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-types-"))
})
afterAll(() => rm(folder, { recursive: true }))

const withEngine = async <A>(options: Partial<EngineOptions>, use: (engine: Engine) => Promise<A>): Promise<A> => {
  const engine = await Engine.load({ path: join(folder, "tiny.gguf"), blocks: 8, blockTokens: 16, threads: 1, maxRows: 64, maxOutputs: 64, ...options })
  try {
    return await use(engine)
  } finally {
    await engine.close()
  }
}

/** Any bits at all, but that halves stay below 2^-7, so that KV stays within f16: levels and factors at their extremes, scales of both signs. */
const scramble = (random: () => number) => (_: string, bytes: Uint8Array, type: TensorTypeName): void => {
  const { weights, bytes: size } = codecs[type]
  if (weights === 1) return
  for (let i = 0; i < bytes.length; i++) bytes[i] = Math.floor(random() * 256)
  for (let block = 0; block < bytes.length; block += size) for (const at of halvesOf(type)) bytes[block + at + 1]! &= 0x9f
}

/**
 * A model whose logits are the last token's embedding: the layer adds nothing, an epsilon of 2^50 makes the norm a division by
 * 2^25, and the output matrix multiplies each component with 2^25.
 */
const echo = (type: TensorTypeName): TinyModelOptions => ({
  types: { token_embd: type },
  layers: 1,
  hidden: 256,
  ffn: 32,
  vocabulary: 300,
  tied: false,
  epsilon: 2 ** 50,
  alter: (name, weights) => {
    if (name.includes("attn_output") || name.includes("ffn_down")) weights.fill(0)
    if (name.includes("output_norm")) weights.fill(1)
    if (name === "output.weight") for (let i = 0; i < weights.length; i++) weights[i] = i % 257 === 0 ? 2 ** 25 : 0
  },
  alterBytes: (name, bytes, found) => {
    if (name === "token_embd.weight") scramble(randomNumbers(3))(name, bytes, found)
  },
})

describe("each weight is what the format's document says, to the bit", () => {
  test.each(types)("%s", async (type) => {
    let bytes = new Uint8Array()
    const options = echo(type)
    await writeTinyModel(join(folder, "tiny.gguf"), {
      ...options,
      alterBytes: (name, found, foundType) => {
        options.alterBytes!(name, found, foundType)
        if (name === "token_embd.weight") bytes = found.slice()
      },
    })
    const expected = new Float32Array(300 * 256)
    dequantise(type, bytes, expected)
    const tokens = upTo(300)
    for (const isa of available) {
      await withEngine({ isa, blocks: 1, maxRows: 16, maxOutputs: 16 }, async (engine) => {
        for (let start = 0; start < 300; start += 15) {
          const chunk = tokens.slice(start, start + 15)
          const [logits] = await stepLogits(engine, [{ tokens: chunk, from: 0, to: 15, table: [0] }])
          logits!.forEach((row, i) => {
            const found = new Float32Array(row.buffer, row.byteOffset, 256)
            const wanted = expected.subarray((start + i) * 256, (start + i + 1) * 256)
            expect(found.findIndex((x, k) => x !== wanted[k]), `${isa}, row ${start + i}`).toBe(-1)
          })
        }
      })
    }
  })
})

describe("a number that is not finite is refused with its tensor and row", () => {
  test.each(types)("%s", async (type) => {
    const { weights, bytes: size } = codecs[type]
    const row = (256 / weights) * size
    for (const at of halvesOf(type)) {
      // Infinity or NaN, in the last block of the row.
      for (const damage of [[0x00, 0x7c], [0x01, 0xfe]] as const) {
        const wide = type === "F32" ? [0, 0, 0x80, 0xff] : type === "BF16" ? [0x80 | damage[0], 0x7f] : damage
        await writeTinyModel(join(folder, "tiny.gguf"), {
          types: { ffn_down: type },
          layers: 1,
          ffn: 256,
          alterBytes: (name, bytes) => {
            if (name === "blk.0.ffn_down.weight") bytes.set(wide, 21 * row + row - size + at)
          },
        })
        await expect(withEngine({}, async () => undefined)).rejects.toThrow("tensor blk.0.ffn_down.weight, row 21: expected finite values, found one that is not")
      }
    }
  })
})

/** A small shape that fits the type, by chance; panels and records that are not full included. */
const randomShape = (type: TensorTypeName, random: () => number): TinyModelOptions => {
  const between = (least: number, most: number): number => least + Math.floor(random() * (most - least + 1))
  const unit = codecs[type].weights
  const headDim = 2 * between(4, 12)
  const heads = unit === 1 ? between(1, 5) : unit === 32 ? 4 * between(1, 2) : 16
  return {
    types: type,
    layers: 1,
    hidden: unit === 1 ? between(10, 90) : unit === 32 ? 32 * between(1, 5) : 256,
    heads,
    kvHeads: heads % 2 === 0 ? heads / 2 : 1,
    headDim: unit === 1 ? headDim : 16,
    ffn: unit === 1 ? between(10, 90) : unit * between(1, unit === 32 ? 7 : 2),
    vocabulary: between(259, 330),
    tied: random() < 0.5,
    seed: Math.floor(random() * 2 ** 31),
  }
}

describe("the same bits in every instruction set, for batches of 1 to 32 rows, in chunks, on several threads", () => {
  const expectSameBits = async (options: TinyModelOptions, seed: number): Promise<void> => {
    const random = randomNumbers(seed)
    await writeTinyModel(join(folder, "tiny.gguf"), options)
    const tokens = upTo(40).map(() => Math.floor(random() * 259))
    const table = upTo(3)
    const expected = await withEngine({ isa: "reference" }, (engine) => sequenceLogits(engine, tokens, table))
    for (const isa of available) {
      for (const threads of [1, 2, 3]) {
        await withEngine({ isa, threads }, async (engine) => {
          const place = `${isa}, ${threads} threads, ${JSON.stringify(options)}`
          const ends = randomEnds(40, random)
          expect(firstDifference(await sequenceLogits(engine, tokens, table, ends), expected), `${place}, chunks end at ${ends}`).toBe(-1)
          if (isa === "reference") return
          for (let rows = threads; rows <= 32; rows += threads === 1 ? 1 : 5) {
            const found = await sequenceLogits(engine, tokens.slice(0, rows), table)
            expect(firstDifference(found, expected.slice(0, rows)), `${place}, ${rows} rows`).toBe(-1)
          }
        })
      }
    }
  }

  test.each(types)("%s", async (type) => {
    const random = randomNumbers(tensorTypeIds[type] + 1)
    await expectSameBits(randomShape(type, random), 1)
    const again = randomShape(type, random)
    await expectSameBits({ ...again, alterBytes: scramble(random) }, 2)
  })

  test("types mixed at will", async () => {
    const random = randomNumbers(9)
    const any = (): TensorTypeName => types[Math.floor(random() * types.length)]!
    for (const seed of [1, 2]) {
      const mixed = { token_embd: any(), output: any(), attn_q: any(), attn_k: any(), attn_v: any(), attn_output: any(), ffn_gate: any(), ffn_up: any(), ffn_down: any() }
      await expectSameBits({ ...randomShape("Q6_K", random), types: mixed, tied: false }, seed)
    }
  })
})

test("factors of Q6_K at their extremes give the greatest dot, which a float still holds", async () => {
  // All levels 0 (which is -32) and all factors -128; the greatest of what is multiplied has every value at 127 or -127.
  await writeTinyModel(join(folder, "tiny.gguf"), {
    types: "Q6_K",
    layers: 1,
    hidden: 256,
    heads: 16,
    kvHeads: 8,
    ffn: 256,
    alterBytes: (name, bytes, type) => {
      if (type !== "Q6_K" || name === "token_embd.weight") return
      for (let block = 0; block < bytes.length; block += 210) bytes.fill(0, block, block + 192).fill(0x80, block + 192, block + 208)
    },
    alter: (name, weights) => {
      if (name === "token_embd.weight") weights.forEach((_, i) => (weights[i] = (i >> 8) % 2 === 0 ? 1 : -1))
      else if (name.endsWith("norm.weight")) weights.fill(1)
    },
  })
  const expected = await withEngine({ isa: "reference" }, (engine) => sequenceLogits(engine, upTo(20), [0, 1]))
  for (const isa of available) {
    expect(await withEngine({ isa }, async (engine) => firstDifference(await sequenceLogits(engine, upTo(20), [0, 1]), expected))).toBe(-1)
  }
})

test("each quantised type is packed and read where a row is one block and where the last panel has one row", async () => {
  for (const type of quantised) {
    const unit = codecs[type].weights
    await writeTinyModel(join(folder, "tiny.gguf"), { types: type, layers: 1, hidden: unit, heads: unit / 16, kvHeads: unit / 32, headDim: 16, ffn: unit, vocabulary: 273 })
    const logits = await Promise.all(available.map((isa) => withEngine({ isa }, (engine) => sequenceLogits(engine, [3, 272], [0]))))
    for (const found of logits) expect(firstDifference(found, logits[0]!), type).toBe(-1)
  }
})
