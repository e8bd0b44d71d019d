/** KV on its way: checksums, layers out of the pool and into it, and hearing of a layer while the step goes on. */
import { mkdtemp, rm } from "node:fs/promises"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { setFlagsFromString } from "node:v8"
import { runInNewContext } from "node:vm"
import fc from "fast-check"
import { afterAll, beforeAll, describe, expect, test } from "vitest"
import { bestInstructionSet, crc32c, Engine, instructionSets, kvBytes, kvDtypes, type Batch, type EngineOptions, type InstructionSet, type KvDtype } from "../../kernels/index.ts"
import { greedy, upTo } from "../support/engine-runs.ts"
import { randomNumbers, writeTinyModel, type TinyModelOptions } from "../support/tiny-model.ts"

const available = instructionSets.slice(0, instructionSets.indexOf(bestInstructionSet()) + 1)

let folder: string
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "penstock-transfer-"))
})
afterAll(() => rm(folder, { recursive: true, force: true }))

let files = 0
const load = async ({ model = {}, ...options }: Partial<EngineOptions> & { readonly model?: TinyModelOptions }): Promise<Engine> => {
  const path = join(folder, `tiny-${files++}.gguf`)
  await writeTinyModel(path, model)
  return Engine.load({ path, blocks: 16, blockTokens: 16, threads: 2, maxRows: 64, maxOutputs: 4, ...options })
}

const ascii = (text: string): Uint8Array => new TextEncoder().encode(text)
const randomBytes = (length: number, seed: number): Uint8Array => {
  const random = randomNumbers(seed)
  return Uint8Array.from({ length }, () => random() * 256)
}

describe.each(available)("crc32c, %s", (isa) => {
  // The check value of the catalogue of CRC algorithms, and the examples of RFC 3720, appendix B.4.
  const vectors: ReadonlyArray<readonly [string, Uint8Array, number]> = [
    ["nothing", new Uint8Array(0), 0],
    ["123456789", ascii("123456789"), 0xe3069283],
    ["32 zeros", new Uint8Array(32), 0x8a9136aa],
    ["32 ones", new Uint8Array(32).fill(0xff), 0x62a8ab43],
    ["32 rising", Uint8Array.from(upTo(32)), 0x46dd794e],
    ["32 falling", Uint8Array.from(upTo(32).reverse()), 0x113fdb5c],
    [
      "an iSCSI read command",
      Uint8Array.from([0x01, 0xc0, ...upTo(14).map(() => 0), 0x14, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0x14, 0, 0, 0, 0x18, 0x28, ...upTo(7).map(() => 0), 0x02, ...upTo(7).map(() => 0)]),
      0xd9963a56,
    ],
  ]
  test.each(vectors)("of %s", (_, bytes, crc) => expect(crc32c(bytes, 0, isa)).toBe(crc))

  test("equals one computed bit by bit, at every length and address", () => {
    const bitwise = (bytes: Uint8Array, seed: number): number => {
      let crc = ~seed
      for (const byte of bytes) {
        crc ^= byte
        for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0)
      }
      return ~crc >>> 0
    }
    const bytes = randomBytes(5000, 1)
    for (const length of [...upTo(700), 1023, 1024, 2047, 4097, 4990]) {
      const part = bytes.subarray(length % 9, (length % 9) + length)
      expect(crc32c(part, 0, isa)).toBe(bitwise(part, 0))
      expect(crc32c(part, 0x9badcafe, isa)).toBe(bitwise(part, 0x9badcafe))
    }
  })

  test("continues over splits, with any other instruction set", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 2000 }), fc.array(fc.nat(2000), { maxLength: 5 }), fc.constantFrom(...available), (bytes, cuts, other) => {
        const ends = [...cuts.map((cut) => Math.min(cut, bytes.length)), bytes.length].sort((a, b) => a - b)
        const parts = ends.map((end, i) => bytes.subarray(ends[i - 1] ?? 0, end))
        expect(parts.reduce((crc, part, i) => crc32c(part, crc, i % 2 === 0 ? isa : other), 0)).toBe(crc32c(bytes, 0, isa))
      }),
    )
  })

  test("tells a message from the same with a byte changed", () => {
    const bytes = randomBytes(3000, 2)
    const crc = crc32c(bytes, 0, isa)
    for (let at = 0; at < bytes.length; at += 7) {
      bytes[at]! ^= 1 << (at % 8)
      expect(crc32c(bytes, 0, isa)).not.toBe(crc)
      bytes[at]! ^= 1 << (at % 8)
    }
  })
})

