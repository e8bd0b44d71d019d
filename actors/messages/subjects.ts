/**
 * Every subject: `ps.<cluster>.<kind>.<id>.<verb>`, built here only, so that permissions can be granted per role.
 * The id `any` is served by the queue group of a kind.
 */
export const actorKinds = ["request", "scheduler", "prefill", "decode", "kv-store"] as const
export type ActorKind = (typeof actorKinds)[number]

export const anyId = "any"

export const subject = (cluster: string, kind: ActorKind, id: string, verb: string): string => `ps.${cluster}.${kind}.${id}.${verb}`

/** A transfer's own subjects: its chunks and its sender's progress go to the receiver, the receiver's status to the sender. */
export const transferSubject = (cluster: string, transferId: string, verb: "chunk" | "progress" | "status"): string => `ps.${cluster}.kv.${transferId}.${verb}`
