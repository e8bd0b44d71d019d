import { mkdtemp, rm, writeFile } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { Engine, readGguf, type Gguf } from "../../kernels/index.ts"
import { array, Bytes, bool, f32, ggufBytes, tensorTypeIds, text, u32, type GgufToWrite, type TensorTypeName, type Value } from "../support/gguf-writer.ts"
import { codecs } from "../support/quantise.ts"
import { randomNumbers, tinyModelBytes } from "../support/tiny-model.ts"

let folder: string
let path: string

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-gguf-"))
  path = join(folder, "test.gguf")
})

afterAll(() => rm(folder, { recursive: true }))

const read = async (bytes: Uint8Array): Promise<Gguf> => {
  await writeFile(path, bytes)
  return readGguf(path)
}

/** The error's message; fails where the file is accepted. */
const refusal = async (file: GgufToWrite | Uint8Array): Promise<string> => {
  const outcome = await read(file instanceof Uint8Array ? file : ggufBytes(file)).catch((error: unknown) => error)
  expect(outcome).toBeInstanceOf(Error)
  return (outcome as Error).message
}

/** A small file with one value of each kind and two tensors. */
const small: GgufToWrite = {
  metadata: [
    ["general.architecture", text("llama")],
    ["test.u8", { type: "u8", value: 255 }],
    ["test.i8", { type: "i8", value: -128 }],
    ["test.u16", { type: "u16", value: 65535 }],
    ["test.i16", { type: "i16", value: -32768 }],
    ["test.u32", u32(4294967295)],
    ["test.i32", { type: "i32", value: -2147483648 }],
    ["test.f32", f32(0.5)],
    ["test.yes", bool(true)],
    ["test.u64", { type: "u64", value: 2n ** 53n }],
    ["test.i64", { type: "i64", value: -(2n ** 53n) }],
    ["test.f64", { type: "f64", value: 0.1 }],
    ["test.text", text("caf\u00e9 \u{1f600}")],
    ["test.empty", text("")],
    ["test.texts", array("string", ["a", "", "\u4f60"])],
    ["test.numbers", array("i32", [1, -2, 3])],
    ["test.floats", array("f32", [0.25, -1.5])],
    ["test.flags", array("bool", [true, false])],
    ["test.none", array("string", [])],
  ],
  tensors: [
    { name: "a.weight", type: "F32", shape: [3, 2], data: new Uint8Array(24) },
    { name: "b.weight", type: "Q4_1", shape: [64, 2, 1, 1], data: new Uint8Array(80) },
  ],
}

const withKey = (key: string, value: Value): GgufToWrite => ({ ...small, metadata: [...small.metadata, [key, value]] })
const withTensor = (tensor: GgufToWrite["tensors"][number]): GgufToWrite => ({ ...small, tensors: [...small.tensors, tensor] })