test("crc32c refuses what is no bytes and no seed", () => {
  expect(() => crc32c("x" as unknown as Uint8Array, 0)).toThrow("bytes: expected a Uint8Array")
  expect(() => crc32c(new Uint8Array(1), -1)).toThrow("seed: -1 is not in 0 … 4294967295")
  expect(() => crc32c(new Uint8Array(1), 0.5)).toThrow("seed: expected an integer, found 0.5")
  expect(() => crc32c(new Uint8Array(1), 0, "sse" as InstructionSet)).toThrow("isa: expected reference, avx2 or avx512")
})

/** Block sizes and heads that fill registers and such that do not. */
const shapes: ReadonlyArray<readonly [blockTokens: number, headDim: number, kvHeads: number, kvDtype: KvDtype]> = [
  [16, 64, 3, "f16"],
  [16, 16, 2, "f16"],
  [32, 128, 1, "f16"],
  [8, 24, 2, "f16"],
  [1, 64, 2, "f16"],
  [12, 10, 3, "f16"],
  [7, 42, 1, "f16"],
  [24, 80, 2, "f16"],
  [64, 256, 1, "f16"],
  [16, 64, 3, "int8"],
  [7, 42, 1, "int8"],
  [1, 24, 2, "int8"],
  [16, 64, 3, "int4"],
  [12, 20, 2, "int4"],
  [64, 256, 1, "int4"],
]
const layers = 5

describe.each(shapes)("layers of blocks of %i tokens, heads of %i dimensions, %i KV heads, in %s", (blockTokens, headDim, kvHeads, kvDtype) => {
  const engines: Array<Engine> = []
  const stored: Array<Uint8Array> = [] // [block] as exportBlock gives them
  beforeAll(async () => {
    for (const isa of available) engines.push(await load({ blocks: 9, blockTokens, kvDtype, isa, model: { layers, headDim, kvHeads, heads: kvHeads } }))
    const { blocks, blockBytes } = engines[0]!.info
    for (let block = 0; block < blocks; block++) {
      stored.push(randomBytes(blockBytes, block + 1))
      for (const engine of engines) engine.importBlock(block, stored[block]!)
    }
  })
  afterAll(() => Promise.all(engines.map((engine) => engine.close())))

  /** Cut out of what was stored: [layer][block]. */
  const expected = (blocks: ReadonlyArray<number>, firstLayer: number, count: number): Buffer => {
    const { layerBlockBytes } = engines[0]!.info
    return Buffer.concat(upTo(count).flatMap((i) => blocks.map((block) => stored[block]!.subarray((firstLayer + i) * layerBlockBytes, (firstLayer + i + 1) * layerBlockBytes))))
  }

  test("a layer of a block is its share of the block", () => {
    for (const { info } of engines) {
      expect(info.layerBlockBytes).toBe(2 * kvHeads * blockTokens * kvBytes(kvDtype, headDim))
      expect(info.layerBlockBytes * layers).toBe(info.blockBytes)
    }
  })

  test("what was imported as a block comes out as a block", () => {
    for (const engine of engines) {
      const bytes = new Uint8Array(engine.info.blockBytes)
      stored.forEach((block, i) => {
        engine.exportBlock(i, bytes)
        expect(Buffer.compare(bytes, block)).toBe(0)
      })
    }
  })

  test("any layers of any blocks come out, at any address, with the CRC of what is there", () => {
    const ranges = fc.record({
      blocks: fc.array(fc.nat(8), { maxLength: 6 }),
      firstLayer: fc.nat(layers - 1),
      more: fc.nat(layers),
      offset: fc.nat(70),
      seed: fc.nat(0xffffffff),
      engine: fc.nat(available.length - 1),
    })
    fc.assert(
      fc.property(ranges, ({ blocks, firstLayer, more, offset, seed, engine }) => {
        const count = 1 + (more % (layers - firstLayer))
        const bytes = expected(blocks, firstLayer, count)
        const into = new Uint8Array(offset + bytes.length + 5).fill(0xa5)
        const crc = engines[engine]!.exportLayers(Int32Array.from(blocks), firstLayer, count, into, offset, seed)
        expect(Buffer.compare(into.subarray(offset, offset + bytes.length), bytes)).toBe(0)
        expect(crc).toBe(crc32c(bytes, seed))
        expect([...into.subarray(0, offset), ...into.subarray(offset + bytes.length)].every((byte) => byte === 0xa5)).toBe(true)
      }),
      { numRuns: 60 },
    )
  })

  test("what comes out of one engine goes into another, and nowhere else", () => {
    const blocks = [7, 2, 5]
    const bytes = expected(blocks, 1, 3)
    for (const engine of engines) {
      const message = Buffer.concat([new Uint8Array(13), bytes, new Uint8Array(3)])
      const crc = crc32c(bytes, 99)
      const cleared = new Uint8Array(engine.info.blockBytes)
      for (const block of blocks) engine.importBlock(block, cleared)
      expect(engine.importLayers(Int32Array.from(blocks), 1, 3, message, 13, 99, crc)).toBe(true)
      const found = new Uint8Array(engine.info.blockBytes)
      stored.forEach((block, i) => {
        engine.exportBlock(i, found)
        const wanted = new Uint8Array(block)
        if (blocks.includes(i)) {
          wanted.fill(0, 0, engine.info.layerBlockBytes)
          wanted.fill(0, 4 * engine.info.layerBlockBytes)
        }
        expect(Buffer.compare(found, wanted)).toBe(0)
        engine.importBlock(i, block)
      })
    }
  })

  test("a wrong CRC, a wrong seed and a changed byte are found", () => {
    for (const engine of engines) {
      const blocks = Int32Array.of(3, 4)
      const bytes = expected([3, 4], 0, 2)
      const crc = crc32c(bytes, 1)
      expect(engine.importLayers(blocks, 0, 2, bytes, 0, 1, (crc ^ 1) >>> 0)).toBe(false)
      expect(engine.importLayers(blocks, 0, 2, bytes, 0, 2, crc)).toBe(false)
      for (const at of [0, bytes.length >> 1, bytes.length - 1]) {
        bytes[at]! ^= 0x10
        expect(engine.importLayers(blocks, 0, 2, bytes, 0, 1, crc)).toBe(false)
        bytes[at]! ^= 0x10
      }
      expect(engine.importLayers(blocks, 0, 2, bytes, 0, 1, crc)).toBe(true)
    }
  })
})

