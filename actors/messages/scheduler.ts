/**
 * What the scheduler hears: requests for a placement, how they go on, and what workers say of themselves.
 */
import { Schema } from "effect"
import { defineAsk, defineTell } from "../runtime/codec.ts"
import { hashBytes } from "./hashes.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))
/** What the policies divide by, and what everybody has at least one of. */
const positive = Schema.Int.check(Schema.isGreaterThanOrEqualTo(1))

export const Role = Schema.Literals(["prefill", "decode"])
export type Role = typeof Role.Type

export const PlaceMessage = Schema.Struct({
  requestId: Schema.String,
  attempt: count,
  /** Tokens to have KV for before the next one is drawn: the prompt, and what was delivered. */
  tokens: count,
  /** Chained hashes of the full blocks of the prompt, first block first. */
  hashes: Schema.Uint8Array, // [blocks, 16]
  choices: count,
  /** Most tokens that will be drawn for each choice. */
  maxTokens: count,
  /** Workers that have failed this request. */
  exclude: Schema.Array(Schema.String),
  /** It has begun already, and goes before those that have not, whatever the queue's length. */
  begun: Schema.optional(Schema.Boolean),
  /** The worker that gives it away and holds its KV: another decodes, and computes itself what it cannot fetch. */
  movedFrom: Schema.optional(Schema.String),
})
export type PlaceMessage = typeof PlaceMessage.Type

/** A worker that is thought to hold the first `blocks` blocks of a prompt. */
export const Holder = Schema.Struct({ worker: Schema.String, blocks: positive })
export type Holder = typeof Holder.Type

export const Placement = Schema.Struct({
  prefill: Schema.String,
  decode: Schema.String,
  /** Another worker that holds more of the prompt than the prefill worker does. */
  holder: Schema.optional(Holder),
  /** Leading blocks of the prompt that the prefill worker is thought to hold. */
  prefixBlocks: count,
  estimates: Schema.Struct({ queuedTokens: count, computeTokens: count }),
  /** The workers' incarnations that are meant. */
  epochs: Schema.Struct({ prefill: count, decode: count }),
  /** Of the scheduler: a later one fences what an earlier one placed. */
  epoch: count,
})
export type Placement = typeof Placement.Type

/** Answered when there is a place, however long the queue; refused as `overloaded` when the queue is full. */
export const Place = defineAsk("place", PlaceMessage, Placement)

/** The prompt is computed: its share of the worker's predicted load goes. */
export const Prefilled = defineTell("prefilled", Schema.Struct({ requestId: Schema.String, attempt: count }))

/** The request is over, whatever its end: its place is free. Also takes it out of the queue. */
export const Release = defineTell("release", Schema.Struct({ requestId: Schema.String, attempt: count }))

export const WorkerLoad = Schema.Struct({
  sequences: count,
  waiting: count,
  maxBatch: positive,
  blocks: count,
  /** Neither referenced nor cached, or cached and so to be had. */
  freeBlocks: count,
  blockTokens: positive,
})
export type WorkerLoad = typeof WorkerLoad.Type

export const HeartbeatMessage = Schema.Struct({
  worker: Schema.String,
  epoch: count,
  roles: Schema.Array(Role),
  load: WorkerLoad,
  /** Prompt tokens that it computes in a second, as measured; absent before there was anything to measure. */
  prefillTokPerS: Schema.optional(Schema.Finite),
  /** Requests that it serves; a placement that no worker knows of lapses. */
  requests: Schema.Array(Schema.String),
  /** Id of the next KV event, so that a gap shows. */
  nextEventId: count,
})
export type HeartbeatMessage = typeof HeartbeatMessage.Type
export const Heartbeat = defineTell("heartbeat", HeartbeatMessage)

/** A worker says that it leaves; no new placements there. */
export const Leave = defineTell("leave", Schema.Struct({ worker: Schema.String, epoch: count }))

const hashes = Schema.Uint8Array.check(Schema.makeFilter((bytes: Uint8Array) => bytes.length % hashBytes === 0 || `expected hashes of ${hashBytes} bytes`))

/** What becomes of what is known of a worker's prefix index: first all of it may be cleared, then hashes are stored, then removed. */
export const KvDelta = Schema.Struct({
  cleared: Schema.optional(Schema.Literal(true)),
  stored: hashes, // [n, 16]
  removed: hashes, // [n, 16]
})
export type KvDelta = typeof KvDelta.Type

/** What a worker's prefix index gained and lost; events have ids in their order, these are `firstId` … `nextId` - 1. */
export const KvEventsMessage = Schema.Struct({ worker: Schema.String, epoch: count, firstId: count, nextId: count, delta: KvDelta })
export type KvEventsMessage = typeof KvEventsMessage.Type
export const KvEvents = defineTell("kv-events", KvEventsMessage)

/** Changes what is named, live; what is not named stays. A policy or an admission that is not available is refused. */
export const Configure = defineAsk(
  "configure",
  Schema.Struct({ policy: Schema.optional(Schema.String), queue: Schema.optional(positive), admission: Schema.optional(Schema.String) }),
  Schema.Struct({ applied: Schema.Array(Schema.Literals(["policy", "queue"])) }),
)
