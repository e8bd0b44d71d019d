/**
 * What a KV store is asked, in batches, by format and chained hash: whether it has blocks, for them, and to keep them.
 */
import { Schema } from "effect"
import { defineAsk, defineStream } from "../runtime/codec.ts"

const BlocksMessage = Schema.Struct({ formatId: Schema.String, hashes: Schema.Uint8Array }) // [n, 16]
export type BlocksMessage = typeof BlocksMessage.Type

/** Which of the blocks are here. */
export const Have = defineAsk("have", BlocksMessage, Schema.Struct({ present: Schema.Array(Schema.Boolean) }))

/** The leading blocks that are here, in order: a frame each, in the wire layout of kernels' `exportBlock`. */
export const Get = defineStream("get", BlocksMessage)

/** Keeps a whole block; one that is here already is only touched. */
export const Put = defineAsk(
  "put",
  Schema.Struct({ formatId: Schema.String, hash: Schema.Uint8Array, bytes: Schema.Uint8Array }),
  Schema.Struct({ stored: Schema.Boolean }),
)
