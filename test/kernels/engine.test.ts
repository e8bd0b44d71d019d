/** The engine as its callers see it: what it answers, what it refuses and how it closes. */
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { bestInstructionSet, Engine, numericsVersion, readGguf, type Batch, type EngineOptions } from "../../kernels/index.ts"
import { greedy, upTo } from "../support/engine-runs.ts"
import { realModelPath } from "../support/model.ts"
import { text, u32 } from "../support/gguf-writer.ts"
import { writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

let folder: string
let path: string
let files = 0

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-engine-"))
  path = await tiny({})
})
afterAll(() => rm(folder, { recursive: true, force: true }))

const tiny = async (options: TinyModelOptions): Promise<string> => {
  const file = join(folder, `tiny-${files++}.gguf`)
  await writeTinyModel(file, options)
  return file
}

const load = (options: Partial<EngineOptions> = {}): Promise<Engine> =>
  Engine.load({ path, blocks: 16, blockTokens: 8, threads: 2, maxRows: 32, maxOutputs: 8, ...options })

/** A batch of one sequence in blocks 0, 1, …; outputs are [row, sampler, target, top]. */
const batch = (tokens: ReadonlyArray<number>, outputs: ReadonlyArray<ReadonlyArray<number>>, position = 0): Batch => ({
  tokens: Int32Array.from(tokens),
  segments: Int32Array.from([tokens.length, position, 0, 8]),
  blockTables: Int32Array.from(upTo(8)),
  outputs: Int32Array.from(outputs.flat()),
})

const sampler = (engine: Engine): number => engine.createSampler(greedy, Int32Array.from([5, 6, 7]), new Int32Array(0))

