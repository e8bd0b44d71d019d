/** Frames with a layout of their own, against Schemas of what they carry, and what is made of broken ones. */
import { Schema } from "effect"
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { limits } from "../../config/limits.ts"
import { decodeDecodeFrame, decodeToken, encodeReserved, encodeToken, finishReasons, Transfer, type TokenEvent } from "../../actors/messages/decode.ts"
import { packHashes, unpackHashes } from "../../actors/messages/hashes.ts"
import { decodePrefillFrame, encodePrefillFrame, type PrefillFrame } from "../../actors/messages/prefill.ts"
import { decodeGenerateEvent, encodeGenerateEvent, type GenerateEvent, type TokenLogprob } from "../../actors/messages/request.ts"
import { packTokens, unpackTokens } from "../../actors/messages/tokens.ts"
import { Fault } from "../../actors/runtime/fault.ts"

const int32 = fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 })
const float32 = fc.float({ noDefaultInfinity: true })
const tops = (width: number) => fc.record({ topTokens: fc.array(int32, { minLength: width, maxLength: width }), topLogprobs: fc.array(float32, { minLength: width, maxLength: width }) })

const tokenEvent: fc.Arbitrary<TokenEvent> = fc
  .record({ choice: fc.integer({ min: 0, max: 65_535 }), index: fc.integer({ min: 0, max: 2 ** 32 - 1 }), token: int32, logprob: float32, finish: fc.constantFrom(...finishReasons), width: fc.integer({ min: 0, max: limits.topLogprobs }) })
  .chain(({ width, ...event }) => tops(width).map((lists) => ({ ...event, ...lists })))

const transferId = fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => Buffer.from(bytes).toString("hex"))
const transfer: fc.Arbitrary<Transfer> = fc.record({ id: transferId, worker: fc.string(), epoch: fc.maxSafeInteger().map(Math.abs), formatId: fc.string(), prefixTokens: fc.nat(), creditBytes: fc.integer({ min: 1, max: limits.kvCreditBytes }) })

const prefillFrame: fc.Arbitrary<PrefillFrame> = fc.oneof(
  tokenEvent.map((event) => ({ type: "token", event }) as const),
  fc.record({ type: fc.constant("done" as const), cachedTokens: fc.nat(), computedTokens: fc.nat() }),
  fc.tuple(fc.nat(), fc.integer({ min: 0, max: 20 }), fc.integer({ min: 0, max: 40 })).chain(([position, width, count]) =>
    fc
      .record({ logprobs: fc.array(float32, { minLength: count, maxLength: count }), lists: tops(width * count) })
      .map(({ logprobs, lists }) => ({
        type: "scores" as const,
        scores: { position, width, logprobs: Float32Array.from(logprobs), topTokens: Int32Array.from(lists.topTokens), topLogprobs: Float32Array.from(lists.topLogprobs) },
      })),
  ),
)

const named = fc.record({ token: fc.nat(), text: fc.string({ unit: "binary" }), bytes: fc.uint8Array({ maxLength: 8 }), logprob: fc.double({ noNaN: true, max: -Number.MIN_VALUE }) })
const tokenLogprob: fc.Arbitrary<TokenLogprob> = fc.record({ token: fc.nat(), text: fc.string(), bytes: fc.uint8Array({ maxLength: 8 }), logprob: fc.option(fc.double({ noNaN: true, max: -Number.MIN_VALUE })), top: fc.array(named, { maxLength: 5 }) })
const generateEvent: fc.Arbitrary<GenerateEvent> = fc.oneof(
  fc.record({ type: fc.constant("prompt" as const), tokens: fc.array(int32).map(packTokens), text: fc.string({ unit: "binary" }), cachedTokens: fc.nat() }),
  fc.record({ type: fc.constant("scores" as const), logprobs: fc.array(tokenLogprob, { maxLength: 5 }) }),
  fc.record({
    type: fc.constant("delta" as const),
    choice: fc.nat(127),
    text: fc.string({ unit: "binary" }),
    tokens: fc.array(fc.nat(), { maxLength: 5 }),
    logprobs: fc.option(fc.array(tokenLogprob, { maxLength: 5 }), { nil: undefined }),
    finish: fc.constantFrom("stop" as const, "length" as const, undefined),
  }),
  fc.record({ type: fc.constant("done" as const), usage: fc.record({ promptTokens: fc.nat(), completionTokens: fc.nat(), cachedTokens: fc.nat() }) }),
)

