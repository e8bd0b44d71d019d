import { execFile } from "node:child_process"
import { readFileSync } from "node:fs"
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { promisify } from "node:util"
import { afterAll, beforeAll, expect, it } from "vitest"
import { median, quantile } from "../../gateway/bench/figures.ts"
import { table } from "../../gateway/table.ts"
import { requantiseToQ40 } from "../../gateway/bench/requantise.ts"
import { quantise, dequantise } from "../support/quantise.ts"
import { readReferenceFile } from "../support/reference-forward.ts"
import { natsStartTimeoutMs } from "../support/start-nats.ts"
import { writeTinyModel } from "../support/tiny-model.ts"

const run = promisify(execFile)
const penstock = (...args: ReadonlyArray<string>) => run("npm", ["run", "-s", "penstock", "--", ...args])

let folder: string
let model: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-bench-"))
  model = join(folder, "tiny.gguf")
  await writeTinyModel(model, { types: { token_embd: "Q8_0", attn_q: "Q4_1", attn_k: "Q4_1", attn_v: "Q8_0", attn_output: "F16", ffn_gate: "F32", ffn_up: "Q4_0", ffn_down: "Q4_1" }, context: 4096 })
})
afterAll(() => rm(folder, { recursive: true, force: true }))

it("bench bus --json prints one JSON object, with every figure", async () => {
  const { stdout } = await penstock("bench", "bus", "--json")
  const { bus } = JSON.parse(stdout) as { bus: Record<"nats" | "memory", Record<string, number>> }
  for (const figures of [bus.nats, bus.memory]) {
    expect(Object.keys(figures).sort()).toEqual(["messagesPerS", "roundTripP50Us", "roundTripP99Us"])
    for (const figure of Object.values(figures)) expect(figure).toBeGreaterThan(0)
    expect(figures.roundTripP99Us).toBeGreaterThanOrEqual(figures.roundTripP50Us!)
  }
}, natsStartTimeoutMs)

it("bench kernels --json measures whole forwards of any model, and says how much of the machine they take", async () => {
  const { stdout } = await penstock("bench", "kernels", "--model", `file:${model}`, "--text", "README.md", "--json")
  const figures = JSON.parse(stdout) as Record<string, number | string | Record<string, number>>
  const rates = ["prefill512TokPerS", "prefill2048TokPerS", "decode1TokPerS", "decode8TokPerS", "decode16TokPerS"]
  expect(figures).toMatchObject({ model: "tiny", contextTokens: 512, perplexityTokens: 4095 })
  expect(figures).not.toHaveProperty("peer")
  for (const name of [...rates, "loadToFirstTokenMs", "perplexity", "peakGmacPerS", "peakReadGbPerS"]) expect(figures[name], name).toBeGreaterThan(0)
  for (const part of ["fastest", "macShare", "bandwidthShare"]) expect(Object.keys(figures[part] as object)).toEqual(rates)
  for (const share of Object.values(figures["macShare"] as Record<string, number>)) expect(share).toBeLessThan(1)
}, natsStartTimeoutMs)

it("a runtime to compare with that is not installed is an error that says how to install it", async () => {
  const without = (vs: string) => run("npm", ["run", "-s", "penstock", "--", "bench", "kernels", "--model", `file:${model}`, "--vs", vs], { env: { ...process.env, PENSTOCK_NODE_LLAMA_CPP: folder, PENSTOCK_OPENVINO_PYTHON: join(folder, "python") } })
  await expect(without("llama.cpp")).rejects.toMatchObject({ code: 1, stderr: expect.stringMatching(/npm install --no-save --ignore-scripts node-llama-cpp@[\d.]+/) })
  await expect(without("openvino")).rejects.toMatchObject({ code: 1, stderr: expect.stringMatching(/pip install openvino-genai==[\d.]+/) })
})

it("requantising to Q4_0 changes every matrix but the embedding, as the independent codec does, and nothing else", () => {
  const path = join(folder, "q4_0.gguf")
  requantiseToQ40(model, path)
  const [before, after] = [readReferenceFile(model), readReferenceFile(path)]
  expect([...after.metadata]).toEqual([...before.metadata])
  expect([...after.tensors.keys()]).toEqual([...before.tensors.keys()])
  let different = 0
  let bytes = 0
  for (const [name, { type, shape, bytes: old }] of before.tensors) {
    const found = after.tensors.get(name)!
    expect(found.shape).toEqual(shape)
    if (shape.length === 1 || name === "token_embd.weight" || type === "Q4_0") {
      expect(Buffer.compare(found.bytes, old), name).toBe(0)
      continue
    }
    expect(found.type).toBe("Q4_0")
    const weights = new Float32Array(shape[0]! * shape[1]!)
    dequantise(type, old, weights)
    const expected = quantise("Q4_0", weights)
    expect(found.bytes.length).toBe(expected.length)
    // ggml rounds against the scale before that is a half, the codec of the tests against the half.
    bytes += expected.length
    different += expected.reduce((sum, byte, i) => sum + (byte === found.bytes[i] ? 0 : 1), 0)
  }
  expect(different / bytes).toBeLessThan(0.01)
  expect(readFileSync(path).length).toBeLessThan(readFileSync(model).length)
})

it("an unknown bench is a wrong command line", async () => {
  await expect(penstock("bench", "everything")).rejects.toMatchObject({ code: 2 })
  await expect(penstock("pull", "smollm2-135m", "--json")).rejects.toMatchObject({ code: 2 })
  await expect(penstock("bench", "bus", "--vs", "llama.cpp")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("belong to bench kernels") })
  await expect(penstock("pull", "smollm2-135m", "--text", "x")).rejects.toMatchObject({ code: 2 })
  await expect(penstock("bench", "kernels", "--device", "gpu")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("expected cpu, cuda or cuda:N") })
  // Whatever is there, the ninety-eighth device is not.
  await expect(penstock("bench", "kernels", "--model", `file:${model}`, "--device", "cuda:97")).rejects.toMatchObject({ code: 1, stderr: expect.stringMatching(/^cuda:97: (the CUDA addon is not built|found)/m) })
  await expect(penstock("bench", "kernels", "--vs", "everything")).rejects.toMatchObject({ code: 2, stderr: expect.stringContaining("llama.cpp, openvino") })
})

it("figures are medians, quantiles and aligned columns", () => {
  expect([median([3, 1, 2]), median([4, 1, 2, 3])]).toEqual([2, 2.5])
  expect([quantile([5, 1, 3], 0.5), quantile([5, 1, 3], 0.99)]).toEqual([3, 5])
  expect(table([["a", "bb"], ["ccc", "d"]])).toBe("a    bb\nccc   d")
})