describe("a well-formed file", () => {
  test("every kind of value and every tensor comes back as it was written", async () => {
    const bytes = ggufBytes(small)
    const file = await read(bytes)
    expect(file).toMatchObject({ path, version: 3, fileBytes: bytes.length })
    expect([...file.metadata]).toEqual(
      small.metadata.map(([key, value]) => [key, value.type === "array" ? value.values : typeof value.value === "bigint" ? Number(value.value) : value.value]),
    )
    expect(file.tensors).toEqual([
      { name: "a.weight", type: "F32", shape: [3, 2], bytes: 24 },
      { name: "b.weight", type: "Q4_1", shape: [64, 2, 1, 1], bytes: 80 },
    ])
  })

  test("a file without keys and tensors is read", async () => {
    const file = await read(ggufBytes({ metadata: [], tensors: [] }))
    expect([file.metadata.size, file.tensors.length]).toEqual([0, 0])
  })

  test("another alignment moves the data and is followed", async () => {
    const file = await read(ggufBytes({ ...withKey("general.alignment", u32(4096)), alignment: 4096 }))
    expect(file.tensors.length).toBe(2)
  })

  test("each tensor type takes the bytes that its format document says", async () => {
    const names = Object.keys(tensorTypeIds) as Array<keyof typeof tensorTypeIds>
    const tensors = names.map((type) => ({ name: type, type, shape: [256, 3], data: new Uint8Array(((256 * 3) / codecs[type].weights) * codecs[type].bytes) }))
    const file = await read(ggufBytes({ metadata: [], tensors }))
    expect(file.tensors.map(({ type, bytes }) => [type, bytes])).toEqual(tensors.map(({ type, data }) => [type, data.length]))
  })

  test("a tensor of a type that is not known is listed by its number", async () => {
    const file = await read(ggufBytes(withTensor({ name: "c", type: 99, shape: [7], data: new Uint8Array(7) })))
    expect(file.tensors[2]).toEqual({ name: "c", type: "type 99", shape: [7], bytes: 0 })
  })

  test("a vocabulary of 150,000 tokens is read whole", async () => {
    const tokens = Array.from({ length: 150_000 }, (_, i) => `token-${i}`)
    const file = await read(ggufBytes({ metadata: [["tokens", array("string", tokens)], ["types", array("i32", tokens.map((_, i) => i))]], tensors: [] }))
    expect(file.metadata.get("tokens")).toEqual(tokens)
    expect((file.metadata.get("types") as ReadonlyArray<number>).at(-1)).toBe(149_999)
  })

  test("a tiny model has the tensors and the vocabulary of a llama", async () => {
    const file = await read(tinyModelBytes({ types: "Q8_0", tied: false }))
    expect(file.metadata.get("general.architecture")).toBe("llama")
    expect((file.metadata.get("tokenizer.ggml.tokens") as ReadonlyArray<string>).length).toBe(320)
    expect(new Set(file.metadata.get("tokenizer.ggml.tokens") as ReadonlyArray<string>).size).toBe(320)
    expect(file.tensors.find(({ name }) => name === "output.weight")).toMatchObject({ type: "Q8_0", shape: [64, 320] })
  })
})

describe("a file that is not a GGUF v3 file", () => {
  test("no such file, a folder, an empty file and other bytes are errors with the path", async () => {
    await expect(readGguf(join(folder, "absent.gguf"))).rejects.toThrow(/absent\.gguf: No such file/)
    await expect(readGguf(folder)).rejects.toThrow(/not a regular file/)
    expect(await refusal(new Uint8Array(0))).toMatch(/test\.gguf: expected a GGUF file.*found 0 bytes/)
    expect(await refusal(new TextEncoder().encode("{\"not\": \"a model, but long enough\"}"))).toMatch(/test\.gguf: expected a GGUF file/)
  })

  test("other versions and the other byte order are named", async () => {
    expect(await refusal({ ...small, version: 2 })).toMatch(/expected GGUF version 3, found version 2/)
    expect(await refusal({ ...small, version: 4 })).toMatch(/found version 4/)
    expect(await refusal({ ...small, version: 0x03000000 })).toMatch(/big-endian/)
  })
})