// What a reader may rely on, as Schemas of their own.
const TokenOracle = Schema.Struct({
  choice: Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: 65_535 })),
  index: Schema.Int.check(Schema.isGreaterThanOrEqualTo(0)),
  token: Schema.Int,
  logprob: Schema.Number,
  topTokens: Schema.Array(Schema.Int),
  topLogprobs: Schema.Array(Schema.Number),
  finish: Schema.Literals(finishReasons),
})
const LogprobOracle = Schema.Struct({ token: Schema.Int, text: Schema.String, bytes: Schema.Uint8Array, logprob: Schema.NullOr(Schema.Number), top: Schema.Array(Schema.Struct({ token: Schema.Int, text: Schema.String, bytes: Schema.Uint8Array, logprob: Schema.Number })) })
const GenerateOracle = Schema.Union([
  Schema.Struct({ type: Schema.Literal("prompt"), tokens: Schema.Uint8Array, text: Schema.String, cachedTokens: Schema.Int }),
  Schema.Struct({ type: Schema.Literal("scores"), logprobs: Schema.Array(LogprobOracle) }),
  Schema.Struct({
    type: Schema.Literal("delta"),
    choice: Schema.Int,
    text: Schema.String,
    tokens: Schema.Array(Schema.Int),
    logprobs: Schema.UndefinedOr(Schema.Array(LogprobOracle)),
    finish: Schema.UndefinedOr(Schema.Literals(["stop", "length"])),
  }),
  Schema.Struct({ type: Schema.Literal("done"), usage: Schema.Struct({ promptTokens: Schema.Int, completionTokens: Schema.Int, cachedTokens: Schema.Int }) }),
])

/** Bytes as they come from a network: a view into a larger buffer, at any offset. */
const asView = (bytes: Uint8Array, offset: number): Uint8Array => {
  const buffer = Buffer.alloc(bytes.byteLength + offset + 5, 0xee)
  buffer.set(bytes, offset)
  return buffer.subarray(offset, offset + bytes.byteLength)
}

/** Without the difference between kinds of arrays, and between 0 and -0. */
const plain = (value: unknown): unknown => {
  if (typeof value === "number") return String(value)
  if (typeof value !== "object" || value === null) return value
  if (Array.isArray(value) || ArrayBuffer.isView(value)) return Array.from(value as Uint8Array, plain)
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, plain(item)]))
}

/** Whatever becomes of broken bytes, it is a value that the oracle accepts or a Fault. */
const neverThrowsElse = (bytes: Uint8Array, decode: (bytes: Uint8Array) => unknown, accept: (value: unknown) => unknown = () => {}): void => {
  let value: unknown
  try {
    value = decode(bytes)
  } catch (error) {
    expect(error).toBeInstanceOf(Fault)
    return
  }
  accept(value)
}

const offset = fc.integer({ min: 0, max: 9 })

