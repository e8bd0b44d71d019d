/**
 * The engine on a device, from end to end: on the one of the host's, or on a GPU where main.ts says so. Its numerics are its own
 * (weights of 4 and 8 bits times halves), so it is held against an exact forward, and its bits against itself.
 */
import { readFileSync } from "node:fs"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { crc32c, deviceFacts, Engine, kvDtypes, type EngineOptions } from "../../kernels/index.ts"
import { importAwq } from "../../gateway/import/import-awq.ts"
import { writeAwqFolder } from "../support/awq-folder.ts"
import { firstDifference, greedy, sequenceLogits, stepLogits, upTo } from "../support/engine-runs.ts"
import { realModelPath } from "../support/model.ts"
import { readReferenceFile, referenceLogits, relativeError } from "../support/reference-forward.ts"
import { Sequence } from "../support/sequence.ts"
import { randomNumbers, writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const cudaAddon = process.env["PENSTOCK_CUDA_ADDON"]
const onGpu = process.env["PENSTOCK_TEST_GPU"] === "1"
/** The shim has two; of GPUs one is enough. */
const devices = onGpu ? ["cuda:0"] : ["cuda:0", "cuda:1"]

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-cuda-"))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

let files = 0
const load = async ({ model = {}, ...options }: Partial<EngineOptions> & { readonly model?: TinyModelOptions }): Promise<Engine> => {
  const path = join(folder, `tiny-${files++}.gguf`)
  if (options.path === undefined) await writeTinyModel(path, model)
  return Engine.load({ path, blocks: 24, blockTokens: 16, threads: 2, maxRows: 128, maxOutputs: 128, device: "cuda:0", cudaAddon, ...options })
}

const someTokens = (count: number, vocabulary: number): Array<number> => upTo(count).map((i) => (3 + i * i * 37 + i * 11) % vocabulary)

const floats = (row: Buffer): Float32Array => new Float32Array(row.buffer, row.byteOffset, row.byteLength / 4)

/** Of two logits the exact forward must lead by this for the device to have to agree. */
const leastLead = 0.6

const expectClose = (rows: ReadonlyArray<Buffer>, exact: ReadonlyArray<Float64Array>): void =>
  rows.forEach((row, n) => expect(relativeError(floats(row), exact[n]!), `position ${n}`).toBeLessThan(0.02))

/** Every position whose lead is clear has the exact forward's token; how many were clear. */
const expectFollows = (rows: ReadonlyArray<Buffer>, exact: ReadonlyArray<{ readonly argmax: number; readonly gap: number }>): number => {
  let clear = 0
  rows.forEach((row, n) => {
    if (exact[n]!.gap <= leastLead) return
    clear++
    const logits = floats(row)
    expect(logits.indexOf(logits.reduce((a, b) => Math.max(a, b))), `position ${n}`).toBe(exact[n]!.argmax)
  })
  return clear
}

const leadOf = (logits: Float64Array): { readonly argmax: number; readonly gap: number } => {
  const order = [...logits.keys()].sort((a, b) => logits[b]! - logits[a]!)
  return { argmax: order[0]!, gap: logits[order[0]!]! - logits[order[1]!]! }
}

const superBlocks = { hidden: 256, heads: 8, kvHeads: 2, headDim: 32, ffn: 256, layers: 1, tied: false } as const
const models: Readonly<Record<string, TinyModelOptions>> = {
  "F32, F16 and BF16": { types: { token_embd: "F16", attn_q: "F32", attn_k: "BF16", attn_v: "F16", attn_output: "BF16", ffn_gate: "F32", ffn_up: "F16", ffn_down: "F32" } },
  "Q4_0 and Q8_0": { types: { token_embd: "Q8_0", attn_q: "Q4_0", attn_k: "Q8_0", attn_v: "Q4_0", attn_output: "Q4_0", ffn_gate: "Q8_0", ffn_up: "Q4_0", ffn_down: "Q4_0" }, heads: 6, kvHeads: 2, hidden: 96, ffn: 160 },
  "Q4_1, Q5_0 and Q5_1": { types: { token_embd: "Q8_0", attn_q: "Q4_1", attn_k: "Q5_0", attn_v: "Q5_1", attn_output: "Q4_1", ffn_gate: "Q5_1", ffn_up: "Q5_0", ffn_down: "Q4_1" } },
  "AWQ's three tensors": { awq: true, types: { token_embd: "F16" }, hidden: 128, heads: 4, kvHeads: 2, headDim: 32, ffn: 256 },
  "Q4_K, Q5_K and Q6_K": { types: { token_embd: "Q4_K", output: "Q6_K", attn_q: "Q4_K", attn_k: "Q5_K", attn_v: "Q6_K", attn_output: "Q4_K", ffn_gate: "Q4_K", ffn_up: "Q5_K", ffn_down: "Q6_K" }, ...superBlocks },
}

describe.each(Object.entries(models))("a tiny model in %s", (_, model) => {
  test("follows the exact forward wherever its first two logits are more than 0.6 apart, and is close to it everywhere", async () => {
    const engine = await load({ model })
    const path = join(folder, `tiny-${files - 1}.gguf`)
    const tokens = someTokens(40, engine.info.vocabulary)
    const rows = await sequenceLogits(engine, tokens, [3, 1, 2], [31, 40])
    const exact = referenceLogits(readReferenceFile(path), tokens)
    expect(expectFollows(rows, exact.map(leadOf))).toBeGreaterThan(10)
    expectClose(rows, exact)
    await engine.close()
  })
})

test("a folder in AWQ, imported, is close to an exact forward in Hugging Face's rotation", async () => {
  const unpermuted = await writeAwqFolder(join(folder, "awq"), { tied: false })
  const path = join(folder, "imported.gguf")
  await importAwq(join(folder, "awq"), path)
  const engine = await load({ path })
  const tokens = someTokens(40, engine.info.vocabulary)
  expectClose(await sequenceLogits(engine, tokens, [3, 1, 2], [31, 40]), referenceLogits(readReferenceFile(unpermuted), tokens, { halves: true }))
  await engine.close()
})

describe.each(kvDtypes)("KV in %s", (kvDtype) => {
  test("the same bits in one chunk, in many, alone, in a crowd, from a prefix that was found, and after export and import", async () => {
    const random = randomNumbers(7)
    const model: TinyModelOptions = { types: "Q4_1", headDim: 32, heads: 6, kvHeads: 2, layers: 2 }
    const engine = await load({ model, kvDtype })
    const path = join(folder, `tiny-${files - 1}.gguf`)
    const tokens = someTokens(150, engine.info.vocabulary)
    const table = [9, 2, 11, 4, 0, 7, 15, 3, 8, 1]
    const whole = await sequenceLogits(engine, tokens, table, [128, 150])
    expect(firstDifference(await sequenceLogits(engine, tokens, table, [1, 2, 19, 20, 97, 130, 149, 150]), whole)).toBe(-1)
    // Rows of four sequences in one step, at the end of a prefix that lies in the pool.
    const crowd = await stepLogits(engine, [
      { tokens: someTokens(9, 300), from: 0, to: 9, table: [20] },
      { tokens, from: 149, to: 150, table },
      { tokens: someTokens(1, 200), from: 0, to: 1, table: [21] },
      { tokens: upTo(20).map(() => Math.floor(random() * 300)), from: 0, to: 20, table: [22, 23] },
    ])
    expect(crowd[1]![0]!.equals(whole[149]!)).toBe(true)
    // Decode rows only: a graph of the next larger number of rows.
    const decode = await stepLogits(engine, upTo(3).map((i) => (i === 1 ? { tokens, from: 149, to: 150, table } : { tokens: [i], from: 0, to: 1, table: [20 + i] })))
    expect(decode[1]![0]!.equals(whole[149]!)).toBe(true)
    // Out and into other blocks, of a new engine.
    const other = await load({ path, kvDtype })
    const { layers, layerBlockBytes } = engine.info
    const bytes = new Uint8Array(3 + 9 * layers * layerBlockBytes)
    const crc = engine.exportLayers(Int32Array.from(table.slice(0, 9)), 0, layers, bytes, 3, 0)
    const there = upTo(9).map((i) => 18 - i)
    expect(other.importLayers(Int32Array.from(there), 0, layers, bytes, 3, 0, crc)).toBe(true)
    expect(firstDifference(await sequenceLogits(other, tokens, [...there, 19], [150], 144), whole.slice(144))).toBe(-1)
    // From pool to pool, of one device and, where there are two, of another; into blocks in another order, layer by layer.
    for (const device of devices) {
      const near = await load({ path, kvDtype, device, blocks: 30 })
      expect(near.canCopy(engine) && engine.canCopy(near)).toBe(true)
      for (const layer of upTo(layers)) near.copyLayers(engine, Int32Array.from(table.slice(0, 9)), layer, 1, Int32Array.from(there))
      expect(firstDifference(await sequenceLogits(near, tokens, [...there, 19], [150], 144), whole.slice(144))).toBe(-1)
      await near.close()
    }
    await engine.close()
    await other.close()
  })
})

test("KV is copied between devices though it is more than their staging holds, and never to a CPU", async () => {
  const model: TinyModelOptions = { types: "Q8_0", headDim: 128, heads: 8, kvHeads: 8, layers: 4 }
  const path = join(folder, `tiny-${files}.gguf`)
  const engine = await load({ model, blocks: 24 })
  const random = randomNumbers(9)
  const blocks = Int32Array.from(upTo(20))
  const bytes = new Uint8Array(20 * engine.info.blockBytes).map(() => random() * 256)
  expect(bytes.length).toBeGreaterThan(4 << 20)
  expect(engine.importLayers(blocks, 0, 4, bytes, 0, 0, crc32c(bytes, 0))).toBe(true)
  const host = await load({ path, device: "cpu" })
  expect([host.canCopy(engine), engine.canCopy(host)]).toEqual([false, false])
  expect(() => host.copyLayers(engine, blocks, 0, 4, blocks)).toThrow("from: expected an engine of the same addon")
  for (const device of devices) {
    const other = await load({ path, device })
    const there = blocks.map((block) => 23 - block)
    other.copyLayers(engine, blocks, 0, 4, there)
    expect(other.exportLayers(there, 0, 4, new Uint8Array(bytes.length), 0, 0)).toBe(crc32c(bytes, 0))
    await other.close()
  }
  await engine.close()
  await host.close()
})

test("drawn tokens are the same alone and in a crowd, on the device and, with a penalty that changes nothing, on the host", async () => {
  const engine = await load({ model: { types: "Q8_0", layers: 1 } })
  const options = [greedy, { ...greedy, temperature: 0.9, seed: 5 }, { ...greedy, temperature: 1.1, topK: 20, topP: 0.9, seed: 6 }, { ...greedy, temperature: 0.8, topP: 0.8, minP: 0.02, seed: 7 }]
  const prompt = someTokens(12, 320)
  const tables = options.map((_, i) => [2 * i, 2 * i + 1])
  const draw = async (which: ReadonlyArray<number>, onHost: boolean): Promise<Array<Array<number>>> => {
    const samplers = which.map((i) => engine.createSampler({ ...options[i]!, ...(onHost ? { logitBias: [[0, 0] as const] } : {}) }, Int32Array.from(prompt), new Int32Array(0)))
    const out: Array<Array<number>> = which.map(() => [])
    let tokens = which.map(() => prompt)
    for (let step = 0, position = 0; step < 8; step++) {
      const width = tokens[0]!.length
      const result = await engine.step({
        tokens: Int32Array.from(tokens.flat()),
        segments: Int32Array.from(which.flatMap((_, i) => [width, position, 2 * i, 2])),
        blockTables: Int32Array.from(which.flatMap((i) => tables[i]!)),
        outputs: Int32Array.from(which.flatMap((_, i) => [(i + 1) * width - 1, samplers[i]!, -1, step % 3 === 0 ? 1 : -1])),
      })
      position += width
      tokens = [...result.tokens].map((token) => [token])
      result.tokens.forEach((token, i) => out[i]!.push(token))
    }
    samplers.forEach((id) => engine.freeSampler(id))
    return out
  }
  const together = await draw([0, 1, 2, 3], false)
  expect(await draw([0, 1, 2, 3], true)).toEqual(together)
  for (const i of upTo(4)) expect(await draw([i], false)).toEqual([together[i]])
  await engine.close()
})

test("layers are told while a step runs, and may be exported then", async () => {
  const engine = await load({ model: { types: "Q4_0", layers: 3 } })
  const tokens = someTokens(40, 320)
  const told: Array<number> = []
  await engine.step({ tokens: Int32Array.from(tokens), segments: Int32Array.of(40, 0, 0, 3), blockTables: Int32Array.of(1, 2, 3), outputs: new Int32Array(0) }, (layer) => {
    told.push(layer)
    engine.exportLayers(Int32Array.of(1, 2, 3), layer, 1, new Uint8Array(3 * engine.info.layerBlockBytes), 0, 0)
  })
  expect(told).toEqual([0, 1, 2])
  await engine.close()
})

test("damaged KV rejects the step that reads it, and no other", async () => {
  const engine = await load({ model: { types: "F16", layers: 1 } })
  engine.importBlock(3, new Uint8Array(engine.info.blockBytes).fill(0xff))
  const sequence = new Sequence(engine)
  const bad = { tokens: Int32Array.of(5, 6), segments: Int32Array.of(1, 4, 0, 1, 1, 0, 1, 1), blockTables: Int32Array.of(3, 5), outputs: Int32Array.of(0, -1, 7, 0, 1, -1, 7, 0) }
  await expect(engine.step(bad)).rejects.toThrow("the logits of this row are not finite")
  const good = await sequence.feed([1, 2, 3], [{ row: 2, top: 0, target: 4 }])
  expect(Number.isFinite(good.logprobs[0])).toBe(true)
  await engine.close()
})

describe("what a device cannot do is refused by name", () => {
  test.runIf(!onGpu)("too little memory", async () => {
    await expect(load({ blocks: 4_000_000 })).rejects.toThrow(/cuda:0 .*: needs \d+ MiB: weights \d+ MiB, KV pool \d+ MiB \(4000000 blocks\), step arena \d+ MiB, staging \d+ MiB; \d+ MiB of \d+ MiB are free/)
  })
  test("a device that is not there", async () => {
    await expect(load({ device: "cuda:97" })).rejects.toThrow(/cuda:97: found \d+ CUDA device/)
    expect(() => deviceFacts("cuda:97", cudaAddon)).toThrow(/cuda:97: found \d+ CUDA device/)
  })
  test("heads and blocks of other sizes", async () => {
    await expect(load({ model: { headDim: 24 } })).rejects.toThrow("heads of a multiple of 16 dimensions")
    await expect(load({ blockTokens: 4 })).rejects.toThrow("kv.blockTokens: expected a multiple of 8, found 4")
  })
  test("an addon that is not built", async () => {
    await expect(load({ cudaAddon: "/nowhere/penstock-cuda.node" })).rejects.toThrow(/cuda:0: the CUDA addon is not built .*npm run cuda:build/)
  })
})

test("SmolLM2-135M follows the exact forward wherever its first two logits are more than 0.6 apart", async () => {
  const path = realModelPath()
  if (path === undefined) throw new Error("the real model is not in the cache: npm run -s penstock -- pull smollm2-135m")
  const fixture = JSON.parse(readFileSync(new URL("../fixtures/smollm2-teacher-forced.json", import.meta.url), "utf8")) as Record<"tokens" | "argmax" | "gap", Array<number>>
  const count = onGpu ? 1024 : 24
  const engine = await load({ path, blocks: 80, maxRows: onGpu ? 512 : 32, maxOutputs: onGpu ? 512 : 32 })
  const table = upTo(Math.ceil(count / 16))
  const ends = onGpu ? [512, 1024] : [16, 24]
  const rows = await sequenceLogits(engine, fixture.tokens.slice(0, count), table, ends)
  const clear = expectFollows(rows, upTo(count).map((n) => ({ argmax: fixture.argmax[n]!, gap: fixture.gap[n]! })))
  expect(clear).toBeGreaterThan(count / 3)
  await engine.close()
})
