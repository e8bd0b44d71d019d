/**
 * What a KV store is asked, in batches, by format and chained hash: whether it has blocks, to send them, and to take them.
 * The blocks themselves go by transfer, as between workers.
 */
import { Schema } from "effect"
import { limits } from "../../config/limits.ts"
import { kvDtypes } from "../../kernels/index.ts"
import { defineAsk } from "../runtime/codec.ts"
import { hashBytes } from "./hashes.ts"
import { CreditBytes, TransferId } from "./kv-transfer.ts"

const upTo = (maximum: number) => Schema.Int.check(Schema.isBetween({ minimum: 1, maximum }))
/** As wide as in the head of a chunk. */
const place = Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: 0xffffffff }))

const Blocks = { formatId: Schema.String, hashes: Schema.Uint8Array.check(Schema.makeFilter((hashes) => hashes.byteLength <= limits.storeMessageBlocks * hashBytes || `more than ${limits.storeMessageBlocks} hashes`)) } // [n, 16]
export type BlocksMessage = { readonly formatId: string; readonly hashes: Uint8Array }

/** How the bytes of a block are divided: layers of `layerBlockBytes` each. Bounded, since room is made after its word. */
export const KvLayoutMessage = Schema.Struct({
  dtype: Schema.Literals(kvDtypes),
  blockTokens: upTo(limits.kvBlockTokens),
  layers: upTo(limits.kvLayers),
  layerBlockBytes: upTo(limits.kvLayerBlockBytes),
}).check(Schema.makeFilter(({ layers, layerBlockBytes }) => layers * layerBlockBytes <= limits.kvBlockBytes || `a block of more than ${limits.kvBlockBytes} bytes`))

/** Which of the blocks are there: in all stores where any is asked, else in this one. */
export const Have = defineAsk(
  "have",
  Schema.Struct({
    ...Blocks,
    /** They are wanted for a sequence: what is not there was missed. */
    toFetch: Schema.optional(Schema.Boolean),
  }),
  Schema.Struct({
    present: Schema.Array(Schema.Boolean),
    /** Which store has it, by its id; empty where none has. Absent: whoever is asked for them. */
    at: Schema.optional(Schema.Array(Schema.String)),
    /** Blocks that have to be read from disk before they can be sent. */
    onDisk: Schema.optional(Schema.Array(Schema.Boolean)),
    /** Blocks that an open put brings. */
    coming: Schema.optional(Schema.Array(Schema.Boolean)),
  }),
)

export const GetMessage = Schema.Struct({ ...Blocks, layout: KvLayoutMessage, transferId: TransferId, firstBlock: place, creditBytes: CreditBytes })
export type GetMessage = typeof GetMessage.Type

/** Sends these blocks into a transfer that the asker has opened: all of them, or none where one is not here any more. Workers answer it too. */
export const Get = defineAsk("get", GetMessage, Schema.Struct({ sent: Schema.Boolean }))

/**
 * Opens a transfer for those of the blocks that are wanted, in their order, its places counted from 0. They are kept, and
 * seen, once all of them are whole.
 */
export const Put = defineAsk(
  "put",
  Schema.Struct({
    ...Blocks,
    layout: KvLayoutMessage,
    /** Place of each block in its chain, 0 for the first of a prompt; absent: as if all were the first. */
    depths: Schema.optional(Schema.Array(place)),
  }),
  Schema.Struct({ wanted: Schema.Array(Schema.Boolean), transferId: TransferId, creditBytes: CreditBytes }),
)

const name = Schema.String.check(Schema.isMaxLength(256))

/**
 * Keeps blocks from being evicted for so long, those that are there and those that come, in place of what this owner of the tenant
 * wanted kept before; 0 lets all of it go. A pin ends with the process of the store. Answers which of the blocks are there and
 * pinned: not where too much is already, in all or by the tenant.
 */
export const Pin = defineAsk("pin", Schema.Struct({ ...Blocks, owner: name, tenant: name, leaseMs: Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: limits.storePinMs })) }), Schema.Struct({ pinned: Schema.Array(Schema.Boolean) }))