describe("a hostile file is an error that names the place", () => {
  test("cut off anywhere", async () => {
    const bytes = ggufBytes(small)
    const needed = bytes.length - 16 // the last tensor's 80 bytes are padded to 96
    for (let length = 0; length < needed; length++) {
      expect(await refusal(bytes.subarray(0, length)), `cut at ${length}`).toMatch(/^test\.gguf: ./)
    }
    await read(bytes.subarray(0, needed))
  }, 30_000)

  test("a tensor beyond the end says what it needs and where the file ends", async () => {
    const bytes = ggufBytes(small)
    expect(await refusal(bytes.subarray(0, bytes.length - 17))).toMatch(
      /^test\.gguf: tensor 1 \(b\.weight\): needs 80 bytes at offset \d+, the file ends at \d+$/,
    )
  })

  test("absurd counts of tensors and keys", async () => {
    for (const count of [2n ** 64n - 1n, 2n ** 63n, 2n ** 32n, 100_000n]) {
      expect(await refusal({ ...small, tensorCount: count })).toMatch(/tensor count: \d+ tensors do not fit/)
      expect(await refusal({ ...small, keyCount: count })).toMatch(/key count: \d+ keys do not fit/)
    }
    expect(await refusal({ ...small, keyCount: 30n })).toMatch(/^test\.gguf: key \d+: /)
  })

  test("lengths of strings and arrays beyond the file, also where they overflow", async () => {
    for (const length of [2n ** 64n - 1n, 2n ** 63n, 2n ** 61n, 2n ** 40n, 5000n]) {
      const header = (type: number): Bytes => new Bytes().raw(new TextEncoder().encode("GGUF")).u32(3).u64(0).u64(1).text("k").u32(type)
      const filler = new Uint8Array(4096)
      expect(await refusal(header(8).u64(length).raw(filler).done())).toMatch(/^test\.gguf: key 0 \(k\): /)
      for (const element of [0, 4, 10, 8]) {
        expect(await refusal(header(9).u32(element).u64(length).raw(filler).done())).toMatch(/key 0 \(k\): an array of \d+ elements does not fit/)
      }
      expect(await refusal(header(9).u32(8).u64(2).text("x").u64(length).raw(filler).done())).toMatch(/key 0 \(k\): string 1 of 2 has a length/)
    }
  })

  test("value types that do not exist, arrays of arrays, and booleans other than 0 and 1", async () => {
    const header = (): Bytes => new Bytes().raw(new TextEncoder().encode("GGUF")).u32(3).u64(0).u64(1).text("k")
    const filler = new Uint8Array(64)
    expect(await refusal(header().u32(13).raw(filler).done())).toMatch(/key 0 \(k\): expected a value type in 0 \.\.\. 12, found 13/)
    expect(await refusal(header().u32(9).u32(9).u64(1).u32(9).u64(1).raw(filler).done())).toMatch(/found elements of type array/)
    expect(await refusal(header().u32(9).u32(77).u64(1).raw(filler).done())).toMatch(/found elements of type 77/)
    expect(await refusal(header().u32(7).raw(new Uint8Array([2])).raw(filler).done())).toMatch(/expected a boolean 0 or 1, found 2/)
  })

  test("keys and tensor names that occur twice, are empty, or hold control characters", async () => {
    expect(await refusal(withKey("test.u8", u32(1)))).toMatch(/key 19 \(test\.u8\): the key occurs twice/)
    expect(await refusal(withKey("", u32(1)))).toMatch(/expected a key of printable ASCII/)
    expect(await refusal(withKey("a\nb\u001b[31m", u32(1)))).toMatch(/key 19 \(a\?b\?\[31m\): expected a key of printable ASCII/)
    const tensor = { name: "a.weight", type: "F32", shape: [1], data: new Uint8Array(4) } as const
    expect(await refusal(withTensor(tensor))).toMatch(/tensor 2 \(a\.weight\): the name occurs twice/)
    expect(await refusal(withTensor({ ...tensor, name: "" }))).toMatch(/expected a name of printable ASCII/)
    expect(await refusal(withTensor({ ...tensor, name: "n".repeat(2000) }))).toMatch(/expected at most 1024 bytes of text, found a length of 2000/)
  })

  test("shapes without or with too many dimensions, with zeros, with overflows, and with half blocks", async () => {
    const tensor = (shape: ReadonlyArray<number | bigint>, type: TensorTypeName = "F32"): GgufToWrite => withTensor({ name: "c", type, shape, data: new Uint8Array(40) })
    expect(await refusal(tensor([]))).toMatch(/tensor 2 \(c\): expected 1 to 4 dimensions, found 0/)
    expect(await refusal(tensor([1, 1, 1, 1, 1]))).toMatch(/expected 1 to 4 dimensions, found 5/)
    expect(await refusal(tensor([4, 0]))).toMatch(/dimension 1 is zero/)
    expect(await refusal(tensor([2n ** 32n, 2n ** 32n]))).toMatch(/more than 2\^53 weights/)
    expect(await refusal(tensor([2n ** 63n, 2n]))).toMatch(/more than 2\^53 weights/)
    expect(await refusal(tensor([2n ** 16n, 2n ** 16n, 2n ** 16n, 2n ** 16n]))).toMatch(/more than 2\^53 weights/)
    expect(await refusal(tensor([2n ** 53n]))).toMatch(/needs 36028797018963968 bytes/)
    for (const [type, codec] of Object.entries(codecs) as Array<[TensorTypeName, (typeof codecs)[TensorTypeName]]>) {
      if (codec.weights === 1) continue
      const row = codec.weights * 1.5
      expect(await refusal(tensor([row, 1], type))).toMatch(`tensor 2 (c): shape [${row}, 1] of ${type}: a row of ${row} weights is not a multiple of the block of ${codec.weights}`)
    }
  })

  test("offsets beyond the file, unaligned, and into another tensor", async () => {
    const tensor = (offset: number | bigint): GgufToWrite => withTensor({ name: "c", type: "F32", shape: [1], data: new Uint8Array(4), offset })
    for (const offset of [2n ** 64n - 32n, 2n ** 63n, 2n ** 32n, 4096]) expect(await refusal(tensor(offset))).toMatch(/tensor 2 \(c\): offset \d+ .*beyond the file/)
    expect(await refusal(tensor(129))).toMatch(/offset 129 is not a multiple of the alignment 32/)
    expect(await refusal(tensor(64))).toMatch(/tensor 2 \(c\): overlaps tensor 1 \(b\.weight\)/)
    expect(await refusal(tensor(0))).toMatch(/overlaps/)
  })

  test("alignments of zero, of no power of two, and of another type", async () => {
    for (const alignment of [0, 1, 7, 48, 2 ** 31]) expect(await refusal(withKey("general.alignment", u32(alignment)))).toMatch(/general\.alignment: expected a power of two/)
    expect(await refusal(withKey("general.alignment", text("32")))).toMatch(/general\.alignment: expected u32, found string/)
  })

  test("integers that JavaScript cannot hold are refused by name", async () => {
    expect(await refusal(withKey("big", { type: "u64", value: 2n ** 53n + 1n }))).toMatch(/big: an integer beyond 2\^53/)
    expect(await refusal(withKey("big", { type: "u64", value: 2n ** 64n - 1n }))).toMatch(/big: an integer beyond 2\^53/)
    expect(await refusal(withKey("big", array("i64", [0n, -(2n ** 60n)])))).toMatch(/big: an integer beyond 2\^53/)
  })
})

/** Changes a few bytes of a file; a pure function of the random numbers. */
const mutate = (bytes: Uint8Array, random: () => number, from: number, to: number): Uint8Array => {
  const out = bytes.slice()
  const extremes = [0x00, 0xff, 0x7f, 0x80, 0x01]
  for (let changes = 1 + Math.floor(random() * 3); changes > 0; changes--) {
    const at = from + Math.floor(random() * (to - from))
    const kind = random()
    if (kind < 0.4) out[at] = out[at]! ^ (1 << Math.floor(random() * 8))
    else if (kind < 0.8) out[at] = extremes[Math.floor(random() * extremes.length)]!
    else out.fill(extremes[Math.floor(random() * extremes.length)]!, at, Math.min(to, at + 8))
  }
  return out
}

describe("thousands of damaged files", () => {
  test("each is read or refused with a message, and the process lives", async () => {
    const random = randomNumbers(7)
    const bytes = ggufBytes(small)
    let refused = 0
    for (let i = 0; i < 3000; i++) {
      const outcome = await read(mutate(bytes, random, 0, bytes.length - 128)).catch((error: unknown) => error)
      if (!(outcome instanceof Error)) continue
      refused++
      expect(outcome.message).toMatch(/^test\.gguf: .{5,}/s)
    }
    expect(refused).toBeGreaterThan(1000)
  }, 60_000)
})

const loadOptions = { blocks: 4, blockTokens: 16, threads: 1, maxRows: 8, maxOutputs: 2 } as const

/** Loads a model and, where that works, runs a step; the message of what was refused. */
const loadAndStep = async (bytes: Uint8Array): Promise<string | undefined> => {
  await writeFile(path, bytes)
  const engine = await Engine.load({ path, ...loadOptions }).catch((error: unknown) => error)
  if (!(engine instanceof Engine)) {
    expect(engine).toBeInstanceOf(Error)
    return (engine as Error).message
  }
  const rows = Math.min(3, engine.info.contextLength)
  const outcome = await engine
    .step({ tokens: new Int32Array(rows), segments: Int32Array.of(rows, 0, 0, 1), blockTables: Int32Array.of(0), outputs: Int32Array.of(rows - 1, -1, 0, 1) })
    .catch((error: unknown) => error)
  await engine.close()
  return outcome instanceof Error ? outcome.message : undefined
}

describe("a damaged model", () => {
  const model = { layers: 1, hidden: 32, heads: 2, kvHeads: 1, headDim: 16, ffn: 32, vocabulary: 259 } as const

  test("damaged anywhere in header or weights: it runs, or is refused with a message", async () => {
    const random = randomNumbers(11)
    const bytes = tinyModelBytes({ ...model, types: "Q4_0" })
    const headerEnd = Buffer.from(bytes).lastIndexOf("ffn_down.weight") + 64
    const infosStart = Buffer.from(bytes).indexOf("token_embd.weight") - 8
    const outcomes = new Map<string, number>()
    for (let i = 0; i < 600; i++) {
      const [from, to] = i % 3 === 0 ? [0, 900] : i % 3 === 1 ? [infosStart, headerEnd] : [headerEnd, bytes.length]
      const message = await loadAndStep(mutate(bytes, random, from, to))
      if (message !== undefined) expect(message.length).toBeGreaterThan(10)
      const outcome = message === undefined ? "runs" : "refused"
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
    }
    expect(outcomes.get("refused")).toBeGreaterThan(100)
    expect(outcomes.get("runs")).toBeGreaterThan(50)
  }, 60_000)

  test("each key of the architecture absent, of another type, zero, negative, huge or not a number", async () => {
    const keys = [...(await read(tinyModelBytes(model))).metadata.keys()].filter((key) => /^(llama|general)\./.test(key))
    const values: ReadonlyArray<Value | null> = [
      null,
      text("x"),
      u32(0),
      u32(1),
      u32(2 ** 32 - 1),
      { type: "u64", value: 2n ** 53n },
      { type: "i32", value: -1 },
      f32(NaN),
      f32(Infinity),
      f32(-1),
      array("u32", [1, 2]),
    ]
    for (const key of keys) {
      for (const value of values) {
        const message = await loadAndStep(tinyModelBytes({ ...model, metadata: { [key]: value } }))
        if (message !== undefined) expect(message.length, `${key} ${JSON.stringify(value, (_, v: unknown) => (typeof v === "bigint" ? String(v) : v))}`).toBeGreaterThan(10)
      }
    }
    expect(await loadAndStep(tinyModelBytes({ ...model, metadata: { "llama.block_count": null } }))).toMatch(/test\.gguf: .*block_count.*found no such key/)
    expect(await loadAndStep(tinyModelBytes({ ...model, metadata: { "llama.block_count": text("two") } }))).toMatch(/block_count.*expected an integer, found string/)
  }, 60_000)

  test("weights that are not numbers are an error of the step, not a crash", async () => {
    const bytes = tinyModelBytes({ ...model, alter: (name, weights) => void (name === "output_norm.weight" && weights.fill(NaN)) })
    expect(await loadAndStep(bytes)).toMatch(/not finite/)
  })
})
