/** The addon that nvcc has built, on a machine without what it needs: it loads, and says so. */
import { existsSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { expect, test } from "vitest"
import { deviceFacts, Engine } from "../../kernels/index.ts"
import { hasGpu } from "../../config/cuda-build.mjs"

const addon = fileURLToPath(new URL("../../build/cuda/penstock-cuda.node", import.meta.url))

test.runIf(!hasGpu())("without a driver: what was found and what is needed", async () => {
  expect(existsSync(addon)).toBe(true)
  const message = /^cuda:0: found no NVIDIA driver; this addon needs one for CUDA 13\.0 or later \(580 or later\), or set device: cpu/
  expect(() => deviceFacts("cuda:0", addon)).toThrow(message)
  await expect(Engine.load({ path: "/nowhere.gguf", blocks: 1, blockTokens: 16, threads: 1, maxRows: 1, maxOutputs: 1, device: "cuda:0", cudaAddon: addon })).rejects.toThrow(message)
})
