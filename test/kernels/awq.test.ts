/** AWQ's three tensors for a matrix, on the CPU: repacked as Q4_1's, and refused by name where they are not what they should be. */
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, expect, test } from "vitest"
import { Engine } from "../../kernels/index.ts"
import { awqAsQ4 } from "../support/awq.ts"
import { firstDifference, sequenceLogits, upTo } from "../support/engine-runs.ts"
import { ggufBytes, type TensorToWrite } from "../support/gguf-writer.ts"
import { readReferenceFile, referenceLogits, relativeError } from "../support/reference-forward.ts"
import { tinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const shape: TinyModelOptions = { awq: true, types: { token_embd: "F16" }, hidden: 128, heads: 4, kvHeads: 2, headDim: 32, ffn: 256 }
const tokens = upTo(40).map((i) => (3 + i * i * 37 + i * 11) % 320)

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-awq-"))
})
afterAll(() => rm(folder, { recursive: true }))

const path = (): string => join(folder, "tiny.gguf")

/** The logits of a tiny model of which `change` has made other tensors. */
const logitsOf = async (change: (tensors: ReadonlyArray<TensorToWrite>) => ReadonlyArray<TensorToWrite>, options = shape): Promise<Array<Buffer>> => {
  const { metadata, tensors } = tinyModel(options)
  await writeFile(path(), ggufBytes({ metadata, tensors: change(tensors) }))
  const engine = await Engine.load({ path: path(), blocks: 4, blockTokens: 16, threads: 2, maxRows: 40, maxOutputs: 40 })
  const rows = await sequenceLogits(engine, tokens, [2, 0, 3])
  await engine.close()
  return rows
}

const asQ4 = (tensors: ReadonlyArray<TensorToWrite>): ReadonlyArray<TensorToWrite> =>
  tensors.flatMap((tensor) => {
    const [name, part] = [tensor.name.slice(0, tensor.name.lastIndexOf(".")), tensor.name.split(".").at(-1)]
    const data = (of: string): Uint8Array => tensors.find((each) => each.name === `${name}.${of}`)!.data
    if (part === "qzeros" || part === "scales") return []
    if (part !== "qweight") return [tensor]
    const [words, inputs] = tensor.shape.map(Number)
    return [awqAsQ4(name, { qweight: tensor.data, qzeros: data("qzeros"), scales: data("scales") }, { outputs: 8 * words!, inputs: inputs! })]
  })

test("logits are those of the float64 forward over (level - zero) * scale, within what int8 activations cost", async () => {
  const rows = await logitsOf((tensors) => tensors)
  const exact = referenceLogits(readReferenceFile(path()), tokens)
  const errors = rows.map((row, n) => relativeError(new Float32Array(row.buffer, row.byteOffset, 320), exact[n]!)).sort((a, b) => a - b)
  expect(errors.at(-1)).toBeLessThan(0.1)
  expect(errors[20]).toBeLessThan(0.04)
})

test("the same bits as from a file in Q4_1 with the same levels and scales, and offsets of -zero * scale", async () => {
  expect(firstDifference(await logitsOf((tensors) => tensors), await logitsOf(asQ4))).toBe(-1)
})

/** The model's tensors with the one of this name replaced, or without it. */
const replaced = (name: string, by: (tensor: TensorToWrite) => ReadonlyArray<TensorToWrite>) => (tensors: ReadonlyArray<TensorToWrite>) =>
  tensors.flatMap((tensor) => (tensor.name === name ? by(tensor) : [tensor]))

test.each(["qweight", "qzeros", "scales"])("a missing %s is named", async (part) => {
  await expect(logitsOf(replaced(`blk.1.ffn_up.${part}`, () => []))).rejects.toThrow(`tensor blk.1.ffn_up.${part}: expected, found none`)
})

test("so is a tensor of another shape or type, a weight beside the three, and a scale that is not finite", async () => {
  const refused = (name: string, by: (tensor: TensorToWrite) => ReadonlyArray<TensorToWrite>) => expect(logitsOf(replaced(name, by))).rejects
  await refused("blk.0.attn_k.qweight", (tensor) => [{ ...tensor, shape: [128, 8] }]).toThrow("tensor blk.0.attn_k.qweight: expected I32 [8, 128], found I32 [128, 8]")
  await refused("blk.0.attn_k.qzeros", (tensor) => [{ ...tensor, type: "F32" }]).toThrow("tensor blk.0.attn_k.qzeros: expected I32 [8, 1], found F32 [8, 1]")
  await refused("blk.0.ffn_down.scales", (tensor) => [{ ...tensor, shape: [256] }]).toThrow("tensor blk.0.ffn_down.scales: expected F16 [128, 2], found F16 [256]")
  await refused("blk.0.attn_v.scales", (tensor) => [tensor, { name: "blk.0.attn_v.weight", type: "F32", shape: [128, 64], data: new Uint8Array(4 * 128 * 64) }]).toThrow(
    "tensor blk.0.attn_v.weight: expected it or blk.0.attn_v.qweight, .qzeros and .scales, found both",
  )
  await refused("blk.0.ffn_down.scales", ({ data, ...tensor }) => [{ ...tensor, data: data.slice().fill(0x7c, 2 * 128 + 1, 2 * 128 + 2) }]).toThrow(
    "tensor blk.0.ffn_down.scales, row 1: expected values up to 4364, found inf",
  )
  await refused("token_embd.weight", (tensor) => [tensor, { name: "output.qweight", type: 26, shape: [40, 128], data: new Uint8Array(4 * 40 * 128) }]).toThrow("tensor output.qweight: not known to the architecture llama")
})

test("inputs that are no multiple of 128 are refused", async () => {
  await expect(logitsOf((tensors) => [...tensors.filter(({ name }) => name !== "blk.0.attn_q.weight"), { name: "blk.0.attn_q.qweight", type: 26, shape: [8, 64], data: new Uint8Array(4 * 8 * 64) }], {})).rejects.toThrow(
    "tensor blk.0.attn_q.qweight: expected a multiple of 8 outputs and of 128 inputs, found a matrix of 64 outputs and 64 inputs",
  )
})
