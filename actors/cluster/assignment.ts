/**
 * Who runs what in a cluster, as its leader writes it and every node reads it: the wanted topology's text is part of it, so
 * that a node needs nothing else.
 */
import { Schema } from "effect"

const Kind = Schema.Literals(["kv-store", "scheduler", "worker", "request"])
const count = Schema.Int.check(Schema.isGreaterThanOrEqualTo(0))

export const PlacedComponent = Schema.Struct({
  kind: Kind,
  id: Schema.String,
  /** Name of the node that runs it. */
  node: Schema.String,
  /** The least that it starts under; what runs elsewhere under its name is older. */
  epoch: count,
})
export type PlacedComponent = typeof PlacedComponent.Type

export const Unplaceable = Schema.Struct({ kind: Kind, id: Schema.String, why: Schema.String })
export type Unplaceable = typeof Unplaceable.Type

/** What an operator wants: a topology's text, and where relative paths in it start from. */
export const WantedText = Schema.Struct({ text: Schema.String, path: Schema.String })
export type WantedText = typeof WantedText.Type

export const Assignment = Schema.Struct({
  /** Of the wanted topology that it follows, in the bucket. */
  wantedRevision: count,
  wanted: WantedText,
  /** SHA-256 of the model: a node whose file of it is another one says so and runs nothing of it. */
  model: Schema.String,
  /** Workers that keep weights and pool and have no roles. */
  drained: Schema.Array(Schema.String),
  components: Schema.Array(PlacedComponent),
  unplaceable: Schema.Array(Unplaceable),
})
export type Assignment = typeof Assignment.Type

/** Nodes that shall run nothing, and workers that shall have no roles. */
export const Drained = Schema.Struct({ nodes: Schema.Array(Schema.String), workers: Schema.Array(Schema.String) })
export type Drained = typeof Drained.Type

/** Who leads; nobody where it is empty. */
export const Leader = Schema.Struct({ node: Schema.String, epoch: count })
export type Leader = typeof Leader.Type
