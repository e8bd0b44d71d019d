/**
 * What every process that runs actors says of them, again and again, to whoever listens: who serves, where, and since when.
 */
import { Schema } from "effect"
import { defineTell } from "../runtime/codec.ts"
import { Role } from "./scheduler.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

/** `ms` is what the bytes take at the measured bandwidth of the way. */
export const TransferTotals = Schema.Struct({ completed: count, failed: count, fallbacks: count, bytes: count, ms: Schema.Finite })
export type TransferTotals = typeof TransferTotals.Type

export const WorkerPresence = Schema.Struct({
  roles: Schema.Array(Role),
  device: Schema.String,
  load: Schema.Struct({ sequences: count, waiting: count, maxBatch: count, preemptions: count }),
  kv: Schema.Struct({ blocks: count, freeBlocks: count, blockTokens: count, bytesPerToken: count, dtype: Schema.String, format: Schema.String }),
  /** As measured since the start; absent before there was anything to measure. */
  prefillTokPerS: Schema.optional(Schema.Finite),
  transfers: TransferTotals,
})
export type WorkerPresence = typeof WorkerPresence.Type

/** One tier of a KV store. Hits and misses are of blocks that were to be sent; what is missed in memory may be a hit on disk. */
export const TierPresence = Schema.Struct({ blocks: count, bytes: count, limitBytes: count, hits: count, misses: count, evictions: count })
export type TierPresence = typeof TierPresence.Type

export const StorePresence = Schema.Struct({
  memory: TierPresence,
  /** Absent where the topology has none, or it cannot be used now. */
  disk: Schema.optional(TierPresence),
})
export type StorePresence = typeof StorePresence.Type

/** A change of what runs: when it began, how it stands, and what it is, for people. */
export const ChangeSummary = Schema.Struct({ at: Schema.String, outcome: Schema.Literals(["changing", "done", "failed", "superseded"]), what: Schema.String })
export type ChangeSummary = typeof ChangeSummary.Type

/** A machine that runs a part of a cluster's topology: what it says of itself in the namespace of nodes. */
export const NodePresence = Schema.Struct({
  labels: Schema.Record(Schema.String, Schema.String),
  cores: count,
  memoryBytes: count,
  /** Where its gateway answers, if it has one. */
  gateway: Schema.optional(Schema.String),
  /** Which its gateway sends requests to, or has some in. */
  generations: Schema.optional(Schema.Array(Schema.String)),
  /** What it runs. */
  components: Schema.Array(Schema.Struct({ kind: Schema.String, id: Schema.String, generation: Schema.String })),
  /** Of the assignment that it follows, in the bucket; 0: none. */
  revision: count,
  state: Schema.Literals(["waiting", "changing", "settled", "failed", "leaving"]),
  /** Why it has failed, or what it is at. */
  detail: Schema.optional(Schema.String),
  /** The last ones of what it runs, newest first. */
  changes: Schema.optional(Schema.Array(ChangeSummary)),
})
export type NodePresence = typeof NodePresence.Type

export const PresenceMessage = Schema.Struct({
  kind: Schema.Literals(["request", "scheduler", "worker", "kv-store", "node"]),
  id: Schema.String,
  /** Name of the machine. */
  node: Schema.String,
  pid: count,
  /** Of this incarnation: a larger one than before means that what the earlier one held is gone. */
  epoch: count,
  state: Schema.Literals(["serving", "leaving"]),
  worker: Schema.optional(WorkerPresence),
  store: Schema.optional(StorePresence),
  machine: Schema.optional(NodePresence),
  /** The node of the cluster that runs it, where there is one. */
  agent: Schema.optional(Schema.String),
})
export type PresenceMessage = typeof PresenceMessage.Type
export const Presence = defineTell("presence", PresenceMessage)