describe.each(kvDtypes)("layers from pool to pool, %s", (kvDtype) => {
  const model: TinyModelOptions = { layers: 3, headDim: 24, kvHeads: 2 }

  test("are the bytes that an export and an import would bring, and nothing else changes", async () => {
    const [from, to] = [await load({ model, kvDtype }), await load({ model, kvDtype, blocks: 9, isa: "reference" })]
    const { blockBytes, layerBlockBytes } = from.info
    for (const engine of [from, to]) upTo(engine.info.blocks).forEach((block) => engine.importBlock(block, randomBytes(blockBytes, engine.info.blocks + block)))
    const bytesOf = (engine: Engine, block: number, layer: number) => {
      const bytes = new Uint8Array(layerBlockBytes)
      engine.exportLayers(Int32Array.of(block), layer, 1, bytes, 0, 0)
      return bytes
    }
    const all = (engine: Engine) => upTo(engine.info.blocks).map((block) => upTo(3).map((layer) => bytesOf(engine, block, layer)))
    const [source, expected] = [all(from), all(to)]
    expect(to.canCopy(from)).toBe(true)
    const goals = [8, 0, 3, 4]
    ;[15, 2, 2, 9].forEach((block, i) => [1, 2].forEach((layer) => (expected[goals[i]!]![layer] = source[block]![layer]!)))
    to.copyLayers(from, Int32Array.of(15, 2, 2, 9), 1, 2, Int32Array.from(goals))
    to.copyLayers(from, new Int32Array(0), 0, 3, new Int32Array(0))
    expect(all(to)).toEqual(expected)
    // Within a pool.
    to.copyLayers(to, Int32Array.of(8, 1), 0, 1, Int32Array.of(7, 1))
    expected[7]![0] = expected[8]![0]!
    expect(all(to)).toEqual(expected)
    expect(all(from)).toEqual(source)
    await Promise.all([from.close(), to.close()])
  })

  test("may be copied while the step that has computed them goes on", async () => {
    const [from, to] = [await load({ model, kvDtype }), await load({ model, kvDtype })]
    const blocks = Int32Array.of(5, 1, 9)
    const batch = { tokens: Int32Array.from(upTo(48)), segments: Int32Array.of(48, 0, 0, 3), blockTables: blocks, outputs: new Int32Array(0) }
    await from.step(batch, (layer) => to.copyLayers(from, blocks, layer, 1, Int32Array.of(0, 1, 2)))
    const whole = (engine: Engine, of: Int32Array) => engine.exportLayers(of, 0, 3, new Uint8Array(3 * engine.info.blockBytes), 0, 0)
    expect(whole(to, Int32Array.of(0, 1, 2))).toBe(whole(from, blocks))
    await Promise.all([from.close(), to.close()])
  })
})

