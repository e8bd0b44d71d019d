/**
 * What a prefill actor is asked: to compute a prompt into the transfer that decode has opened.
 */
import { Schema } from "effect"
import { defineAsk, defineStream, pack, readFrame, unpack } from "../runtime/codec.ts"
import { Holder, KvDelta } from "./scheduler.ts"
import { decodeToken, encodeToken, SequenceMessage, Transfer, type TokenEvent } from "./decode.ts"

export const PrefillMessage = Schema.Struct({
  sequence: SequenceMessage,
  transfer: Transfer,
  /** Another worker whose pool holds a prefix. */
  holder: Schema.optional(Holder),
})
export type PrefillMessage = typeof PrefillMessage.Type

/** Answered by a stream: log probabilities of the prompt where asked for, the first token of each choice, `done`. */
export const Prefill = defineStream("prefill", PrefillMessage)

/** Log probabilities of prompt tokens from `position` on, each given the tokens before it. */
export interface PromptScores {
  readonly position: number
  readonly width: number
  readonly logprobs: Float32Array // [n]
  readonly topTokens: Int32Array // [n, width]
  readonly topLogprobs: Float32Array // [n, width]
}

export type PrefillFrame =
  | { readonly type: "scores"; readonly scores: PromptScores }
  | { readonly type: "token"; readonly event: TokenEvent }
  | { readonly type: "done"; readonly cachedTokens: number; readonly computedTokens: number }

const kind = { token: 1, scores: 2, done: 3 } as const

const Done = Schema.Struct({ cachedTokens: Schema.Int, computedTokens: Schema.Int })
const Scores = Schema.Struct({
  position: Schema.Int,
  width: Schema.Int,
  logprobs: Schema.Uint8Array,
  topTokens: Schema.Uint8Array,
  topLogprobs: Schema.Uint8Array,
})
const decodeDone = Schema.decodeUnknownSync(Done)
const decodeScores = Schema.decodeUnknownSync(Scores)

const bytesOf = (array: Float32Array | Int32Array): Uint8Array => new Uint8Array(array.buffer, array.byteOffset, array.byteLength)

const framed = (frameKind: number, value: unknown): Uint8Array => {
  const packed = pack(value)
  const bytes = new Uint8Array(packed.byteLength + 1)
  bytes[0] = frameKind
  bytes.set(packed, 1)
  return bytes
}

export const encodePrefillFrame = (frame: PrefillFrame): Uint8Array => {
  switch (frame.type) {
    case "token":
      return encodeToken(frame.event)
    case "scores":
      return framed(kind.scores, {
        ...frame.scores,
        logprobs: bytesOf(frame.scores.logprobs),
        topTokens: bytesOf(frame.scores.topTokens),
        topLogprobs: bytesOf(frame.scores.topLogprobs),
      })
    case "done":
      return framed(kind.done, { cachedTokens: frame.cachedTokens, computedTokens: frame.computedTokens })
  }
}

const floats = (bytes: Uint8Array): Float32Array => new Float32Array(new Uint8Array(bytes).buffer)
const ids = (bytes: Uint8Array): Int32Array => new Int32Array(new Uint8Array(bytes).buffer)

/** Throws a Fault on a frame of another layout. */
export const decodePrefillFrame = (bytes: Uint8Array): PrefillFrame => readFrame("prefill frame", () => readPrefillFrame(bytes))

const readPrefillFrame = (bytes: Uint8Array): PrefillFrame => {
  switch (bytes[0]) {
    case kind.token:
      return { type: "token", event: decodeToken(bytes) }
    case kind.scores: {
      const { position, width, ...packed } = decodeScores(unpack(bytes.subarray(1)))
      const scores = { position, width, logprobs: floats(packed.logprobs), topTokens: ids(packed.topTokens), topLogprobs: floats(packed.topLogprobs) }
      const tops = scores.logprobs.length * width
      if (scores.topTokens.length !== tops || scores.topLogprobs.length !== tops) throw new Error(`expected ${tops} top tokens, found ${scores.topTokens.length} with ${scores.topLogprobs.length} log probabilities`)
      return { type: "scores", scores }
    }
    case kind.done:
      return { type: "done", ...decodeDone(unpack(bytes.subarray(1))) }
    default:
      throw new Error(`kind ${bytes[0]}`)
  }
}

const eventId = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

/**
 * What a scheduler that knows the worker's prefix index as it was before event `from` has missed: what those events come to, or, where
 * they are no longer kept or `from` is left out, everything that is there now, behind a `cleared`.
 */
export const KvMissed = defineAsk("kv-missed", Schema.Struct({ from: Schema.optional(eventId) }), Schema.Struct({ nextId: eventId, delta: KvDelta }))
