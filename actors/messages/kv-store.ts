/**
 * What a KV store is asked, in batches, by format and chained hash: whether it has blocks, to send them, and to take them.
 * The blocks themselves go by transfer, as between workers.
 */
import { Schema } from "effect"
import { defineAsk } from "../runtime/codec.ts"
import { kvDtypes } from "./kv-chunk.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

const Blocks = { formatId: Schema.String, hashes: Schema.Uint8Array } // [n, 16]
export type BlocksMessage = { readonly formatId: string; readonly hashes: Uint8Array }

/** How the bytes of a block are divided: layers of `layerBlockBytes` each. */
export const KvLayoutMessage = Schema.Struct({ dtype: Schema.Literals(kvDtypes), blockTokens: count, layers: count, layerBlockBytes: count })

/** Which of the blocks are here. */
export const Have = defineAsk("have", Schema.Struct(Blocks), Schema.Struct({ present: Schema.Array(Schema.Boolean) }))

/** Sends these blocks into a transfer that the asker has opened: all of them, or none where one is not here any more. */
export const Get = defineAsk(
  "get",
  Schema.Struct({ ...Blocks, layout: KvLayoutMessage, transferId: Schema.String, firstBlock: count, creditBytes: count }),
  Schema.Struct({ sent: Schema.Boolean }),
)

/**
 * Opens a transfer for those of the blocks that are wanted, in their order, its places counted from 0. They are kept, and
 * seen, once all of them are whole.
 */
export const Put = defineAsk(
  "put",
  Schema.Struct({ ...Blocks, layout: KvLayoutMessage }),
  Schema.Struct({ wanted: Schema.Array(Schema.Boolean), transferId: Schema.String, creditBytes: count }),
)
