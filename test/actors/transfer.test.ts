import fc from "fast-check"
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { PoolBlocks } from "../../actors/engine/pool-blocks.ts"
import { decodeDecodeFrame, encodeReserved } from "../../actors/messages/decode.ts"
import { kvChunkHeaderBytes, readChunkHeader, sealChunk, writeChunkHeader, headerForCrc, type ChunkRange, type KvChunkHeader } from "../../actors/messages/kv-chunk.ts"
import { KvProgress, KvStatus } from "../../actors/messages/kv-transfer.ts"
import { transferSubject } from "../../actors/messages/subjects.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { checkChunkFits, chunkBytesOn } from "../../actors/transfer/chunk-limit.ts"
import { TransferReceiver, type ChunkSink, type ReceivedTransfer } from "../../actors/transfer/transfer-receiver.ts"
import { TransferSender, type ChunkSource, type SentTransfer } from "../../actors/transfer/transfer-sender.ts"
import { limits } from "../../config/limits.ts"
import { crc32c, kvDtypes, type Engine, type KvDtype } from "../../kernels/index.ts"
import { FaultyBus, type Faults } from "../support/faulty-bus.ts"
import { randomNumbers } from "../support/tiny-model.ts"

const transferId = "00112233445566778899aabbccddeeff"
const first = [Buffer.from([1, 2, 3]), Buffer.from([4])]
const to = (verb: "chunk" | "progress" | "status") => transferSubject("test", transferId, verb)
const verbOf = (subject: string) => subject.split(".").at(-1) as "chunk" | "progress" | "status"

interface Shape {
  readonly layers: number
  readonly firstBlock: number
  readonly blocks: number
  readonly layerBlockBytes: number
  /** Of the sender; f16 where absent, as the receiver's. */
  readonly dtype?: KvDtype
}
const shape: Shape = { layers: 3, firstBlock: 2, blocks: 5, layerBlockBytes: 96 }

type Gone = { readonly [end in "source" | "sink"]?: () => never }

/** KV that is a pure function of its place, and a pool to receive it; `gone` is what an end throws whose blocks are lost. */
const pools = ({ layers, firstBlock, blocks, layerBlockBytes, dtype = "f16" }: Shape, gone: Gone = {}) => {
  const random = randomNumbers(7)
  const size = layers * (firstBlock + blocks) * layerBlockBytes
  const kept = Uint8Array.from({ length: size }, () => random() * 256)
  const came = new Uint8Array(size)
  const at = (layer: number, block: number) => (layer * (firstBlock + blocks) + block) * layerBlockBytes
  const each = (range: ChunkRange, visit: (place: number, offset: number) => void) => {
    let offset = 0
    for (let layer = range.firstLayer; layer < range.firstLayer + range.layers; layer++) {
      for (let block = range.firstBlock; block < range.firstBlock + range.blocks; block++, offset += layerBlockBytes) visit(at(layer, block), offset)
    }
    return offset
  }
  const layout = { dtype: "f16" as const, blockTokens: 16, layers, layerBlockBytes, crc32c }
  const source: ChunkSource = {
    ...layout,
    dtype,
    write: (range, into, offset, seed) => {
      const bytes = each(range, (place, within) => into.set(kept.subarray(place, place + layerBlockBytes), offset + within))
      return crc32c(into.subarray(offset, offset + bytes), seed)
    },
  }
  const sink: ChunkSink = {
    ...layout,
    take: (range, payload, seed, crc) => {
      each(range, (place, within) => came.set(payload.subarray(within, within + layerBlockBytes), place))
      return crc32c(payload, seed) === crc
    },
  }
  /** The same bytes as pools that copy from each other. */
  class Pool {
    readonly bytes: Uint8Array
    readonly blocks: PoolBlocks
    constructor(bytes: Uint8Array, lost: (() => never) | undefined) {
      this.bytes = bytes
      this.blocks = new PoolBlocks(this as unknown as Engine, (range) => lost?.() ?? Int32Array.from({ length: range.blocks }, (_, i) => range.firstBlock + i))
    }
    canCopy(from: object): from is Engine {
      return from instanceof Pool
    }
    copyLayers(from: Engine, fromBlocks: Int32Array, firstLayer: number, count: number, goals: Int32Array): void {
      for (let layer = firstLayer; layer < firstLayer + count; layer++) {
        fromBlocks.forEach((block, i) => this.bytes.set((from as unknown as Pool).bytes.subarray(at(layer, block), at(layer, block) + layerBlockBytes), at(layer, goals[i]!)))
      }
    }
  }
  const local = { source: { ...source, blocks: new Pool(kept, gone.source).blocks }, sink: { ...sink, blocks: new Pool(came, gone.sink).blocks } }
  const whole = () => {
    for (let layer = 0; layer < layers; layer++) {
      const [from, end] = [at(layer, firstBlock), at(layer, firstBlock + blocks - 1) + layerBlockBytes]
      if (Buffer.compare(kept.subarray(from, end), came.subarray(from, end)) !== 0) return false
      if (came.subarray(at(layer, 0), from).some((byte) => byte !== 0)) return false // the prefix was held already
    }
    return true
  }
  return { source, sink, local, whole, untouched: () => came.every((byte) => byte === 0) }
}

