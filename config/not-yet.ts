import { Schema } from "effect"
import { Topology } from "./topology.ts"

/** A value of the design that is not built yet, where it stands, and what to write instead. */
export interface NotYet {
  readonly path: ReadonlyArray<string | number>
  readonly use: string
}

type Rule = (topology: Topology) => ReadonlyArray<NotYet>

const one = (wanted: boolean, path: ReadonlyArray<string | number>, use: string): ReadonlyArray<NotYet> => (wanted ? [{ path, use }] : [])

/** Delete a line when its feature is built; nothing else knows of it. */
const rules: ReadonlyArray<Rule> = [
  ({ gateway }) => one(gateway.replicas > 1, ["gateway", "replicas"], "1"),
  ({ scheduler }) => one(!["cache-aware", "least-loaded"].includes(scheduler.policy), ["scheduler", "policy"], "cache-aware or least-loaded"),
  ({ scheduler }) => one(scheduler.admission !== "none", ["scheduler", "admission"], "none"),
  ({ scheduler }) => one(scheduler.objectives !== undefined, ["scheduler", "objectives"], "no objectives key"),
]

/** Everything in this topology that would silently do nothing if it were let through. */
export const notYet = (topology: Topology): ReadonlyArray<NotYet> => rules.flatMap((rule) => rule(topology))

/** The same value with another one at a path. */
const withValueAt = (value: unknown, [key, ...rest]: ReadonlyArray<string | number>, leaf: unknown): unknown => {
  if (key === undefined) return leaf
  if (Array.isArray(value)) return value.map((item, index) => (index === key ? withValueAt(item, rest, leaf) : item))
  const mapping = (value ?? {}) as Readonly<Record<string, unknown>>
  return { ...mapping, [key]: withValueAt(mapping[key], rest, leaf) }
}

/** What to write at a path for now, where one of these values of it is not built; for the reference. */
export const usableOf = (path: ReadonlyArray<string | number>, samples: ReadonlyArray<unknown>): string | undefined => {
  const defaults = Schema.decodeUnknownSync(Topology)({ penstock: 1 })
  const refused = samples.flatMap((sample) => notYet(withValueAt(defaults, path, sample) as Topology))
  return refused.find((entry) => entry.path.join() === path.join())?.use
}
