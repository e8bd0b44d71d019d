/**
 * Same bits, whatever the pipeline: the logits of a position depend on the tokens up to it and on nothing else. Every test
 * compares with one run of the reference: alone and in one chunk. Crowds of random size: random-shapes.test.ts.
 */
import { mkdtemp, rm } from "node:fs/promises"
import { availableParallelism, tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { bestInstructionSet, Engine, instructionSets, type EngineOptions, type InstructionSet, type KvDtype } from "../../kernels/index.ts"
import { firstDifference, randomEnds, sequenceLogits, shuffled, stepLogits, upTo, type Run } from "../support/engine-runs.ts"
import { realModelPath } from "../support/model.ts"
import { randomNumbers, writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const best = bestInstructionSet()
const available = instructionSets.slice(0, instructionSets.indexOf(best) + 1)

/** Between them: weights of every size of level and of scale (each type by itself: tensor-types.test.ts), tied and not, head sizes that fill no register, sizes that fill no panel. */
const models: Readonly<Record<string, TinyModelOptions>> = {
  "Q4_1 with a Q8_0 embedding": { types: { token_embd: "Q8_0", attn_q: "Q4_1", attn_k: "Q4_1", attn_v: "Q4_1", attn_output: "Q4_1", ffn_gate: "Q4_1", ffn_up: "Q4_1", ffn_down: "Q4_1" } },
  "Q4_0, three heads to a KV head": { types: "Q4_0", heads: 6, kvHeads: 2, hidden: 96, ffn: 160, tied: false },
  "Q8_0, one KV head": { types: "Q8_0", heads: 5, kvHeads: 1, headDim: 64, hidden: 64, ffn: 224, seed: 3 },
  "Q4_0, forty heads to a KV head": { types: "Q4_0", heads: 40, kvHeads: 1, headDim: 16, hidden: 64, ffn: 96, seed: 5 },
  "F16, odd sizes": { types: "F16", heads: 3, kvHeads: 3, headDim: 10, hidden: 42, ffn: 50, vocabulary: 301, seed: 4 },
  "F32 and all others mixed": {
    types: { token_embd: "F16", output: "Q4_1", attn_q: "Q8_0", attn_k: "F32", attn_v: "Q4_0", ffn_gate: "F16", ffn_up: "Q4_1" },
    tied: false,
    headDim: 24,
    seed: 5,
  },
}

/** Wide enough for blocks of 256, and so too slow to run the reference more than once. */
const wideModels: Readonly<Record<string, TinyModelOptions>> = {
  "mixed as Q4_K_M": {
    types: { token_embd: "Q4_K", output: "Q6_K", attn_q: "Q4_K", attn_k: "Q5_K", attn_v: "Q6_K", attn_output: "Q4_K", ffn_gate: "Q4_K", ffn_up: "Q5_0", ffn_down: "Q6_K" },
    tied: false,
    layers: 1,
    hidden: 256,
    heads: 8,
    headDim: 32,
    ffn: 256,
    vocabulary: 275,
    seed: 6,
  },
}

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-invariance-"))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

const withAnyEngine = async <A>(options: Partial<EngineOptions> & { path: string }, use: (engine: Engine) => Promise<A>): Promise<A> => {
  const engine = await Engine.load({ blocks: 160, blockTokens: 16, threads: 2, maxRows: 512, maxOutputs: 512, ...options })
  try {
    return await use(engine)
  } finally {
    await engine.close()
  }
}

const blocksFor = (tokens: number, blockTokens: number): number => Math.ceil(tokens / blockTokens)

const invariance = (name: string, length: number, isas: ReadonlyArray<InstructionSet>, path: () => Promise<string>, { kvDtype = "f16", threads: referenceThreads = 1 }: { readonly kvDtype?: KvDtype; readonly threads?: number } = {}): void => {
  describe(`${name}, KV in ${kvDtype}`, () => {
    const withEngine = <A>(options: Partial<EngineOptions> & { path: string }, use: (engine: Engine) => Promise<A>): Promise<A> => withAnyEngine({ kvDtype, ...options }, use)
    let file: string
    let tokens: Array<number>
    let expected: Array<Buffer>
    /** The KV of its first half. */
    const half = Math.floor(length / 32) * 16
    let exported: Array<Uint8Array>
    beforeAll(async () => {
      file = await path()
      await withEngine({ path: file, isa: "reference", threads: referenceThreads }, async (engine) => {
        const random = randomNumbers(length)
        tokens = upTo(length).map(() => Math.floor(random() * engine.info.vocabulary))
        expected = await sequenceLogits(engine, tokens, upTo(blocksFor(length, 16)))
        exported = upTo(half / 16).map((block) => {
          const bytes = new Uint8Array(engine.info.blockBytes)
          engine.exportBlock(block, bytes)
          return bytes
        })
      })
    }, 180_000)

    test.each(isas)("%s: in one chunk, and in random chunks, on 1, 2 and 3 threads", async (isa) => {
      for (const threads of [1, 2, 3]) {
        await withEngine({ path: file, isa, threads }, async (engine) => {
          expect(engine.info.isa).toBe(isa)
          const table = upTo(blocksFor(length, 16))
          expect(firstDifference(await sequenceLogits(engine, tokens, table), expected)).toBe(-1)
          const ends = randomEnds(length, randomNumbers(threads))
          expect(firstDifference(await sequenceLogits(engine, tokens, table, ends), expected), `chunks end at ${ends}`).toBe(-1)
        })
      }
    })

    test.each([2, 3])("token by token on %i threads, which may share one row's context", async (threads) => {
      await withEngine({ path: file, threads }, async (engine) => {
        // The beginning, beyond one tile of attention, and the end, beyond two.
        const beginning = Math.min(length, 150)
        const ends = upTo(length + 1).filter((end) => (end > 0 && end <= beginning) || end > length - 40)
        expect(firstDifference(await sequenceLogits(engine, tokens, upTo(blocksFor(length, 16)), ends), expected)).toBe(-1)
      })
    })

    test.each([1, 4, 5, 8, 32, 48])("in blocks of %i tokens, scattered over the pool", async (blockTokens) => {
      await withEngine({ path: file, blockTokens, blocks: 520 }, async (engine) => {
        const table = shuffled(upTo(520), randomNumbers(blockTokens)).slice(0, blocksFor(length, blockTokens))
        const ends = randomEnds(length, randomNumbers(blockTokens))
        expect(firstDifference(await sequenceLogits(engine, tokens, table, ends), expected), `chunks end at ${ends}`).toBe(-1)
      })
    })

    test.each(isas)("%s: among other sequences, in batches of changing composition", async (isa) => {
      await withEngine({ path: file, isa }, async (engine) => {
        const random = randomNumbers(7)
        const order = shuffled(upTo(160), random)
        const size = blocksFor(length, 16)
        const sequences = upTo(4).map((i) => ({
          tokens: i === 0 ? tokens : upTo(length).map(() => Math.floor(random() * engine.info.vocabulary)),
          table: order.slice(i * size, (i + 1) * size),
          done: 0,
        }))
        const found: Array<Buffer> = []
        while (sequences[0]!.done < length) {
          const runs: Array<Run & { own: boolean; sequence: (typeof sequences)[number] }> = []
          for (const sequence of shuffled(sequences, random)) {
            const to = Math.min(length, sequence.done + Math.floor(random() ** 2 * 40))
            if (to > sequence.done) runs.push({ tokens: sequence.tokens, from: sequence.done, to, table: sequence.table, own: sequence === sequences[0], sequence })
          }
          if (runs.length === 0) continue
          const logits = await stepLogits(engine, runs)
          runs.forEach((run, i) => {
            if (run.own) found.push(...logits[i]!)
            run.sequence.done = run.to
          })
        }
        expect(firstDifference(found, expected)).toBe(-1)
      })
    })

    test("after a prefix that another sequence computed, in the same blocks or in copies", async () => {
      await withEngine({ path: file }, async (engine) => {
        const size = blocksFor(length, 16)
        const first = upTo(size)
        const shared = Math.floor(length / 16 / 2)
        await sequenceLogits(engine, tokens, first)
        const same = [...first.slice(0, shared), ...upTo(size - shared).map((i) => 100 + i)]
        expect(firstDifference(await sequenceLogits(engine, tokens, same, [length], shared * 16), expected.slice(shared * 16))).toBe(-1)
        const copies = first.map((block) => 80 + block)
        for (let i = 0; i < shared; i++) engine.copyBlock(first[i]!, copies[i]!)
        expect(firstDifference(await sequenceLogits(engine, tokens, copies, [length], shared * 16), expected.slice(shared * 16))).toBe(-1)
      })
    })

    test("with blocks exported by one engine and imported by another", async () => {
      await withEngine({ path: file, threads: 3 }, async (engine) => {
        const table = shuffled(upTo(160), randomNumbers(9)).slice(0, blocksFor(length, 16))
        exported.forEach((bytes, i) => engine.importBlock(table[i]!, bytes))
        expect(firstDifference(await sequenceLogits(engine, tokens, table, [length], half), expected.slice(half))).toBe(-1)
        const again = new Uint8Array(engine.info.blockBytes)
        exported.forEach((bytes, i) => {
          engine.exportBlock(table[i]!, again)
          expect(Buffer.compare(again, bytes)).toBe(0)
        })
        // What this engine computes itself is, byte for byte, what the other had computed.
        await sequenceLogits(engine, tokens, upTo(blocksFor(length, 16)), randomEnds(half, randomNumbers(2)))
        exported.forEach((bytes, i) => {
          engine.exportBlock(i, again)
          expect(Buffer.compare(again, bytes)).toBe(0)
        })
      })
    })

    test("whatever has been left in the blocks, infinities and NaN included", async () => {
      await withEngine({ path: file }, async (engine) => {
        const junk = new Uint8Array(engine.info.blockBytes)
        for (let i = 0; i < junk.length; i += 2) junk.set([i % 3, i % 4 === 0 ? 0x7c : 0xfe], i)
        const table = upTo(blocksFor(length, 16))
        for (const block of table) engine.importBlock(block, junk)
        const ends = randomEnds(length, randomNumbers(5))
        expect(firstDifference(await sequenceLogits(engine, tokens, table, ends), expected)).toBe(-1)
      })
    })
  })
}

const tinyPath = (name: string) => async (): Promise<string> => {
  const path = join(folder, `${name.replaceAll(/\W/g, "")}.gguf`)
  await writeTinyModel(path, { ...models, ...wideModels }[name])
  return path
}

// Long enough for three tiles of attention and for the many-row kernels.
for (const name of Object.keys(models)) invariance(name, 300, available, tinyPath(name))
for (const name of Object.keys(wideModels)) invariance(name, 300, available.slice(1), tinyPath(name))

/** Heads that are whole registers of codes, and such that are not; one, two, three and five queries to a key. */
const coded = [
  ["Q4_0, three heads to a KV head", "int4"],
  ["Q8_0, one KV head", "int8"],
  ["F16, odd sizes", "int8"],
  ["F32 and all others mixed", "int4"],
] as const
for (const [name, dtype] of coded) invariance(name, 270, available, tinyPath(name), { kvDtype: dtype })

const real = realModelPath()
if (real !== undefined) {
  // The reference takes seconds for it, so it runs once, for what is expected, and on all cores.
  invariance("SmolLM2-135M", 137, [best], async () => real, { threads: availableParallelism() })
}