interface Ends {
  readonly bus: FaultyBus
  readonly memory: MemoryBus
  readonly sender: TransferSender
  readonly receiver: TransferReceiver
  readonly whole: () => boolean
  /** Nothing has come. */
  readonly untouched: () => boolean
  /** Of what both ends settled to; undefined while one has not. */
  readonly outcomes: { sent?: SentTransfer | Fault; received?: ReceivedTransfer | Fault }
}

interface Opened {
  readonly seed?: number
  readonly faults?: Partial<Record<"chunk" | "progress" | "status", Faults>>
  readonly shape?: Shape
  readonly creditBytes?: number
  readonly maxPayloadBytes?: number
  /** Both ends are pools of this process. */
  readonly local?: boolean
  readonly gone?: Gone
}

const open = (options: Opened = {}): Ends => {
  const sizes = options.shape ?? shape
  const memory = new MemoryBus({ maxPayloadBytes: options.maxPayloadBytes ?? kvChunkHeaderBytes + 4 * sizes.layerBlockBytes + 200 })
  const bus = new FaultyBus(memory, { seed: options.seed, faultsOf: (subject) => options.faults?.[verbOf(subject)] ?? {} })
  const { local, whole, untouched, ...apart } = pools(sizes, options.gone)
  const { source, sink } = options.local === true ? local : apart
  const common = { control: bus, bulk: bus, namespace: "test", transferId, creditBytes: options.creditBytes ?? limits.kvWindowBytes }
  const receiver = new TransferReceiver({ ...common, sink, firstBlock: sizes.firstBlock, blocks: sizes.blocks, hop: "prefill p0" })
  const sender = new TransferSender({ ...common, source, hop: "decode d0" })
  const outcomes: Ends["outcomes"] = {}
  sender.done.then((sent) => (outcomes.sent = sent), (fault: Fault) => (outcomes.sent = fault))
  receiver.done.then((received) => (outcomes.received = received), (fault: Fault) => (outcomes.received = fault))
  return { bus, memory, sender, receiver, whole, untouched, outcomes }
}

/** Sends everything as prefill does: layer by layer, a run of blocks at a time. */
const sendAll = async ({ sender }: Ends, { layers, firstBlock, blocks }: Shape = shape) => {
  for (let block = 0; block < blocks; block += 2) {
    for (let layer = 0; layer < layers; layer++) {
      sender.send({ firstLayer: layer, layers: 1, firstBlock: firstBlock + block, blocks: Math.min(2, blocks - block) })
      await vi.advanceTimersByTimeAsync(1)
    }
  }
  sender.finish(first)
}

const settled = async ({ outcomes }: Ends, longestMs = 60_000) => {
  for (let waitedMs = 0; waitedMs < longestMs && (outcomes.sent === undefined || outcomes.received === undefined); waitedMs += 10) await vi.advanceTimersByTimeAsync(10)
}

const nothingLeft = async ({ bus }: Ends) => {
  await vi.advanceTimersByTimeAsync(limits.kvSilenceMs + 1000)
  expect(bus.listeners).toBe(0)
  expect(vi.getTimerCount()).toBe(0)
}

beforeEach(() => void vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "setInterval", "clearInterval", "performance"] }))
afterEach(() => void vi.useRealTimers())