describe("a loaded engine", () => {
  let engine: Engine
  beforeAll(async () => {
    engine = await load({ maxContext: 100 })
  })
  afterAll(() => engine.close())

  test("describes the model and itself", () => {
    expect(engine.info).toEqual({
      architecture: "llama",
      layers: 2,
      hidden: 64,
      heads: 4,
      kvHeads: 2,
      headDim: 16,
      vocabulary: 320,
      contextLength: 100,
      blocks: 16,
      blockTokens: 8,
      kvDtype: "f16",
      blockBytes: 2 * 2 * 2 * 8 * 16 * 2,
      layerBlockBytes: 2 * 2 * 8 * 16 * 2,
      isa: bestInstructionSet(),
      threads: 2,
      device: "cpu",
    })
    expect(numericsVersion()).toBeGreaterThanOrEqual(1)
  })

  test("draws the most likely token and scores it with the log-softmax of the raw logits", async () => {
    const id = sampler(engine)
    const result = await engine.step({ ...batch([5, 6, 7], [[2, id, -1, 3]]), wantLogits: true })
    engine.freeSampler(id)
    const logits = [...result.logits!]
    const ranked = upTo(320).sort((a, b) => logits[b]! - logits[a]! || a - b)
    const logSum = Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit), 0))
    expect(result.tokens[0]).toBe(ranked[0])
    expect(result.logprobs[0]).toBeCloseTo(logits[ranked[0]!]! - logSum, 4)
    expect(result.topWidth).toBe(3)
    expect([...result.topTokens]).toEqual(ranked.slice(0, 3))
    result.topLogprobs.forEach((logprob, i) => expect(logprob).toBeCloseTo(logits[ranked[i]!]! - logSum, 4))
    expect(result.computeMs).toBeGreaterThan(0)
  })

  test("scores targets, several outputs of one row, and rows nothing is asked of", async () => {
    const result = await engine.step(batch([5, 6, 7, 8], [[0, -1, 6, 0], [1, -1, 7, 2], [1, -1, 9, -1], [3, -1, -1, 1]]))
    expect([...result.tokens]).toEqual([6, 7, 9, -1])
    expect(result.logprobs[0]).toBeLessThan(0)
    expect(result.logprobs[1]).toBeLessThan(0)
    expect(result.logprobs[2]).toBeNaN()
    expect(result.logprobs[3]).toBeNaN()
    expect(result.topWidth).toBe(2)
    expect([...result.topTokens].map((token) => token >= 0)).toEqual([false, false, true, true, false, false, true, false])
    expect(result.logits).toBeUndefined()
  })

  test("runs a step without outputs, as the first chunks of a prompt are", async () => {
    const result = await engine.step(batch([5, 6, 7], []))
    expect(result.tokens.length).toBe(0)
  })

  const refusals: ReadonlyArray<readonly [string, () => Batch, string]> = [
    ["no rows", () => batch([], []), "Batch.tokens: expected at least one row, found none"],
    ["too many rows", () => ({ ...batch(upTo(33), []) }), "Batch.tokens: expected at most 32, found 33"],
    ["too many outputs", () => batch([5], upTo(9).map(() => [0, -1, 1, 0])), "Batch.outputs: expected at most 8, found 9"],
    ["a token outside the vocabulary", () => batch([5, 320], []), "Batch.tokens[1]: 320 is not in 0 … 319"],
    ["a negative token", () => batch([-1], []), "Batch.tokens[0]: -1 is not in 0 … 319"],
    ["a row that is not there", () => batch([5, 6], [[2, -1, 1, 0]]), "Batch.outputs[0].row: 2 is not in 0 … 1"],
    ["a target outside the vocabulary", () => batch([5], [[0, -1, 320, 0]]), "Batch.outputs[0].target: 320 is not in -1 … 319"],
    ["more top tokens than there are", () => batch([5], [[0, -1, 1, 321]]), "Batch.outputs[0].top: 321 is not in -1 … 320"],
    ["a sampler that is not there", () => batch([5], [[0, 12345, -1, 0]]), "Batch.outputs[0].sampler: 12345 is not a live sampler"],
    ["positions beyond the context", () => batch([5, 6], [], 99), "Batch.segments[0].position: 99 is not in 0 … 98"],
    ["a negative position", () => batch([5], [], -1), "Batch.segments[0].position: -1 is not in 0 … 99"],
    ["too few blocks", () => batch([5, 6], [], 63), "Batch.segments[0].entries: expected at least 9 blocks for positions up to 64, found 8"],
    ["a block that is not there", () => ({ ...batch([5], []), blockTables: Int32Array.from([0, 1, 2, 3, 4, 5, 6, 16]) }), "Batch.blockTables[7]: 16 is not in 0 … 15"],
    ["a table that ends too early", () => ({ ...batch([5], []), blockTables: Int32Array.from([0, 1]) }), "Batch.segments[0].entries: 8 is not in 0 … 2"],
    ["segments that leave tokens over", () => ({ ...batch([5, 6], []), segments: Int32Array.from([1, 0, 0, 8]) }), "Batch.segments: expected rows that add up to the 2 tokens, found 1"],
    ["an empty segment", () => ({ ...batch([5], []), segments: Int32Array.from([0, 0, 0, 8]) }), "Batch.segments[0].rows: 0 is not in 1 … 1"],
    ["segments of three numbers", () => ({ ...batch([5], []), segments: Int32Array.from([1, 0, 0]) }), "Batch.segments: expected four numbers a segment, found 3"],
    [
      "two sequences that write one place",
      () => ({ ...batch([5, 6], []), segments: Int32Array.from([1, 4, 0, 8, 1, 4, 0, 8]) }),
      "Batch.segments[1]: position 4 falls into block 0 where another row of the step is written",
    ],
    ["tokens of another type", () => ({ ...batch([5], []), tokens: [5] as unknown as Int32Array }), "Batch.tokens: expected an Int32Array"],
    ["nothing at all", () => undefined as unknown as Batch, "Batch: expected an object"],
  ]
  test.each(refusals)("refuses %s", async (_, make, message) => {
    await expect(engine.step(make())).rejects.toThrow(message)
  })

  test("refuses a sampler that occurs twice, or together with a target", async () => {
    const id = sampler(engine)
    await expect(engine.step(batch([5], [[0, id, -1, 0], [0, id, -1, 0]]))).rejects.toThrow(`Batch.outputs[1].sampler: ${id} occurs twice in one step`)
    await expect(engine.step(batch([5], [[0, id, 3, 0]]))).rejects.toThrow("Batch.outputs[0]: expected a sampler or a target, found both")
    engine.freeSampler(id)
  })

  test("refuses a second step while one is in flight", async () => {
    const first = engine.step(batch([5, 6], []))
    await expect(engine.step(batch([5], []))).rejects.toThrow("step: another step is in flight")
    await first
  })

  test("counts samplers, and refuses to free one twice", () => {
    const before = engine.samplers
    const id = sampler(engine)
    expect(engine.samplers).toBe(before + 1)
    engine.freeSampler(id)
    expect(engine.samplers).toBe(before)
    expect(() => engine.freeSampler(id)).toThrow(`sampler: ${id} is not a live sampler`)
  })

  test("finishes a step whose sampler is freed meanwhile", async () => {
    const id = sampler(engine)
    const step = engine.step(batch([5, 6], [[1, id, -1, -1]]))
    engine.freeSampler(id)
    expect((await step).tokens.length).toBe(1)
  })

  test("refuses blocks that are not there and bytes of another length", () => {
    const bytes = new Uint8Array(engine.info.blockBytes)
    expect(() => engine.exportBlock(16, bytes)).toThrow("block: 16 is not in 0 … 15")
    expect(() => engine.importBlock(0, bytes.subarray(1))).toThrow("block bytes: expected 2048, found 2047")
    expect(() => engine.copyBlock(0, 16)).toThrow("to: 16 is not in 0 … 15")
    expect(() => engine.copyBlock(0.5, 1)).toThrow("from: expected an integer, found 0.5")
  })

  test("rejects a step whose logits are not finite, draws nothing, and goes on", async () => {
    const bytes = new Uint8Array(engine.info.blockBytes)
    const nan = new Uint8Array(bytes.length).fill(0xff)
    await engine.step(batch([5, 6, 7], []))
    engine.exportBlock(0, bytes)
    engine.importBlock(0, nan)
    const [good, bad] = [sampler(engine), sampler(engine)]
    const both: Batch = {
      tokens: Int32Array.from([8, 8]),
      segments: Int32Array.from([1, 0, 0, 1, 1, 3, 1, 1]),
      blockTables: Int32Array.from([1, 0]),
      outputs: Int32Array.from([0, good, -1, -1, 1, bad, -1, -1]),
    }
    await expect(engine.step(both)).rejects.toThrow("Batch.tokens[1]: the logits of this row are not finite")
    engine.importBlock(0, bytes)
    const after = await engine.step(both)
    const fresh = [sampler(engine), sampler(engine)]
    const again = await engine.step({ ...both, outputs: Int32Array.from([0, fresh[0]!, -1, -1, 1, fresh[1]!, -1, -1]) })
    expect([...after.tokens]).toEqual([...again.tokens])
    for (const id of [good, bad, ...fresh]) engine.freeSampler(id)
  })

  test("refuses sampler options by name", () => {
    const make = (options: object): (() => number) => () => engine.createSampler({ ...greedy, ...options }, new Int32Array(0), new Int32Array(0))
    expect(make({ temperature: -1 })).toThrow("temperature: -1 is not in 0 … ")
    expect(make({ temperature: Number.NaN })).toThrow("temperature: NaN is not in")
    expect(make({ topK: 1.5 })).toThrow("topK: expected an integer, found 1.5")
    expect(make({ topP: "x" })).toThrow("topP: expected a number")
    expect(make({ seed: 2 ** 53 })).toThrow("seed: 9007199254740992 is not in 0 … 9007199254740991")
    expect(make({ logitBias: [[1]] })).toThrow("logitBias[0]: expected [token, bias]")
    expect(() => engine.createSampler(greedy, Int32Array.from([320]), new Int32Array(0))).toThrow("320")
  })
})

