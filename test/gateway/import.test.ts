/** A Hugging Face folder in AWQ becomes a model file that says what the folder said, or is refused by name and leaves nothing. */
import { spawnSync } from "node:child_process"
import { existsSync, readFileSync } from "node:fs"
import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { fileURLToPath } from "node:url"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { Tokenizer } from "../../actors/request/tokenizer.ts"
import { programArguments } from "../../config/programs.mjs"
import { toHalves } from "../../gateway/import/convert.ts"
import { importAwq } from "../../gateway/import/import-awq.ts"
import { Engine, readGguf } from "../../kernels/index.ts"
import { awqShape, writeAwqFolder, type AwqFolder } from "../support/awq-folder.ts"
import { sequenceLogits, upTo } from "../support/engine-runs.ts"
import { halfOfNumber } from "../support/quantise.ts"
import { readReferenceFile, referenceLogits, relativeError } from "../support/reference-forward.ts"
import { startNode } from "../support/start-node.ts"

let scratch: string
beforeAll(async () => {
  scratch = await mkdtemp(join(tmpdir(), "penstock-import-"))
})
afterAll(() => rm(scratch, { recursive: true }))

let count = 0
const places = () => {
  const folder = join(scratch, `folder-${count++}`)
  return { folder, file: `${folder}-imported.gguf` }
}

const tokens = upTo(40).map((i) => (3 + i * i * 37 + i * 11) % 320)
const logitsOf = async (path: string): Promise<ReadonlyArray<Float32Array>> => {
  const engine = await Engine.load({ path, blocks: 4, blockTokens: 16, threads: 2, maxRows: 40, maxOutputs: 40 })
  const rows = await sequenceLogits(engine, tokens, [2, 0, 3])
  await engine.close()
  return rows.map((row) => new Float32Array(row.buffer, row.byteOffset, row.byteLength / 4))
}