describe("a KV transfer", () => {
  const complete = async (ends: Ends, sizes: Shape = shape) => {
    await sendAll(ends, sizes)
    await settled(ends)
    expect(ends.outcomes.received).toMatchObject({ first })
    expect(ends.outcomes.sent).toMatchObject({ chunks: expect.any(Number) as number })
    expect(ends.whole()).toBe(true)
    await nothingLeft(ends)
    return { sent: ends.outcomes.sent as SentTransfer, received: ends.outcomes.received as ReceivedTransfer }
  }
  const failed = async (ends: Ends) => {
    await settled(ends)
    for (const outcome of [ends.outcomes.sent, ends.outcomes.received]) {
      expect(outcome).toBeInstanceOf(Fault)
      expect(["decode d0", "prefill p0"]).toContain((outcome as Fault).hop)
      expect((outcome as Fault).retryable).toBe(true)
    }
    await nothingLeft(ends)
    return ends.outcomes as { sent: Fault; received: Fault }
  }

  it("whose receiver has given up before the sender begins is over with the sender's first word", async () => {
    const bus = new FaultyBus(new MemoryBus(), { faultsOf: () => undefined })
    const common = { control: bus, bulk: bus, namespace: "test", transferId, creditBytes: limits.kvWindowBytes }
    const { source, sink } = pools(shape)
    const receiver = new TransferReceiver({ ...common, sink, firstBlock: shape.firstBlock, blocks: shape.blocks, hop: "prefill p0" })
    receiver.fail(new Fault({ code: "cancelled", message: "decode d0: nobody wants it any more", hop: "decode d0" }))
    await vi.advanceTimersByTimeAsync(limits.kvSilenceMs / 2)
    const sender = new TransferSender({ ...common, source, hop: "decode d0" })
    sender.send({ firstLayer: 0, layers: shape.layers, firstBlock: shape.firstBlock, blocks: shape.blocks })
    sender.finish(first)
    let outcome: unknown
    sender.done.then((sent) => (outcome = sent), (fault: Fault) => (outcome = fault))
    await vi.advanceTimersByTimeAsync(limits.kvProgressIntervalMs)
    expect(outcome).toMatchObject({ code: "disconnected", hop: "decode d0", message: expect.stringContaining("nobody wants it any more") as string })
    expect(bus.listeners).toBe(0)
    expect(vi.getTimerCount()).toBe(0)
  })

  it("brings every byte to its place, and the first tokens, once each", async () => {
    const { sent, received } = await complete(open())
    expect(received).toMatchObject({ chunks: 9, corrupted: 0, duplicates: 0, bytes: sent.bytes })
    expect(sent.resent).toBe(0)
  })

  it("of another dtype is refused by name at once, and one that a fault makes look so is asked for again", async () => {
    const sizes = { ...shape, dtype: "int4" as const }
    const ends = open({ shape: sizes })
    await sendAll(ends, sizes)
    await settled(ends, 100)
    expect(ends.outcomes.received).toMatchObject({ code: "invalid_request", message: "KV transfer from prefill p0: it sends KV in int4, and what is here takes f16" })
    expect(ends.outcomes.sent).toMatchObject({ message: expect.stringContaining("it sends KV in int4, and what is here takes f16") })
    await nothingLeft(ends)

    const spoilt = open()
    const publish = spoilt.memory.publish.bind(spoilt.memory)
    let chunks = 0
    vi.spyOn(spoilt.memory, "publish").mockImplementation((subject, data, options) => {
      const spoils = verbOf(subject) === "chunk" && chunks++ === 1
      publish(subject, spoils ? data.map((byte, at) => (at === 6 ? 1 : byte)) : data, options)
    })
    expect((await complete(spoilt)).received).toMatchObject({ corrupted: 1 })
  })

  it("is closed by both ends as soon as the sender has heard that it is complete", async () => {
    const ends = open()
    await sendAll(ends)
    await settled(ends)
    await vi.advanceTimersByTimeAsync(1)
    expect(ends.bus.listeners).toBe(0)
  })

  it.each([
    ["dropped", { drop: 0.3 }],
    ["duplicated", { duplicate: 0.6 }],
    ["reordered", { reorder: 0.6 }],
    ["late", { delay: 0.5 }],
    ["corrupted", { corrupt: 0.4 }],
    ["all of it at once", { drop: 0.15, duplicate: 0.2, reorder: 0.3, delay: 0.2, corrupt: 0.2 }],
  ] as const)("arrives whole though chunks are %s", async (_, chunk) => {
    const ends = open({ seed: 3, faults: { chunk } })
    await complete(ends)
    for (const fault of Object.keys(chunk) as Array<keyof Faults>) expect(ends.bus.met[fault]).toBeGreaterThan(0)
  })

  it.each(["progress", "status"] as const)("arrives whole though most %s messages are lost, doubled, reordered or late", async (verb) => {
    await complete(open({ seed: 5, faults: { [verb]: { drop: 0.5, duplicate: 0.5, reorder: 0.5, delay: 0.3 }, chunk: { drop: 0.2 } } }))
  })

  it("does not send a chunk again for each copy of a status that names it", async () => {
    const ends = open({ faults: { status: { duplicate: 1 }, chunk: { drop: 0.3 } }, seed: 4 })
    const { sent, received } = await complete(ends)
    expect(ends.bus.met.drop).toBeGreaterThan(0)
    expect(sent.resent).toBeLessThanOrEqual(ends.bus.met.drop)
    expect(received.duplicates).toBe(0)
  })

  it("takes a byte that is wrong anywhere, in header or payload, for a chunk that did not come", async () => {
    const small: Shape = { layers: 1, firstBlock: 0, blocks: 1, layerBlockBytes: 64 }
    for (let bit = 0; bit < (kvChunkHeaderBytes + small.layerBlockBytes) * 8; bit++) {
      const ends = open({ shape: small })
      let spoilt = false
      const publish = ends.memory.publish.bind(ends.memory)
      ends.memory.publish = (subject, data, options) => {
        if (verbOf(subject) !== "chunk" || spoilt) return publish(subject, data, options)
        spoilt = true
        const wrong = data.slice()
        wrong[bit >> 3]! ^= 1 << (bit & 7)
        publish(subject, wrong, options)
      }
      ends.sender.send({ firstLayer: 0, layers: 1, firstBlock: 0, blocks: 1 })
      ends.sender.finish(first)
      await vi.advanceTimersByTimeAsync(1)
      expect(ends.outcomes.received).toBeUndefined()
      await settled(ends)
      expect(ends.outcomes.received).toMatchObject({ corrupted: 1, first })
      expect(ends.whole()).toBe(true)
      ends.receiver.close()
    }
  })

  it("completes where the receiver's last word is lost again and again", async () => {
    let words = 0
    const ends = open()
    const publish = ends.memory.publish.bind(ends.memory)
    ends.memory.publish = (subject, data, options) => {
      if (verbOf(subject) === "status" && KvStatus.decode(data).complete && ++words < 20) return
      publish(subject, data, options)
    }
    await complete(ends)
    expect(words).toBe(20)
  })

  it("ends at both ends where the receiver's goodbye is lost", async () => {
    const ends = open()
    const publish = ends.memory.publish.bind(ends.memory)
    ends.memory.publish = (subject, data, options) => {
      if (verbOf(subject) !== "progress" || !KvProgress.decode(data).closed) publish(subject, data, options)
    }
    await complete(ends)
  })

  it("never has more bytes on their way than the receiver lets be, whatever is lost", async () => {
    const sizes: Shape = { layers: 4, firstBlock: 0, blocks: 12, layerBlockBytes: 128 }
    const creditBytes = 1000
    const ends = open({ shape: sizes, creditBytes, faults: { chunk: { delay: 0.3 }, status: { drop: 0.3 } }, seed: 9 })
    const { sent } = await complete(ends, sizes)
    expect(ends.bus.peakBytes.get(to("chunk"))).toBeLessThanOrEqual(creditBytes + sent.resent * (kvChunkHeaderBytes + 2 * 128))
    const calm = open({ shape: sizes, creditBytes })
    await complete(calm, sizes)
    expect(calm.bus.peakBytes.get(to("chunk"))).toBeLessThanOrEqual(creditBytes)
  })

  it("goes on one chunk at a time where the window is smaller than a chunk", async () => {
    await complete(open({ creditBytes: 1 }))
  })

  it("fails with the receiver's name where credits are withheld", async () => {
    const ends = open({ creditBytes: 500, faults: { status: { drop: 1 } } })
    await sendAll(ends)
    const { sent, received } = await failed(ends)
    expect(sent).toMatchObject({ code: "deadline_exceeded", hop: "decode d0" })
    expect(received.message).toContain("prefill p0")
  })

  it("fails with the receiver's name where it is gone", async () => {
    const ends = open()
    ends.receiver.close()
    await sendAll(ends)
    await settled(ends, 15_000)
    expect(ends.outcomes.sent).toMatchObject({ code: "deadline_exceeded", hop: "decode d0" })
    await nothingLeft(ends)
  })

  it("fails with the sender's name where it falls silent in the middle", async () => {
    const ends = open()
    ends.sender.send({ firstLayer: 0, layers: 1, firstBlock: 2, blocks: 1 })
    await vi.advanceTimersByTimeAsync(50)
    const publish = ends.memory.publish.bind(ends.memory)
    ends.memory.publish = (subject, data, options) => {
      if (verbOf(subject) === "status") publish(subject, data, options)
    }
    await settled(ends, 15_000)
    expect(ends.outcomes.received).toMatchObject({ code: "deadline_exceeded", hop: "prefill p0" })
    await failed(ends)
  })

  it("waits for as long as its reservation does for a sender that has not begun", async () => {
    const ends = open()
    ends.sender.fail(new Fault({ code: "cancelled", message: "not this one", hop: "test" }))
    const { sink } = pools(shape)
    const receiver = new TransferReceiver({ control: ends.bus, bulk: ends.bus, namespace: "test", transferId: "f".repeat(32), sink, firstBlock: 0, blocks: 1, creditBytes: 1, hop: "prefill p0" })
    let over = false
    void receiver.done.then(() => (over = true), () => (over = true))
    await vi.advanceTimersByTimeAsync(limits.requestDeadlineMs)
    expect(over).toBe(false)
    receiver.close()
    await nothingLeft(ends)
  })

  it("survives a prompt that is computed slowly: signs of life count", async () => {
    const ends = open()
    ends.sender.send({ firstLayer: 0, layers: 1, firstBlock: 2, blocks: 5 })
    await vi.advanceTimersByTimeAsync(10 * limits.kvSilenceMs)
    ends.sender.send({ firstLayer: 1, layers: 2, firstBlock: 2, blocks: 5 })
    ends.sender.finish(first)
    await settled(ends)
    expect(ends.outcomes.received).toMatchObject({ first })
    await nothingLeft(ends)
  })

  it("fails at once at both ends where the connection is lost", async () => {
    const ends = open()
    ends.sender.send({ firstLayer: 0, layers: 1, firstBlock: 2, blocks: 5 })
    ends.memory.disconnect()
    await vi.advanceTimersByTimeAsync(1)
    const { sent, received } = await failed(ends)
    expect([sent.code, received.code]).toEqual(["disconnected", "disconnected"])
  })

  it("tells the other end why one end gives it up", async () => {
    const bySender = open()
    bySender.sender.fail(new Fault({ code: "unavailable", message: "prefill p0: out of order", hop: "prefill p0" }))
    expect((await failed(bySender)).received.message).toContain("out of order")
    const byReceiver = open()
    byReceiver.receiver.fail(new Fault({ code: "unavailable", message: "decode d0: no room", hop: "decode d0" }))
    expect((await failed(byReceiver)).sent.message).toContain("no room")
  })

  it("is never complete without the sender's word that there is no more", async () => {
    const ends = open()
    ends.sender.send({ firstLayer: 0, layers: 3, firstBlock: 2, blocks: 5 })
    await vi.advanceTimersByTimeAsync(1000)
    expect(ends.outcomes.received).toBeUndefined()
    ends.sender.fail(new Fault({ code: "cancelled", message: "given up before the first token", hop: "prefill p0" }))
    await settled(ends)
    expect(ends.outcomes.received).toBeInstanceOf(Fault)
    await nothingLeft(ends)
  })

  it("fails at both ends where the KV is gone from the pool, or its place there", async () => {
    for (const end of ["source", "sink"] as const) {
      const memory = new MemoryBus()
      const bus = new FaultyBus(memory, { faultsOf: () => undefined })
      const { source, sink, whole, untouched } = pools(shape)
      const gone = (): never => {
        throw new Fault({ code: "unavailable", message: `the ${end} is gone`, hop: end === "sink" ? "decode d0" : "prefill p0" })
      }
      const common = { control: bus, bulk: bus, namespace: "test", transferId, creditBytes: 1e6 }
      const receiver = new TransferReceiver({ ...common, sink: end === "sink" ? { ...sink, take: gone } : sink, firstBlock: 2, blocks: 5, hop: "prefill p0" })
      const sender = new TransferSender({ ...common, source: end === "source" ? { ...source, write: gone } : source, hop: "decode d0" })
      const ends: Ends = { bus, memory, sender, receiver, whole, untouched, outcomes: {} }
      sender.done.then((sent) => (ends.outcomes.sent = sent), (fault: Fault) => (ends.outcomes.sent = fault))
      receiver.done.then((received) => (ends.outcomes.received = received), (fault: Fault) => (ends.outcomes.received = fault))
      sender.send({ firstLayer: 0, layers: 3, firstBlock: 2, blocks: 5 })
      const { sent, received } = await failed(ends)
      expect([sent.message, received.message].join()).toContain(`the ${end} is gone`)
    }
  })

  it("waits where the bus has no room, and goes on when it has", async () => {
    const ends = open()
    const publish = ends.memory.publish.bind(ends.memory)
    let room = 3
    ends.memory.publish = (subject, data, options) => {
      if (verbOf(subject) === "chunk" && room-- <= 0) throw new Fault({ code: "overloaded", message: "full", hop: "bus" })
      publish(subject, data, options)
    }
    const more = setInterval(() => (room = 2), 250)
    await sendAll(ends)
    await settled(ends)
    clearInterval(more)
    expect(ends.outcomes.received).toMatchObject({ first, duplicates: 0 })
    expect(ends.whole()).toBe(true)
    await nothingLeft(ends)
  })

  it("ignores control messages that cannot be read, chunks of other transfers, and everything after its end", async () => {
    const ends = open()
    const junk = new Uint8Array([0xc1, 1, 2, 3])
    for (const verb of ["chunk", "progress", "status"] as const) ends.memory.publish(to(verb), junk)
    await complete(ends)
    for (const verb of ["chunk", "progress", "status"] as const) ends.memory.publish(to(verb), junk)
    ends.sender.send({ firstLayer: 0, layers: 1, firstBlock: 2, blocks: 1 })
    ends.sender.finish([])
    ends.sender.fail(new Fault({ code: "cancelled", message: "late", hop: "test" }))
    ends.receiver.fail(new Fault({ code: "cancelled", message: "late", hop: "test" }))
    await nothingLeft(ends)
  })

  describe("between pools of one process", () => {
    const local = true
    const chunksOf = (ends: Ends): Array<number> => {
      const sizes: Array<number> = []
      const publish = ends.memory.publish.bind(ends.memory)
      ends.memory.publish = (subject, data, options) => {
        if (verbOf(subject) === "chunk") sizes.push(data.byteLength)
        publish(subject, data, options)
      }
      return sizes
    }

    it("is copied from one to the other: chunks hold no KV, and both ends tell how much it was", async () => {
      const [apart, ends] = [await complete(open()), open({ local })]
      const sizes = chunksOf(ends)
      expect(await complete(ends)).toMatchObject({ sent: { bytes: apart.sent.bytes, chunks: 9, resent: 0 }, received: { bytes: apart.sent.bytes, chunks: 9 } })
      expect(sizes).toEqual(Array.from({ length: 9 }, () => kvChunkHeaderBytes))
    })

    it("is written into messages where one pool cannot copy from the other, or there is no pool", async () => {
      for (const end of ["source", "sink"] as const) {
        const blocks = new PoolBlocks({ canCopy: () => false } as unknown as Engine, () => new Int32Array(0))
        for (const without of [{}, { blocks }]) {
          const { local, whole, untouched, ...apart } = pools(shape)
          const memory = new MemoryBus()
          const bus = new FaultyBus(memory, { faultsOf: () => undefined })
          const common = { control: bus, bulk: bus, namespace: "test", transferId, creditBytes: 1e6 }
          const source = end === "source" ? { ...apart.source, ...without } : local.source
          const sink = end === "sink" ? { ...apart.sink, ...without } : local.sink
          const receiver = new TransferReceiver({ ...common, sink, firstBlock: 2, blocks: 5, hop: "prefill p0" })
          const sender = new TransferSender({ ...common, source, hop: "decode d0" })
          const ends: Ends = { bus, memory, sender, receiver, whole, untouched, outcomes: {} }
          sender.done.then((sent) => (ends.outcomes.sent = sent), (fault: Fault) => (ends.outcomes.sent = fault))
          receiver.done.then((received) => (ends.outcomes.received = received), (fault: Fault) => (ends.outcomes.received = fault))
          const sizes = chunksOf(ends)
          await complete(ends)
          expect(Math.min(...sizes)).toBeGreaterThan(kvChunkHeaderBytes)
        }
      }
    })

    it("arrives whole whatever happens to its descriptions", async () => {
      const ends = open({ local, seed: 3, faults: { chunk: { drop: 0.15, duplicate: 0.2, reorder: 0.3, delay: 0.2, corrupt: 0.2 } } })
      await complete(ends)
      for (const fault of ["drop", "duplicate", "reorder", "delay", "corrupt"] as const) expect(ends.bus.met[fault]).toBeGreaterThan(0)
    })

    it("copies nothing for a description of which one bit is wrong", async () => {
      const small: Shape = { layers: 2, firstBlock: 0, blocks: 2, layerBlockBytes: 64 }
      for (let bit = 0; bit < kvChunkHeaderBytes * 8; bit++) {
        const ends = open({ local, shape: small, faults: { status: { drop: 1 } } })
        const publish = ends.memory.publish.bind(ends.memory)
        ends.memory.publish = (subject, data, options) => publish(subject, verbOf(subject) === "chunk" ? data.map((byte, at) => (at === bit >> 3 ? byte ^ (1 << (bit & 7)) : byte)) : data, options)
        ends.sender.send({ firstLayer: 0, layers: 1, firstBlock: 0, blocks: 1 })
        await vi.advanceTimersByTimeAsync(1)
        ends.receiver.fail(new Fault({ code: "cancelled", message: "enough", hop: "test" }))
        ends.sender.fail(new Fault({ code: "cancelled", message: "enough", hop: "test" }))
        expect(ends.untouched()).toBe(true)
      }
    })

    it("copies nothing from a sender that has left, nor into what has been closed, though the description comes", async () => {
      for (const end of ["sender", "receiver"] as const) {
        const ends = open({ local, faults: { chunk: { delay: 1 }, progress: { drop: 1 }, status: { drop: 1 } } })
        const sizes = chunksOf(ends)
        ends.sender.send({ firstLayer: 0, layers: 3, firstBlock: 2, blocks: 5 })
        if (end === "sender") ends.sender.fail(new Fault({ code: "cancelled", message: "its blocks are another's now", hop: "test" }))
        else ends.receiver.close()
        await vi.advanceTimersByTimeAsync(1000)
        expect(sizes.length).toBeGreaterThan(0)
        expect(ends.untouched()).toBe(true)
        ends.sender.fail(new Fault({ code: "cancelled", message: "enough", hop: "test" }))
        ends.receiver.close()
        await nothingLeft(ends)
      }
    })

    it("fails at both ends where the KV is gone from one pool, or its place in the other", async () => {
      for (const end of ["source", "sink"] as const) {
        const gone = (): never => {
          throw new Fault({ code: "unavailable", message: `the ${end} is gone`, hop: end === "sink" ? "decode d0" : "prefill p0" })
        }
        const ends = open({ local, gone: { [end]: gone } })
        await sendAll(ends)
        const { sent, received } = await failed(ends)
        expect([sent.message, received.message].join()).toContain(`the ${end} is gone`)
        expect(ends.untouched()).toBe(true)
      }
    })
  })

  it("arrives exactly, or fails with a fault that names the hop, whatever happens on its way", async () => {
    const probability = fc.constantFrom(0, 0, 0.1, 0.3, 0.6, 1)
    const control = fc.record({ drop: probability, duplicate: probability, reorder: probability, delay: probability })
    const chunk = fc.record({ drop: probability, duplicate: probability, reorder: probability, delay: probability, corrupt: probability })
    const anyShape = fc.record({ layers: fc.integer({ min: 1, max: 5 }), firstBlock: fc.integer({ min: 0, max: 3 }), blocks: fc.integer({ min: 1, max: 9 }), layerBlockBytes: fc.integer({ min: 1, max: 200 }) })
    const anyCredit = fc.constantFrom(1, 700, 5000, limits.kvWindowBytes)
    await fc.assert(
      fc.asyncProperty(fc.nat(), chunk, control, control, anyShape, anyCredit, fc.boolean(), async (seed, chunkFaults, progress, status, sizes, creditBytes, local) => {
        const ends = open({ seed, local, shape: sizes, creditBytes, maxPayloadBytes: 2000, faults: { chunk: chunkFaults, progress, status } })
        await sendAll(ends, sizes)
        await settled(ends, 300_000)
        const { sent, received } = ends.outcomes
        if (received instanceof Fault) expect(["prefill p0", "decode d0"]).toContain(received.hop)
        else if (received !== undefined) {
          expect(ends.whole()).toBe(true)
          expect(received.first).toEqual(first)
        }
        if (sent instanceof Fault) expect(["prefill p0", "decode d0"]).toContain(sent.hop)
        else expect(received).not.toBeInstanceOf(Fault)
        // A receiver that never heard of a sender waits for its reservation to end.
        if (received === undefined) ends.receiver.close()
        expect(sent).toBeDefined()
        await nothingLeft(ends)
      }),
      { seed: 20, numRuns: 150, endOnFailure: true },
    )
  })
})