describe("layers that cannot be copied", () => {
  let from: Engine
  let to: Engine
  beforeAll(async () => {
    from = await load({ blocks: 4 }) // two layers
    to = await load({ blocks: 3 })
  })
  afterAll(() => Promise.all([from.close(), to.close()]))

  type Arguments = [from: Engine, fromBlocks: Int32Array, firstLayer: number, layers: number, blocks: Int32Array]
  const refusals: ReadonlyArray<readonly [string, (good: Arguments) => void, string]> = [
    ["a block that is not there", (all) => (all[1][1] = 4), "fromBlocks[1]: 4 is not in 0 … 3"],
    ["a block that is not here", (all) => (all[4][0] = 3), "blocks[0]: 3 is not in 0 … 2"],
    ["a negative block", (all) => (all[4][1] = -1), "blocks[1]: -1 is not in 0 … 2"],
    ["more blocks than there is room for", (all) => (all[4] = Int32Array.of(0)), "blocks: expected 2, found 1"],
    ["blocks of another type", (all) => (all[1] = [0, 1] as unknown as Int32Array), "fromBlocks: expected an Int32Array"],
    ["a first layer that is not there", (all) => (all[2] = 2), "firstLayer: 2 is not in 0 … 1"],
    ["more layers than there are", (all) => (all[3] = 2), "layers: 2 is not in 1 … 1"],
  ]
  test.each(refusals)("%s", (_, spoil, message) => {
    const all: Arguments = [from, Int32Array.of(3, 0), 1, 1, Int32Array.of(2, 1)]
    to.copyLayers(...all)
    spoil(all)
    expect(() => to.copyLayers(...all)).toThrow(message)
  })

  test.each([
    ["tokens of a block", { blockTokens: 8 }],
    ["layers", { model: { layers: 3 } }],
    ["heads", { model: { kvHeads: 1 } }],
    ["a head's dimensions", { model: { headDim: 32 } }],
    ["a KV type", { kvDtype: "int8" }],
  ] as const)("from a pool of other %s", async (_, options) => {
    const other = await load(options)
    expect([to.canCopy(other), other.canCopy(to)]).toEqual([false, false])
    expect(() => to.copyLayers(other, Int32Array.of(0), 0, 1, Int32Array.of(0))).toThrow("from: its blocks hold something else")
    await other.close()
  })

  test("from what is no engine, from a closed one, and into a closed one", async () => {
    const closed = await load({})
    await closed.close()
    for (const [one, other] of [[to, closed], [closed, to]] as const) expect(() => one.copyLayers(other, Int32Array.of(0), 0, 1, Int32Array.of(0))).toThrow("engine: it is closed")
    expect(to.canCopy({})).toBe(false)
    expect(() => to.copyLayers({} as Engine, Int32Array.of(0), 0, 1, Int32Array.of(0))).toThrow(TypeError)
  })
})

