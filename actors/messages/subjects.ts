/**
 * Every subject: `ps.<cluster>.<kind>.<id>.<verb>`, built here only, so that permissions can be granted per role.
 * The id `any` is served by the queue group of a kind.
 */
export const actorKinds = ["request", "scheduler", "prefill", "decode", "kv-store"] as const
export type ActorKind = (typeof actorKinds)[number]

export const anyId = "any"

export const subject = (cluster: string, kind: ActorKind, id: string, verb: string): string => `ps.${cluster}.${kind}.${id}.${verb}`