it("a reservation whose transfer id, credit or prefix is none is refused by the field's name", () => {
  const good = { id: transferId, worker: "d0", epoch: 1, formatId: "f", prefixTokens: 0, creditBytes: limits.kvWindowBytes }
  expect(decodeDecodeFrame(encodeReserved(good))).toEqual({ type: "reserved", transfer: good })
  for (const wrong of [{ id: "a" }, { id: `${transferId}.x` }, { id: ">" }, { id: transferId.toUpperCase() }, { creditBytes: 0 }, { creditBytes: limits.kvCreditBytes + 1 }, { prefixTokens: -1 }, { prefixTokens: 2 ** 53 }])
    expect(() => decodeDecodeFrame(encodeReserved({ ...good, ...wrong }))).toThrow(Object.keys(wrong)[0])
})

describe("chunks", () => {
  it("are cut to what the bus's messages hold, and refused by name where not even one layer of one block fits", () => {
    expect(chunkBytesOn({ name: "nats", maxPayloadBytes: 100_000 })).toBe(100_000)
    expect(chunkBytesOn({ name: "nats", maxPayloadBytes: 64 * 1024 * 1024 })).toBe(limits.kvChunkBytes)
    const kv = { layerBlockBytes: 200_000, blockTokens: 256 }
    expect(() => checkChunkFits({ name: "nats", maxPayloadBytes: 200_064 }, kv)).not.toThrow()
    expect(() => checkChunkFits({ name: "nats", maxPayloadBytes: 200_063 }, kv)).toThrow(/bus nats.*200063.*256 tokens.*200064.*max_payload.*kv\.blockTokens/)
  })

  it("fit the bus, whatever the range", async () => {
    const sizes: Shape = { layers: 7, firstBlock: 0, blocks: 9, layerBlockBytes: 100 }
    for (const maxPayloadBytes of [300, 365, 1000, 4000, 8000]) {
      const ends = open({ shape: sizes, maxPayloadBytes })
      ends.sender.send({ firstLayer: 0, layers: 7, firstBlock: 0, blocks: 9 })
      ends.sender.finish(first)
      await settled(ends)
      expect(ends.outcomes.received).toMatchObject({ first })
      expect(ends.whole()).toBe(true)
    }
  })

  const header = fc.record({
    transferId: fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => Buffer.from(bytes).toString("hex")),
    sequence: fc.nat(0xffffffff),
    dtype: fc.constantFrom(...kvDtypes),
    firstLayer: fc.nat(0xffff),
    layers: fc.nat(0xffff),
    firstBlock: fc.nat(0xffffffff),
    blocks: fc.nat(0xffff),
    blockTokens: fc.nat(0xffff),
    sender: fc.constantFrom(0, 0, 1, 0xffffffff),
  })
  const payloadOf = ({ sender }: Pick<KvChunkHeader, "sender">, kv: Uint8Array) => (sender === 0 ? kv : new Uint8Array(0))
  const chunkOf = (fields: Omit<KvChunkHeader, "payloadBytes">, kv: Uint8Array): Uint8Array => {
    const payload = payloadOf(fields, kv)
    const chunk = new Uint8Array(kvChunkHeaderBytes + payload.byteLength).fill(0xa5)
    writeChunkHeader(chunk, { ...fields, payloadBytes: kv.byteLength })
    chunk.set(payload, kvChunkHeaderBytes)
    sealChunk(chunk, crc32c(payload, crc32c(headerForCrc(chunk), 0)))
    return chunk
  }

  it("read back what was written, at any place of a larger buffer", () => {
    fc.assert(
      fc.property(header, fc.uint8Array({ maxLength: 100 }), fc.nat(9), (fields, payload, offset) => {
        const chunk = chunkOf(fields, payload)
        const within = new Uint8Array(chunk.byteLength + offset + 3)
        within.set(chunk, offset)
        const found = readChunkHeader(within.subarray(offset, offset + chunk.byteLength))
        expect(found.header).toEqual({ ...fields, payloadBytes: payload.byteLength })
        expect(found.crc).toBe(crc32c(payloadOf(fields, payload), crc32c(headerForCrc(chunk), 0)))
      }),
      { seed: 21 },
    )
  })

  it("never read hostile bytes as anything but a Fault or a header whose length is right", () => {
    const spoilt = fc.tuple(header, fc.uint8Array({ maxLength: 40 }), fc.array(fc.tuple(fc.nat(103), fc.nat(255)), { maxLength: 4 }), fc.nat(110)).map(([fields, payload, changes, length]) => {
      const chunk = chunkOf(fields, payload)
      for (const [at, value] of changes) chunk[at % chunk.byteLength] = value
      return chunk.subarray(0, length)
    })
    fc.assert(
      fc.property(fc.oneof(fc.uint8Array({ maxLength: 200 }), spoilt), (bytes) => {
        try {
          const { sender, payloadBytes } = readChunkHeader(bytes).header
          expect(sender === 0 ? payloadBytes : 0).toBe(bytes.byteLength - kvChunkHeaderBytes)
        } catch (error) {
          expect(error).toBeInstanceOf(Fault)
        }
      }),
      { seed: 22, numRuns: 1000 },
    )
  })
})