describe("layers that cannot be moved", () => {
  let engine: Engine
  beforeAll(async () => {
    engine = await load({ blocks: 4, blockTokens: 8 }) // two layers
  })
  afterAll(() => engine.close())

  type Arguments = [blocks: Int32Array, firstLayer: number, layers: number, bytes: Uint8Array, offset: number, seed: number]
  const refusals: ReadonlyArray<readonly [string, (good: Arguments) => void, string]> = [
    ["a block that is not there", ([blocks]) => (blocks[1] = 4), "blocks[1]: 4 is not in 0 … 3"],
    ["a negative block", ([blocks]) => (blocks[0] = -1), "blocks[0]: -1 is not in 0 … 3"],
    ["blocks of another type", (all) => (all[0] = [0] as unknown as Int32Array), "blocks: expected an Int32Array"],
    ["a first layer that is not there", (all) => (all[1] = 2), "firstLayer: 2 is not in 0 … 1"],
    ["half a layer", (all) => (all[1] = 0.5), "firstLayer: expected an integer, found 0.5"],
    ["more layers than there are", (all) => (all[2] = 2), "layers: 2 is not in 1 … 1"],
    ["no layers", (all) => (all[2] = 0), "layers: 0 is not in 1 … 1"],
    ["bytes of another type", (all) => (all[3] = new Float32Array(999) as unknown as Uint8Array), "{bytes}: expected a Uint8Array"],
    ["too few bytes", (all) => (all[4] = 12), "{bytes}: expected at least 2048 bytes from offset 12 on, found 2047"],
    ["an offset beyond the bytes", (all) => (all[4] = 2060), "offset: 2060 is not in 0 … 2059"],
    ["a negative offset", (all) => (all[4] = -1), "offset: -1 is not in 0 … 2059"],
    ["a seed that is no CRC", (all) => (all[5] = 2 ** 32), "seed: 4294967296 is not in 0 … 4294967295"],
  ]
  test.each(refusals)("%s", (_, spoil, message) => {
    const all: Arguments = [Int32Array.of(0, 1), 1, 1, new Uint8Array(2059), 11, 0]
    engine.exportLayers(...all)
    spoil(all)
    expect(() => engine.exportLayers(...all)).toThrow(message.replace("{bytes}", "into"))
    expect(() => engine.importLayers(...all, 0)).toThrow(message.replace("{bytes}", "from"))
  })

  test("a CRC that is none", () => {
    expect(() => engine.importLayers(Int32Array.of(0), 0, 1, new Uint8Array(1024), 0, 0, -1)).toThrow("crc: -1 is not in 0 … 4294967295")
  })

  test("layers of a closed engine", async () => {
    const closed = await load({})
    await closed.close()
    expect(() => closed.exportLayers(Int32Array.of(0), 0, 1, new Uint8Array(9999), 0, 0)).toThrow("engine: it is closed")
    expect(() => closed.importLayers(Int32Array.of(0), 0, 1, new Uint8Array(9999), 0, 0, 0)).toThrow("engine: it is closed")
  })
})

