/**
 * What a decode actor is asked: to reserve a place for a request, and to stream the tokens it draws there.
 */
import { Schema } from "effect"
import { limits } from "../../config/limits.ts"
import { defineStream, defineTell, pack, readFrame, unpack } from "../runtime/codec.ts"
import { Fault } from "../runtime/fault.ts"
import { CreditBytes, TransferId } from "./kv-transfer.ts"
import { Sampling } from "./sampling.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

export const SequenceMessage = Schema.Struct({
  requestId: Schema.String,
  attempt: count,
  /** The worker that computes the prompt, where it is another than the one that decodes: its KV comes by transfer. */
  prefillWorker: Schema.optional(Schema.String),
  /** Names what KV depends on besides the tokens; blocks of another format are refused. */
  formatId: Schema.String,
  /** Root of the chained block hashes: model and tenant. */
  hashRoot: Schema.Uint8Array, // [16]
  prompt: Schema.Uint8Array, // int32 little-endian
  /** What was drawn already for each choice, by an earlier attempt; empty on the first. */
  delivered: Schema.Array(Schema.Uint8Array),
  choices: Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: limits.choices })),
  /** Choices that are finished already, of a generation that goes on here. */
  finished: Schema.Array(count),
  sampling: Sampling,
  /** Tokens of each choice in all, `delivered` included. */
  maxTokens: count,
  /** Drawing one of these ends a choice. */
  stopTokens: Schema.Array(count),
  /** These are not drawn before `sampling.minTokens`. */
  suppressedTokens: Schema.Array(count),
  /** Top log probabilities of each token; -1: none at all. */
  logprobs: Schema.Int.check(Schema.isBetween({ minimum: -1, maximum: limits.topLogprobs })),
  promptLogprobs: Schema.Boolean,
})
export type SequenceMessage = typeof SequenceMessage.Type

/**
 * Takes blocks for a request and answers with a stream: one `Reserved` frame when it has them, then the tokens that are
 * drawn after those of prefill. The stream is the lease: its end, from either side, frees everything.
 */
export const Reserve = defineStream("reserve", SequenceMessage)

/** Ends one choice of a reservation: its text is complete, by a stop string. */
export const Finish = defineTell("finish", Schema.Struct({ transferId: Schema.String, choice: count }))

/** What the receiver of KV opens, and prefill sends into. */
export const Transfer = Schema.Struct({
  id: TransferId,
  worker: Schema.String,
  /** Of the receiving worker: prefill of the same worker hands over a block table instead of bytes. */
  epoch: count,
  formatId: Schema.String,
  /** Leading tokens that decode holds already. */
  prefixTokens: count,
  /** Bytes of chunks that decode lets be on their way. */
  creditBytes: CreditBytes,
  /** Name of the receiving machine. */
  node: Schema.optional(Schema.String),
})
export type Transfer = typeof Transfer.Type

export const finishReasons = ["", "stop", "length"] as const

export interface TokenEvent {
  readonly choice: number
  /** Place of the token in its choice's output. */
  readonly index: number
  readonly token: number
  /** NaN where not asked for. */
  readonly logprob: number
  readonly topTokens: ReadonlyArray<number>
  readonly topLogprobs: ReadonlyArray<number>
  readonly finish: (typeof finishReasons)[number]
}

const kind = { reserved: 0, token: 1 } as const
const tokenHeaderBytes = 20

export type DecodeFrame = { readonly type: "reserved"; readonly transfer: Transfer } | { readonly type: "token"; readonly event: TokenEvent }

const decodeTransfer = Schema.decodeUnknownSync(Transfer)

export const encodeReserved = (transfer: Transfer): Uint8Array => {
  const packed = pack(transfer)
  const bytes = new Uint8Array(packed.byteLength + 1)
  bytes[0] = kind.reserved
  bytes.set(packed, 1)
  return bytes
}

/**
 * One token, little-endian: u8 kind, u8 finish, u16 choice, u32 index, i32 token, f32 log probability, u8 n, 3 zero bytes,
 * then n times i32 token, f32 log probability. Fixed, since it is sent once a token.
 */
export const encodeToken = (event: TokenEvent): Uint8Array => {
  const bytes = new Uint8Array(tokenHeaderBytes + 8 * event.topTokens.length)
  const view = new DataView(bytes.buffer)
  bytes[0] = kind.token
  bytes[1] = finishReasons.indexOf(event.finish)
  view.setUint16(2, event.choice, true)
  view.setUint32(4, event.index, true)
  view.setInt32(8, event.token, true)
  view.setFloat32(12, event.logprob, true)
  bytes[16] = event.topTokens.length
  for (let i = 0; i < event.topTokens.length; i++) {
    view.setInt32(tokenHeaderBytes + 8 * i, event.topTokens[i]!, true)
    view.setFloat32(tokenHeaderBytes + 8 * i + 4, event.topLogprobs[i]!, true)
  }
  return bytes
}

const malformed = (what: string): Fault => new Fault({ code: "internal", message: `decode frame: ${what}`, hop: "decode frame" })

/** Throws a Fault on a frame of another layout. */
export const decodeToken = (bytes: Uint8Array): TokenEvent => {
  const top = bytes[16] ?? 0
  const finish = finishReasons[bytes[1] ?? 255]
  if (bytes[0] !== kind.token || finish === undefined || bytes.byteLength !== tokenHeaderBytes + 8 * top) throw malformed(`${bytes.byteLength} bytes are no token`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const topTokens: Array<number> = []
  const topLogprobs: Array<number> = []
  for (let i = 0; i < top; i++) {
    topTokens.push(view.getInt32(tokenHeaderBytes + 8 * i, true))
    topLogprobs.push(view.getFloat32(tokenHeaderBytes + 8 * i + 4, true))
  }
  return {
    choice: view.getUint16(2, true),
    index: view.getUint32(4, true),
    token: view.getInt32(8, true),
    logprob: view.getFloat32(12, true),
    topTokens,
    topLogprobs,
    finish,
  }
}

/** Throws a Fault on a frame of another layout. */
export const decodeDecodeFrame = (bytes: Uint8Array): DecodeFrame => {
  if (bytes[0] === kind.token) return { type: "token", event: decodeToken(bytes) }
  if (bytes[0] !== kind.reserved) throw malformed(`kind ${bytes[0]}`)
  return readFrame("decode frame", () => ({ type: "reserved", transfer: decodeTransfer(unpack(bytes.subarray(1))) }))
}
