/**
 * What a worker is asked while it runs: to take other roles and bounds, and to give away what it decodes.
 */
import { Schema } from "effect"
import { limits } from "../../config/limits.ts"
import { defineAsk } from "../runtime/codec.ts"
import { Role } from "./scheduler.ts"

const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))
const positive = Schema.Int.check(Schema.isGreaterThanOrEqualTo(1))

export const ConfigureMessage = Schema.Struct({
  /** None: it keeps its weights and its pool, and sends others what they ask of it. */
  roles: Schema.optional(Schema.Array(Role)),
  maxBatch: Schema.optional(Schema.Int.check(Schema.isBetween({ minimum: 1, maximum: limits.maxBatch }))),
  /** Blocks of the pool that may be used, of those that were allocated. */
  blocks: Schema.optional(positive),
  threads: Schema.optional(positive),
  device: Schema.optional(Schema.String),
})
export type ConfigureMessage = typeof ConfigureMessage.Type

const Setting = Schema.Literals(["roles", "maxBatch", "blocks", "threads", "device"])
export type Setting = typeof Setting.Type

/**
 * Changes what is named, live; what is not named stays. `applied`: what is different now. `restart`: what only a restart of
 * the worker changes, of which nothing is done: more blocks than were allocated, threads, device.
 */
export const Configure = defineAsk("configure", ConfigureMessage, Schema.Struct({ applied: Schema.Array(Setting), restart: Schema.Array(Setting) }))

/** `moved`: told to go on elsewhere; `finished`: ended here; `left`: still here at the deadline. Sequences' requests, not choices. */
export const Drained = Schema.Struct({ moved: count, finished: count, left: count })
export type Drained = typeof Drained.Type

/**
 * Gives away what runs, and takes nothing new; answered when nothing is left, or at the deadline. A worker loses its roles, its
 * requests move to workers that have room, and those for which there is none go on here; it serves its KV until it is
 * stopped. Request actors answer it too: they leave their queue group, and the gateways go on elsewhere. Asked again, it says
 * how far it is.
 */
export const Drain = defineAsk("drain", Schema.Struct({ deadlineMs: Schema.Int.check(Schema.isBetween({ minimum: 0, maximum: limits.requestDeadlineMs })) }), Drained)
