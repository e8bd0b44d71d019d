/** How large pools are, and which KV is the same KV, by dtype. */
import { describe, expect, it } from "vitest"
import { kvFormatId } from "../../actors/engine/worker.ts"
import { planKv } from "../../actors/node/kv-plan.ts"
import { kvDtypes, type Gguf, type GgufValue } from "../../kernels/index.ts"

/** SmolLM2-135M, but for its context, which is long enough for memory to be what limits the pool. */
const model = (headDim: number): Gguf => {
  const shape: Readonly<Record<string, GgufValue>> = { block_count: 30, context_length: 1 << 20, embedding_length: 576, "attention.head_count": 9, "attention.head_count_kv": 3, "attention.key_length": headDim }
  const metadata = new Map<string, GgufValue>([["general.architecture", "llama"], ...Object.entries(shape).map(([key, value]): [string, GgufValue] => [`llama.${key}`, value])])
  return { path: "model.gguf", version: 3, fileBytes: 0, metadata, tensors: [] }
}

describe("a pool", () => {
  const plan = (dtype: (typeof kvDtypes)[number]) => planKv(model(64), { blocks: "auto", blockTokens: 16, dtype, maxBatch: 32, freeBytes: 512 * 2 ** 20 })

  it("takes 128, 68 or 36 bytes for a key or a value of a head of 64 dimensions, by its dtype", () => {
    expect(kvDtypes.map((dtype) => plan(dtype).layerBlockBytes / (2 * 3 * 16))).toEqual([128, 68, 36])
  })

  it("of the same memory holds 1.88 or 3.56 times the tokens", () => {
    const [f16, int8, int4] = kvDtypes.map((dtype) => plan(dtype).blocks) as [number, number, number]
    expect(int8 / f16).toBeCloseTo(128 / 68, 1)
    expect(int4 / f16).toBeCloseTo(128 / 36, 1)
  })
})

it("KV of each dtype has a format of its own", () => {
  const parts = { modelDigest: "0".repeat(64), blockTokens: 16, numericsVersion: 1, device: "cpu" }
  expect(new Set(kvDtypes.map((dtype) => kvFormatId({ ...parts, dtype }))).size).toBe(kvDtypes.length)
})
