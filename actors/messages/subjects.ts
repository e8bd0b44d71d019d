/**
 * Every subject: `ps.<cluster>.<kind>.<id>.<verb>`, built here only, so that permissions can be granted per role.
 * The id `any` is served by the queue group of a kind.
 */
import { Finish, Reserve } from "./decode.ts"
import { Get, Have, Pin, Put } from "./kv-store.ts"
import { KvDump, Prefill } from "./prefill.ts"
import { Detokenize, Generate, Tokenize } from "./request.ts"
import { Configure as ConfigureScheduler, Heartbeat, KvEvents, Leave, Place, Prefilled, Release } from "./scheduler.ts"
import { Configure, Drain } from "./worker.ts"

export const actorKinds = ["request", "scheduler", "worker", "prefill", "decode", "kv-store"] as const
export type ActorKind = (typeof actorKinds)[number]

export const anyId = "any"

export const subject = (cluster: string, kind: ActorKind, id: string, verb: string): string => `ps.${cluster}.${kind}.${id}.${verb}`

/** A transfer's own subjects: its chunks and its sender's progress go to the receiver, the receiver's status to the sender. */
export const transferSubject = (cluster: string, transferId: string, verb: "chunk" | "progress" | "status"): string => `ps.${cluster}.kv.${transferId}.${verb}`

/** Where every process says what serves in it. */
export const presenceSubject = (cluster: string): string => `ps.${cluster}.presence`

/** Processes by what runs in them: what a user of NATS is made for. A worker has prefill, decode or both, and may change. */
export const processKinds = ["gateway", "request", "scheduler", "worker", "kv-store"] as const
export type ProcessKind = (typeof processKinds)[number]

/** Where answers to a process come in; never the shared inbox that NATS clients have by themselves. */
export const inboxPrefix = (cluster: string, kind: ProcessKind, id: string): string => `ps.${cluster}.inbox.${kind}.${id}`

/** Who runs an actor. */
const processOf: Readonly<Record<ActorKind, ProcessKind>> = { request: "request", scheduler: "scheduler", worker: "worker", prefill: "worker", decode: "worker", "kv-store": "kv-store" }

interface Conversation {
  readonly from: ProcessKind
  readonly to: ActorKind
  readonly verbs: ReadonlyArray<string>
}

const verbs = (...types: ReadonlyArray<{ readonly verb: string }>): ReadonlyArray<string> => types.map(({ verb }) => verb)

/** Who begins to speak to whom, and about what. Answers, and the credits of streams, go between their inboxes. */
const conversations: ReadonlyArray<Conversation> = [
  { from: "gateway", to: "request", verbs: verbs(Generate, Tokenize, Detokenize, Drain) },
  { from: "gateway", to: "worker", verbs: verbs(Configure, Drain) },
  { from: "gateway", to: "scheduler", verbs: verbs(ConfigureScheduler) },
  { from: "request", to: "scheduler", verbs: verbs(Place, Prefilled, Release) },
  { from: "request", to: "decode", verbs: verbs(Reserve, Finish) },
  { from: "request", to: "prefill", verbs: verbs(Prefill) },
  { from: "scheduler", to: "prefill", verbs: verbs(KvDump) },
  { from: "worker", to: "scheduler", verbs: verbs(Heartbeat, Leave, KvEvents) },
  { from: "worker", to: "prefill", verbs: verbs(Get) },
  { from: "worker", to: "kv-store", verbs: verbs(Have, Get, Put, Pin) },
  { from: "kv-store", to: "kv-store", verbs: verbs(Have, Put, Pin) },
]

/** Who moves KV: transfers have subjects of their own, and each of these may be at either end. */
const movesKv: ReadonlySet<ProcessKind> = new Set(["worker", "kv-store"])

/** Who listens to what is said about who serves; every process but the gateway says so. */
const watchesPresence: ReadonlySet<ProcessKind> = new Set(["gateway", "request", "kv-store", "worker"])

export interface Permissions {
  readonly publish: ReadonlyArray<string>
  readonly subscribe: ReadonlyArray<string>
}

/**
 * What a process of a kind publishes and subscribes to, and nothing more, as NATS permissions.
 * @param id of the process; without it, for every process of the kind
 */
export const permissions = (cluster: string, kind: ProcessKind, id = "*"): Permissions => {
  const begins = conversations.filter(({ from }) => from === kind)
  const partners = conversations.flatMap(({ from, to }) => (from === kind ? [processOf[to]] : processOf[to] === kind ? [from] : []))
  const transfers = movesKv.has(kind) ? (["chunk", "progress", "status"] as const).map((verb) => transferSubject(cluster, "*", verb)) : []
  return {
    publish: [
      ...begins.flatMap(({ to, verbs }) => verbs.map((verb) => subject(cluster, to, "*", verb))),
      ...[...new Set(partners)].map((partner) => `${inboxPrefix(cluster, partner, "*")}.>`),
      ...transfers,
      ...(kind === "gateway" ? [] : [presenceSubject(cluster)]),
    ],
    subscribe: [
      ...actorKinds.filter((actor) => processOf[actor] === kind).flatMap((actor) => [...new Set([id, anyId])].map((at) => subject(cluster, actor, at, "*"))),
      `${inboxPrefix(cluster, kind, id)}.>`,
      ...transfers,
      ...(watchesPresence.has(kind) ? [presenceSubject(cluster)] : []),
    ],
  }
}