describe("what is imported", () => {
  test.each([
    { name: "one file, the head is the embedding", tied: true, shards: 1 },
    { name: "three files and a head of its own", tied: false, shards: 3 },
  ])("computes what a forward in Hugging Face's rotation does: $name", async ({ tied, shards }) => {
    const { folder, file } = places()
    const unpermuted = await writeAwqFolder(folder, { tied, shards })
    expect(await importAwq(folder, file)).toEqual(["model.embed_tokens.weight: BF16 has become F16"])
    const found = await logitsOf(file)
    const errorsTo = (halves: boolean): ReadonlyArray<number> => {
      const exact = referenceLogits(readReferenceFile(unpermuted), tokens, { halves })
      return found.map((row, n) => relativeError(row, exact[n]!)).sort((a, b) => a - b)
    }
    // What int8 activations cost; the other rotation is another model.
    expect(errorsTo(true).at(-1)).toBeLessThan(0.1)
    expect(errorsTo(true)[20]).toBeLessThan(0.04)
    expect(errorsTo(false)[20]).toBeGreaterThan(0.2)
  })

  test("has the folder's tokens, template and ends", async () => {
    const { folder, file } = places()
    const unpermuted = await writeAwqFolder(folder)
    await importAwq(folder, file)
    const [imported, tiny] = [await readGguf(file), await readGguf(unpermuted)]
    const [found, wanted] = [new Tokenizer(imported.metadata), new Tokenizer(tiny.metadata)]
    const text = "<|im_start|>The wheel turns 1234 stones,\n\tand the water — wäre es <|im_end|>"
    for (const special of [true, false]) expect(found.encode(text, { special })).toEqual(wanted.encode(text, { special }))
    expect([...found.endOfGeneration].sort()).toEqual([0, 2])
    expect({ vocabulary: found.vocabulary, bos: found.bos, addBos: found.addBos }).toEqual({ vocabulary: awqShape.vocabulary, bos: 1, addBos: false })
    for (const key of ["tokenizer.chat_template", "llama.context_length", "llama.rope.freq_base"]) expect(imported.metadata.get(key)).toEqual(tiny.metadata.get(key))
  })

  test("has BOS put before a text where tokenizer.json's template does", async () => {
    const { folder, file } = places()
    await writeAwqFolder(folder, {
      change: ({ json }) => Object.assign(json["tokenizer.json"]!, { post_processor: { type: "Sequence", processors: [{ type: "ByteLevel" }, { type: "TemplateProcessing", single: [{ SpecialToken: { id: "<|im_start|>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }] }] } }),
    })
    await importAwq(folder, file)
    expect(new Tokenizer((await readGguf(file)).metadata).encode("water", { special: false, bos: true })[0]).toBe(1)
  })

  test("scales the rotation as Llama 3.1 does: short wavelengths stay, long ones are divided", async () => {
    const { folder, file } = places()
    const scaling = { rope_type: "llama3", factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 256 }
    await writeAwqFolder(folder, { change: ({ json }) => Object.assign(json["config.json"]!, { rope_scaling: scaling }) })
    await importAwq(folder, file)
    const { bytes } = readReferenceFile(file).tensors.get("rope_freqs.weight")!
    const factors = new Float32Array(Uint8Array.from(bytes).buffer)
    // As transformers writes it.
    const expected = upTo(16).map((i) => {
      const frequency = 10_000 ** (-i / 16)
      const wavelength = (2 * Math.PI) / frequency
      if (wavelength < 256 / 4) return 1
      if (wavelength > 256 / 1) return 8
      const smooth = (256 / wavelength - 1) / (4 - 1)
      return frequency / (((1 - smooth) * frequency) / 8 + smooth * frequency)
    })
    expect(expected.some((factor) => factor > 1 && factor < 8)).toBe(true)
    factors.forEach((factor, i) => expect(factor).toBeCloseTo(expected[i]!, 5))
    expect((await logitsOf(file)).length).toBe(40)
  })
})

test("every BF16 becomes the nearest F16, and what no half holds is refused", () => {
  const bits = new Uint32Array(1)
  for (let half = 0; half < 65_536; half++) {
    bits[0] = half << 16
    const value = new Float32Array(bits.buffer)[0]!
    const convert = () => new Uint16Array(toHalves("BF16")(new Uint8Array(Uint16Array.of(half).buffer)).buffer)[0]
    if (Math.abs(value) < 65_520) expect(convert()).toBe(halfOfNumber(value))
    else expect(convert).toThrow("expected numbers that F16 can hold")
  }
})

/** Sets a key, given as a path, of one of the folder's files. */
const set = (name: string, key: string, value: unknown) => ({ json }: AwqFolder): void => {
  const path = key.split(".")
  const at = path.slice(0, -1).reduce<Record<string, unknown>>((of, each) => of[each] as Record<string, unknown>, json[name]!)
  at[path.at(-1)!] = value
}
const alter = (name: string, by: object) => ({ tensors }: AwqFolder): void => {
  const at = tensors.findIndex((tensor) => tensor.name === name)
  tensors[at] = { ...tensors[at]!, ...by }
}
const config = (key: string, value: unknown) => set("config.json", key, value)
const tokenizer = (key: string, value: unknown) => set("tokenizer.json", key, value)

describe("what is refused, by file, key, what was expected and what was found", () => {
  test.each<readonly [message: string, change: (folder: AwqFolder) => void]>([
    ['config.json: architectures: expected ["LlamaForCausalLM"], found ["Qwen2ForCausalLM"]', config("architectures", ["Qwen2ForCausalLM"])],
    ["config.json: num_key_value_heads: expected a divisor of num_attention_heads, 4, found 3", config("num_key_value_heads", 3)],
    ["tokenizer.json: post_processor: expected no special token but the bos_token before a text, found", tokenizer("post_processor", { type: "TemplateProcessing", single: [{ Sequence: { id: "A" } }, { SpecialToken: { id: "<|im_end|>" } }] })],
    ['config.json: quantization_config.quant_method: expected "awq", found "gptq"', config("quantization_config.quant_method", "gptq")],
    ['config.json: quantization_config.quant_method: expected "awq", found nothing', config("quantization_config", undefined)],
    ["config.json: quantization_config.bits: expected 4, found 8", config("quantization_config.bits", 8)],
    ["config.json: quantization_config.group_size: expected 128, found 64", config("quantization_config.group_size", 64)],
    ['config.json: quantization_config.version: expected "gemm" or "GEMM", found "gemv"', config("quantization_config.version", "gemv")],
    ["config.json: quantization_config.zero_point: expected true, found false", config("quantization_config.zero_point", false)],
    ['config.json: quantization_config.modules_to_not_convert: expected nothing, [] or ["lm_head"], found ["down_proj"]', config("quantization_config.modules_to_not_convert", ["down_proj"])],
    ['config.json: rope_scaling.rope_type: expected "llama3" or "default" or nothing, found "yarn"', config("rope_scaling", { rope_type: "yarn" })],
    ['config.json: rope_scaling.type: expected "default" or nothing, found "linear"', config("rope_scaling", { type: "linear", factor: 2 })],
    ["config.json: attention_bias: expected false or nothing, found true", config("attention_bias", true)],
    ["config.json: hidden_size: expected a whole number in 1 … 16777216, found nothing", config("hidden_size", undefined)],
    ["config.json: vocab_size: expected a whole number in 1 … 16777216, found 9007199254740991", config("vocab_size", Number.MAX_SAFE_INTEGER)],
    ['tokenizer.json: model.type: expected "BPE", found "Unigram"', tokenizer("model.type", "Unigram")],
    ["tokenizer.json: pre_tokenizer: expected one of gpt-2, smollm, llama-bpe, qwen2, found ", tokenizer("pre_tokenizer", { type: "Metaspace" })],
    ["tokenizer.json: model.ignore_merges: expected false or nothing, found true", tokenizer("model.ignore_merges", true)],
    ['tokenizer.json: normalizer: expected nothing, found {"type":"NFC"}', tokenizer("normalizer", { type: "NFC" })],
    ["tokenizer.json: model.vocab: expected ids in 0 … 329, and not 330 for", tokenizer("model.vocab", { a: 330 })],
    ['tokenizer_config.json: eos_token: expected a token of tokenizer.json, found "<eos>"', set("tokenizer_config.json", "eos_token", "<eos>")],
    ["generation_config.json: eos_token_id: expected with eos_token at most 3 token ids in 0 … 329, found [1,2,3,4]", set("generation_config.json", "eos_token_id", [1, 2, 3, 4])],
    ["model.safetensors: model.layers.0.self_attn.k_proj.qzeros: expected I32 [1, 8], found F32 [1, 8]", alter("model.layers.0.self_attn.k_proj.qzeros", { type: "F32" })],
    ["model.safetensors: model.layers.1.mlp.down_proj.scales: expected F16 [2, 128], found F16 [128, 2]", alter("model.layers.1.mlp.down_proj.scales", { shape: [2, 128] })],
    ["model.safetensors: model.layers.0.self_attn.q_proj.bias: not known to LlamaForCausalLM in AWQ", ({ tensors }) => void tensors.push({ name: "model.layers.0.self_attn.q_proj.bias", type: "F16", shape: [1], data: new Uint8Array(2) })],
    ["model.norm.weight: expected in the checkpoint, found none", ({ tensors }) => void tensors.splice(tensors.findIndex(({ name }) => name === "model.norm.weight"), 1)],
    ["model.safetensors: model.norm.weight: data_offsets: expected 512 bytes within the file's", alter("model.norm.weight", { type: "F32" })],
    ["model.safetensors: model.embed_tokens.weight: expected numbers that F16 can hold, found Infinity", ({ tensors }) => tensors.find(({ name }) => name.includes("embed"))!.data.set([0x80, 0x7f], 1000)],
  ])("%s", async (message, change) => {
    const { folder, file } = places()
    await writeAwqFolder(folder, { layers: 2, change })
    await expect(importAwq(folder, file)).rejects.toThrow(message)
    expect(existsSync(file) || existsSync(`${file}.part`)).toBe(false)
  })

  test("a folder without its files, a shard that is missing, and a file that is there already", async () => {
    const { folder, file } = places()
    await expect(importAwq(folder, file)).rejects.toThrow("config.json: expected a file, found none")
    await writeAwqFolder(folder, { shards: 2 })
    await rm(join(folder, "model-2-of-2.safetensors"))
    await expect(importAwq(folder, file)).rejects.toThrow("model-2-of-2.safetensors: expected a file, found none")
    await writeFile(file, "mine")
    await expect(importAwq(folder, file)).rejects.toThrow(`${file}: is there already`)
    expect(readFileSync(file, "utf8")).toBe("mine")
  })

  test("one that is told to end leaves nothing", async () => {
    const { folder, file } = places()
    await writeAwqFolder(folder)
    await expect(importAwq(folder, file, AbortSignal.abort(new Error("told")))).rejects.toThrow("told")
    expect(existsSync(file) || existsSync(`${file}.part`)).toBe(false)
  })
})

describe("npm run -s penstock -- import", () => {
  const command = (...args: ReadonlyArray<string>) => {
    const main = fileURLToPath(new URL("../../gateway/main.ts", import.meta.url))
    const { status, stdout, stderr } = spawnSync(process.execPath, [...programArguments(main), "import", ...args], { encoding: "utf8", timeout: 50_000 })
    return { status, stdout, stderr }
  }

  test("prints the file's path, and a chat with it is answered", async () => {
    const { folder, file } = places()
    await writeAwqFolder(folder)
    expect(command(folder, file)).toEqual({ status: 0, stdout: `${file}\n`, stderr: "model.embed_tokens.weight: BF16 has become F16\n" })
    const node = await startNode({ model: { path: file, name: "imported", sha256: "a".repeat(64) } })
    try {
      const response = await fetch(`${node.url}/v1/chat/completions`, { method: "POST", body: JSON.stringify({ model: "imported", messages: [{ role: "user", content: "Where does the water go?" }], max_tokens: 12, temperature: 0, ignore_eos: true }) })
      expect(response.status).toBe(200)
      const answer = (await response.json()) as { readonly usage: { readonly completion_tokens: number }; readonly choices: ReadonlyArray<{ readonly message: { readonly content: string } }> }
      expect(answer.usage.completion_tokens).toBe(12)
      expect(answer.choices[0]!.message.content.length).toBeGreaterThan(0)
    } finally {
      await node.stop()
    }
  })

  test("says in a line what is wrong, and how it is used", () => {
    expect(command("/nowhere", join(scratch, "none.gguf"))).toEqual({ status: 1, stdout: "", stderr: "/nowhere/config.json: expected a file, found none\n" })
    expect(command("/nowhere")).toMatchObject({ status: 2, stderr: expect.stringContaining("import: expected a folder and the file to make of it") })
  })
})