describe("frames", () => {
  it("of tokens give back every field, at any offset, as their Schema says", () => {
    const check = Schema.decodeUnknownSync(TokenOracle)
    fc.assert(
      fc.property(tokenEvent, offset, (event, at) => {
        const bytes = asView(encodeToken(event), at)
        expect(bytes.byteLength).toBe(20 + 8 * event.topTokens.length)
        expect(check(decodeToken(bytes))).toEqual(event)
        expect(decodeDecodeFrame(bytes)).toEqual({ type: "token", event })
      }),
    )
  })

  it("of tokens have the layout that is written down", () => {
    const event: TokenEvent = { choice: 0x0102, index: 0x03040506, token: 0x0708090a, logprob: -1, topTokens: [7], topLogprobs: [-0.5], finish: "length" }
    const words = [1, 2, 0x02, 0x01, 0x06, 0x05, 0x04, 0x03, 0x0a, 0x09, 0x08, 0x07, 0, 0, 0x80, 0xbf, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0xbf]
    expect([...encodeToken(event)]).toEqual(words)
  })

  it("of a reservation give back the transfer", () => {
    fc.assert(fc.property(transfer, offset, (sent, at) => void expect(decodeDecodeFrame(asView(encodeReserved(sent), at))).toEqual({ type: "reserved", transfer: sent })))
  })

  it("of prefill give back what was sent, in memory of their own", () => {
    fc.assert(
      fc.property(prefillFrame, offset, (frame, at) => {
        const bytes = asView(encodePrefillFrame(frame), at)
        const got = decodePrefillFrame(bytes)
        bytes.fill(0)
        expect(plain(got)).toEqual(plain(frame))
      }),
    )
  })

  it("of generations give back what was sent, as their Schema says", () => {
    const check = Schema.decodeUnknownSync(GenerateOracle)
    fc.assert(fc.property(generateEvent, offset, (event, at) => void expect(plain(check(decodeGenerateEvent(asView(encodeGenerateEvent(event), at))))).toEqual(plain(event))))
  })

  it("that are cut short or of another kind are a Fault", () => {
    const anyFrame = fc.oneof(tokenEvent.map(encodeToken), transfer.map(encodeReserved), prefillFrame.map(encodePrefillFrame))
    fc.assert(
      fc.property(anyFrame, fc.nat(), (frame, place) => {
        const cut = frame.subarray(0, place % frame.length)
        expect(() => decodeDecodeFrame(cut)).toThrow(Fault)
        expect(() => decodePrefillFrame(cut)).toThrow(Fault)
      }),
    )
    for (const strange of [[], [9], [255, 1, 2, 3]]) {
      expect(() => decodeDecodeFrame(Uint8Array.from(strange))).toThrow(Fault)
      expect(() => decodePrefillFrame(Uint8Array.from(strange))).toThrow(Fault)
      expect(() => decodeGenerateEvent(Uint8Array.from(strange))).toThrow(Fault)
    }
  })

  it("that were corrupted are a Fault or a frame of the right shape, and nothing else is thrown", () => {
    const check = Schema.decodeUnknownSync(TokenOracle)
    const frames = fc.oneof(tokenEvent.map(encodeToken), transfer.map(encodeReserved), prefillFrame.map(encodePrefillFrame), generateEvent.map(encodeGenerateEvent), fc.uint8Array({ maxLength: 80 }))
    fc.assert(
      fc.property(frames, fc.nat(), fc.nat(255), (frame, place, byte) => {
        const bytes = Uint8Array.from(frame)
        if (bytes.length > 0) bytes[place % bytes.length] = byte
        neverThrowsElse(bytes, decodeToken, check)
        neverThrowsElse(bytes, decodeDecodeFrame)
        neverThrowsElse(bytes, decodePrefillFrame)
        neverThrowsElse(bytes, decodeGenerateEvent)
      }),
      { numRuns: 1000 },
    )
  })
})

describe("tokens and hashes as bytes", () => {
  it("give back every token, in memory of its own, whatever holds the bytes", () => {
    fc.assert(
      fc.property(fc.array(int32), offset, (tokens, at) => {
        const bytes = asView(packTokens(tokens), at)
        const got = unpackTokens(bytes, "prompt")
        bytes.fill(0)
        expect([...got]).toEqual(tokens)
        expect([...unpackTokens(packTokens(Int32Array.from(tokens)), "prompt")]).toEqual(tokens)
      }),
    )
    expect(() => unpackTokens(new Uint8Array(6), "delivered")).toThrow("delivered: 6 bytes are no token ids")
  })

  it("give back every hash, in order", () => {
    const hash = fc.uint8Array({ minLength: 16, maxLength: 16 }).map((bytes) => Buffer.from(bytes).toString("latin1"))
    fc.assert(fc.property(fc.array(hash), offset, (hashes, at) => void expect(unpackHashes(asView(packHashes(hashes), at))).toEqual(hashes)))
  })
})