describe("a step that reports its layers", () => {
  const model: TinyModelOptions = { layers: 12, hidden: 192, ffn: 512, headDim: 32, heads: 6, kvHeads: 3 }
  const all = upTo(12)
  let engine: Engine
  beforeAll(async () => {
    engine = await load({ model })
  })
  afterAll(() => engine.close())

  /** Rows of two sequences, in blocks 1 … 4 and 5 … 8. */
  const batch = (rows: number, position = 0): Batch => ({
    tokens: Int32Array.from({ length: rows }, (_, i) => 3 + ((i * 7 + position) % 300)),
    segments: Int32Array.from(rows === 1 ? [1, position, 0, 4] : [rows >> 1, position, 0, 4, rows - (rows >> 1), position, 4, 4]),
    blockTables: Int32Array.from(upTo(8).map((i) => i + 1)),
    outputs: Int32Array.from([rows - 1, -1, 5, 0]),
  })
  const blocks = Int32Array.from(upTo(8).map((i) => i + 1))
  const layerBytes = (layer: number): Buffer => {
    const bytes = Buffer.alloc(blocks.length * engine.info.layerBlockBytes)
    expect(engine.exportLayers(blocks, layer, 1, bytes, 0, 0)).toBe(crc32c(bytes, 0))
    return bytes
  }

  const clear = (): void => {
    for (const block of blocks) engine.importBlock(block, new Uint8Array(engine.info.blockBytes))
  }

  test.each([1, 3, 4, 17, 64])("with %i rows: each once, in order, before the step is settled", async (rows) => {
    for (let round = 0; round < 10; round++) {
      const reported: Array<number> = []
      let settled = false
      const step = engine.step(batch(rows), (layer) => {
        expect(settled).toBe(false)
        reported.push(layer)
      })
      expect(reported).toEqual([]) // never from within the call
      await step.then(() => (settled = true))
      expect(reported).toEqual(all)
      await new Promise((resolve) => setImmediate(resolve))
      expect(reported).toEqual(all)
    }
  })

  test.each([1, 4, 64])("with %i rows: what is exported inside the callback is what is there after the step", async (rows) => {
    for (let round = 0; round < 5; round++) {
      clear()
      const inside: Array<Buffer> = []
      await engine.step(batch(rows, round), (layer) => inside.push(layerBytes(layer)))
      expect(inside.length).toBe(12)
      inside.forEach((bytes, layer) => {
        expect(bytes.equals(layerBytes(layer))).toBe(true)
        expect(bytes.some((byte) => byte !== 0)).toBe(true)
      })
    }
  })

  test("gives the same result as one that does not", async () => {
    const [silent, reporting] = [await engine.step({ ...batch(32), wantLogits: true }), await engine.step({ ...batch(32), wantLogits: true }, () => {})]
    expect(Buffer.compare(Buffer.from(reporting.logits!.buffer), Buffer.from(silent.logits!.buffer))).toBe(0)
    expect({ ...reporting, computeMs: 0 }).toEqual({ ...silent, computeMs: 0 })
  })

  test("reports to its own callback only, and to none where there is none", async () => {
    const reported: Array<string> = []
    await engine.step(batch(8), (layer) => reported.push(`a${layer}`))
    await engine.step(batch(8))
    await engine.step(batch(8), (layer) => reported.push(`b${layer}`))
    await engine.step(batch(8))
    expect(reported).toEqual([...all.map((layer) => `a${layer}`), ...all.map((layer) => `b${layer}`)])
  })

  test("reports all that is left at once when the event loop was away", async () => {
    const reported: Array<number> = []
    const step = engine.step(batch(64), (layer) => {
      reported.push(layer)
      if (layer === 0) for (const until = performance.now() + 60; performance.now() < until; );
    })
    await step
    expect(reported).toEqual(all)
  })

  test.each([new Error("no more"), "just words"])("rejects at its end with what the callback threw, calls it no more, and has done its work: %s", async (thrown) => {
    clear()
    await engine.step(batch(8))
    const bytes = all.map(layerBytes)
    clear()
    const id = engine.createSampler(greedy, Int32Array.of(5), new Int32Array(0))
    const reported: Array<number> = []
    const step = engine.step({ ...batch(8), outputs: Int32Array.of(7, id, -1, -1) }, (layer) => {
      reported.push(layer)
      if (layer === 3) throw thrown
    })
    await expect(step).rejects.toBe(thrown)
    expect(reported).toEqual([0, 1, 2, 3])
    all.forEach((layer) => expect(layerBytes(layer).equals(bytes[layer]!)).toBe(true))
    engine.freeSampler(id)
    await engine.step(batch(8), (layer) => reported.push(layer))
    expect(reported).toEqual([0, 1, 2, 3, ...all])
  })

  test("rejects with its own error where it fails, after its layers", async () => {
    const bytes = new Uint8Array(engine.info.blockBytes)
    engine.importBlock(1, new Uint8Array(bytes.length).fill(0xff))
    const reported: Array<number> = []
    await expect(engine.step(batch(1, 3), (layer) => reported.push(layer))).rejects.toThrow("the logits of this row are not finite")
    expect(reported).toEqual(all)
    engine.importBlock(1, bytes)
  })

  test("that is refused reports nothing, and a callback has to be a function", async () => {
    const reported: Array<number> = []
    await expect(engine.step({ ...batch(8), tokens: new Int32Array(0) }, (layer) => reported.push(layer))).rejects.toThrow("Batch.tokens")
    await expect(engine.step(batch(8), 5 as unknown as () => void)).rejects.toThrow("onLayer: expected a function")
    const step = engine.step(batch(8), (layer) => reported.push(layer))
    await expect(engine.step(batch(8), () => reported.push(-1))).rejects.toThrow("step: another step is in flight")
    await step
    expect(reported).toEqual(all)
  })

  test("reports to the end when the engine is closed meanwhile", async () => {
    const closing = await load({ model })
    const order: Array<string | number> = []
    let closed: Promise<unknown> | undefined
    const step = closing
      .step(batch(64), (layer) => {
        order.push(layer)
        closed ??= closing.close().then(() => order.push("closed"))
      })
      .then(() => order.push("step"))
    await step
    await closed
    expect(order).toEqual([...all, "step", "closed"])
  })

  test("does not keep its engine from being collected", async () => {
    setFlagsFromString("--expose-gc")
    const collect = runInNewContext("gc") as () => void
    const freed = new Set<number>()
    const registry = new FinalizationRegistry((i: number) => freed.add(i))
    const use = async (i: number): Promise<void> => {
      const lost = await load({})
      await lost.step(batch(4), () => void lost.info)
      registry.register(lost, i)
    }
    for (let i = 0; i < 5; i++) await use(i)
    for (let round = 0; round < 50 && freed.size < 4; round++) {
      collect()
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    expect(freed.size).toBeGreaterThanOrEqual(4) // a register may still hold the last one
  })
})
