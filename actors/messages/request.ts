/**
 * What request actors are asked: to generate, and to turn text into tokens and back.
 */
import { Schema } from "effect"
import { limits } from "../../config/limits.ts"
import { defineAsk, defineStream, defineTell, pack, readFrame, unpack } from "../runtime/codec.ts"
import { Sampling } from "./sampling.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

export const ChatMessage = Schema.Struct({
  role: Schema.String,
  content: Schema.String,
  name: Schema.optional(Schema.String),
})
export type ChatMessage = typeof ChatMessage.Type

export const Prompt = Schema.Union([
  Schema.Struct({
    kind: Schema.Literal("chat"),
    messages: Schema.Array(ChatMessage),
    /** What the client calls them, where that is not `messages`. */
    param: Schema.optional(Schema.Literal("input")),
    /** The ids that the first messages had: of a prompt and of its answer, which is the last of them. */
    continues: Schema.optional(Schema.Struct({ tokens: Schema.Uint8Array /* int32 little-endian */, messages: count })),
  }),
  /** Plain text, tokenised with the model's beginning-of-sequence rule. */
  Schema.Struct({ kind: Schema.Literal("text"), text: Schema.String }),
  Schema.Struct({ kind: Schema.Literal("tokens"), tokens: Schema.Uint8Array }), // int32 little-endian
])
export type Prompt = typeof Prompt.Type

/**
 * Asks for a generation; answered by a stream of `GenerateEvent`. The request id, seed and attempt are the gateway's. A
 * later attempt carries what was delivered already, and an older attempt is fenced.
 */
export const GenerateMessage = Schema.Struct({
  requestId: Schema.String,
  attempt: count,
  tenant: Schema.String,
  /** Keeps the KV of requests with another salt apart. */
  cacheSalt: Schema.optional(Schema.String),
  prompt: Prompt,
  choices: Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: limits.choices })),
  sampling: Sampling,
  /** Most tokens of each choice; absent: what the context still holds. */
  maxTokens: Schema.optional(count),
  stop: Schema.Array(Schema.String),
  stopTokenIds: Schema.Array(count),
  ignoreEos: Schema.Boolean,
  /** Number of top log probabilities of each token; absent: none at all. */
  logprobs: Schema.optional(Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: limits.topLogprobs }))),
  /** Log probabilities of the prompt too (echo). */
  promptLogprobs: Schema.Boolean,
  /** Names the conversation that this is a turn of: its KV is kept in the store for a while, and that of earlier turns no longer. */
  conversation: Schema.optional(Schema.String.check(Schema.isMaxLength(256))),
  /** Tokens of each choice that an older attempt has delivered. Empty on the first attempt. */
  delivered: Schema.Array(Schema.Uint8Array), // [choices] int32 little-endian
})
export type GenerateMessage = typeof GenerateMessage.Type
export const Generate = defineStream("generate", GenerateMessage)

/** A conversation is over: its KV is kept no longer than any other. */
export const EndConversation = defineTell("end-conversation", Schema.Struct({ tenant: Schema.String, conversation: Schema.String }))

export const Tokenize = defineAsk("tokenize", Schema.Struct({ content: Schema.String }), Schema.Struct({ tokens: Schema.Uint8Array })) // int32 little-endian
export const Detokenize = defineAsk("detokenize", Schema.Struct({ tokens: Schema.Array(count) }), Schema.Struct({ content: Schema.String }))

/** One token with its log probability and the most likely ones at its place; `bytes` is its text as UTF-8, maybe in part. */
export interface TokenLogprob {
  readonly token: number
  readonly text: string
  readonly bytes: Uint8Array
  /** Null only for the first token of a prompt, which nothing comes before. */
  readonly logprob: number | null
  readonly top: ReadonlyArray<Omit<TokenLogprob, "top">>
}

export type FinishReason = "stop" | "length"

export interface Usage {
  readonly promptTokens: number
  readonly completionTokens: number
  /** Prompt tokens whose KV was found, in the pool or the store, and not computed. */
  readonly cachedTokens: number
}

/**
 * The frames of a generation, in this order: one `prompt`, `scores` of the whole prompt where asked for, deltas with one
 * finish for each choice, one `done`.
 */
export type GenerateEvent =
  | {
      readonly type: "prompt"
      readonly tokens: Uint8Array // int32 little-endian
      readonly text: string // the prompt's text; empty unless promptLogprobs
      readonly cachedTokens: number
    }
  /** Log probabilities of the prompt's next tokens, in as many frames as it takes. Only with promptLogprobs. */
  | { readonly type: "scores"; readonly logprobs: ReadonlyArray<TokenLogprob> }
  | {
      readonly type: "delta"
      readonly choice: number
      /** Text that is safe to show: whole characters, and no part of a stop string. May be empty. */
      readonly text: string
      /** Ids drawn since the last delta; their text may come later. */
      readonly tokens: ReadonlyArray<number>
      readonly logprobs: ReadonlyArray<TokenLogprob> | undefined // one for each of `tokens`, where asked for
      readonly finish: FinishReason | undefined // on the last delta of a choice
    }
  | { readonly type: "done"; readonly usage: Usage }

// Deltas are sent once a token: no Schema, and test/actors/messages.test.ts checks them against one.
export const encodeGenerateEvent = (event: GenerateEvent): Uint8Array => pack(event)
/** Throws a Fault on bytes that are no event. */
export const decodeGenerateEvent = (bytes: Uint8Array): GenerateEvent =>
  readFrame("generate event", () => {
    const event = unpack(bytes) as GenerateEvent | null
    if (typeof event?.type !== "string") throw new Error("it has no type")
    return event
  })
