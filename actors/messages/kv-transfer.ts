/**
 * How a transfer is steered, beside its chunks. The sender says how far it is; the receiver answers with what it has. Each
 * message holds the whole state, so that one that is lost, doubled or late does no harm.
 */
import { Schema } from "effect"
import { limits } from "../../config/limits.ts"
import { defineTell } from "../runtime/codec.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

/** 16 bytes as hex, as in the head of a chunk. It becomes part of subjects, so nothing else may stand there. */
export const TransferId = Schema.String.check(Schema.isPattern(/^[0-9a-f]{32}$/))

/** Bytes of chunks that a receiver lets be on their way: what it says is also what a sender may have to hold. */
export const CreditBytes = Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: limits.kvCreditBytes }))

/** From the sender: chunks sent so far; `final` once there will be no more. Sent at the end, and again while unanswered. */
export const KvProgressMessage = Schema.Struct({
  chunks: count,
  final: Schema.Boolean,
  /** With `final`: the first token of each choice, as token frames. */
  first: Schema.Array(Schema.Uint8Array),
  /** The receiver's last word has come: it need not be said again. */
  closed: Schema.Boolean,
  /** The sender sends nothing more, and why. */
  failure: Schema.optional(Schema.String),
})
export type KvProgressMessage = typeof KvProgressMessage.Type
export const KvProgress = defineTell("progress", KvProgressMessage)

/** From the receiver: bytes taken so far, which is credit for as many more, and chunks that did not come. */
export const KvStatusMessage = Schema.Struct({
  bytes: count,
  missing: Schema.Array(count),
  complete: Schema.Boolean,
  /** The receiver takes nothing more, and why. */
  failure: Schema.optional(Schema.String),
})
export type KvStatusMessage = typeof KvStatusMessage.Type
export const KvStatus = defineTell("status", KvStatusMessage)