describe("closing", () => {
  test("waits for the step in flight, may be repeated, and makes every later use an error", async () => {
    const engine = await load()
    const order: Array<string> = []
    const step = engine.step(batch(upTo(32), [[31, -1, 1, 0]])).then((result) => order.push(`step ${result.tokens[0]}`))
    const closed = engine.close().then(() => order.push("closed"))
    await expect(engine.step(batch([1], []))).rejects.toThrow("engine: it is closed")
    await Promise.all([step, closed, engine.close()])
    expect(order).toEqual(["step 1", "closed"])
    await engine.close()
    await expect(engine.step(batch([1], []))).rejects.toThrow("engine: it is closed")
    expect(() => engine.samplers).toThrow("engine: it is closed")
    expect(() => sampler(engine)).toThrow("engine: it is closed")
    expect(() => engine.exportBlock(0, new Uint8Array(engine.info.blockBytes))).toThrow("engine: it is closed")
    expect(() => engine.copyBlock(0, 1)).toThrow("engine: it is closed")
  })

  test("an engine that nobody keeps is collected, threads and all", async () => {
    setFlagsFromString("--expose-gc")
    const collect = runInNewContext("gc") as () => void
    const freed = new Set<number>()
    const registry = new FinalizationRegistry((i: number) => freed.add(i))
    for (let i = 0; i < 10; i++) registry.register(await load({ threads: 3 }), i)
    for (let round = 0; round < 50 && freed.size < 9; round++) {
      collect()
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    expect(freed.size).toBeGreaterThanOrEqual(9) // a register may still hold the last one
  })
})

describe("loading", () => {
  test("takes the instruction set as a ceiling", async () => {
    for (const [isa, expected] of [["reference", "reference"], ["avx512", bestInstructionSet()]] as const) {
      const engine = await load({ isa })
      expect(engine.info.isa).toBe(expected)
      await engine.close()
    }
  })

  test("commits a large pool only where it is used", async () => {
    const before = process.memoryUsage.rss()
    const engine = await load({ blocks: 1 << 20 }) // 2 GiB
    await engine.step(batch([1, 2, 3], []))
    expect(process.memoryUsage.rss() - before).toBeLessThan(512 * 2 ** 20)
    await engine.close()
  })

  const options: ReadonlyArray<readonly [Partial<EngineOptions>, string]> = [
    [{ threads: 0 }, "threads: expected a positive integer, found 0"],
    [{ threads: 5000 }, "threads: 5000 is not in 1 … 1024"],
    [{ blocks: 1.5 }, "blocks: expected a positive integer, found 1.5"],
    [{ maxContext: 513 }, "maxContext: expected at most the model's 512, found 513"],
    [{ maxContext: 0 }, "maxContext: 0 is not in 1"],
    [{ kvDtype: "int2" as "int4" }, "kvDtype: expected f16, int8 or int4"],
    [{ isa: "sse" as "avx2" }, "isa: expected reference, avx2 or avx512"],
    [{ path: "/nowhere/x.gguf" }, "x.gguf"],
  ]
  test.each(options)("refuses %o", async (wrong, message) => {
    await expect(load(wrong)).rejects.toThrow(message)
  })

  const files: ReadonlyArray<readonly [string, TinyModelOptions, string]> = [
    ["another architecture", { metadata: { "general.architecture": text("mamba") } }, "key general.architecture: expected one of: llama; found mamba"],
    ["a missing key", { metadata: { "llama.block_count": null } }, "llama.block_count"],
    ["a missing tensor", { metadata: { "llama.block_count": u32(3) } }, "blk.2.attn_norm.weight"],
    ["layers it does not know of", { metadata: { "llama.block_count": u32(1) } }, "tensor blk.1.attn_norm.weight: not known to the architecture llama"],
    ["a tensor of another shape", { metadata: { "llama.feed_forward_length": u32(128) } }, "tensor blk.0.ffn_gate.weight: expected [64, 128], found [64, 96]"],
    ["heads that do not divide", { metadata: { "llama.attention.head_count_kv": u32(3) } }, "key llama.attention.head_count_kv: expected a divisor of the 4 heads, found 3"],
    ["scaled rotary positions", { metadata: { "llama.rope.scaling.type": text("yarn") } }, "key llama.rope.scaling.type: expected none, found yarn"],
    ["experts", { metadata: { "llama.expert_count": u32(8) } }, "key llama.expert_count: expected 0"],
    ["an odd rotary dimension", { metadata: { "llama.rope.dimension_count": u32(15) } }, "key llama.rope.dimension_count: expected an even number, found 15"],
  ]
  test.each(files)("refuses a file with %s", async (_, wrong, message) => {
    const file = await tiny(wrong)
    await expect(load({ path: file })).rejects.toThrow(message)
    await expect(load({ path: file })).rejects.toThrow(file.slice(file.lastIndexOf("/") + 1))
  })

  test("refuses a tensor of a type that it does not compute with", async () => {
    const file = await tiny({})
    const bytes = await readFile(file)
    const name = "blk.0.ffn_up.weight"
    bytes.writeUInt32LE(24, bytes.indexOf(name) + name.length + 4 + 2 * 8) // I8, behind the number of dimensions and two of them
    await writeFile(file, bytes)
    await expect(load({ path: file })).rejects.toThrow(
      "tensor blk.0.ffn_up.weight: expected type F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K, found I8",
    )
  })
})

test.skipIf(realModelPath() === undefined)("SmolLM2 answers a question", async () => {
  const tokens = (await readGguf(realModelPath()!)).metadata.get("tokenizer.ggml.tokens") as ReadonlyArray<string>
  const prompt = "<|im_start|> user Ċ What Ġis Ġ 2 + 2 ? <|im_end|> Ċ <|im_start|> ass istant Ċ".split(" ").map((token) => tokens.indexOf(token))
  const engine = await load({ path: realModelPath()! })
  const id = engine.createSampler(greedy, Int32Array.from(prompt), new Int32Array(0))
  const answer: Array<string> = []
  for (let position = 0, next = prompt; answer.length < 16 && answer.at(-1) !== "<|im_end|>"; ) {
    const result = await engine.step(batch(next, [[next.length - 1, id, -1, -1]], position))
    position += next.length
    next = [result.tokens[0]!]
    answer.push(tokens[next[0]!]!)
  }
  await engine.close()
  expect(answer.join("").replaceAll("Ġ", " ")).toContain("4")
})
