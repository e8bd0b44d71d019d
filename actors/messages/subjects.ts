/**
 * Every subject: `ps.<cluster>.<generation>.<kind>.<id>.<verb>`, built here only, so that permissions can be granted per
 * role. The id `any` is served by the queue group of a kind. Actors are given cluster and generation as one namespace:
 * those of two generations never hear each other.
 */
import { Finish, Reserve } from "./decode.ts"
import { Get, Have, Pin, Put } from "./kv-store.ts"
import { KvMissed, Prefill } from "./prefill.ts"
import { Detokenize, EndConversation, Generate, Tokenize } from "./request.ts"
import { Configure as ConfigureScheduler, Heartbeat, KvEvents, Leave, Place, Prefilled, Release } from "./scheduler.ts"
import { Configure, Drain } from "./worker.ts"

export const actorKinds = ["request", "scheduler", "worker", "prefill", "decode", "kv-store"] as const
export type ActorKind = (typeof actorKinds)[number]

export const anyId = "any"

/** In place of a generation, where a process belongs to none. */
export const everyGeneration = "all"

/** Where the nodes of a cluster say what they are: in place of a generation, since they run several. */
export const nodesNamespace = (cluster: string): string => namespaceOf(cluster, "nodes")

/** What the actors of one generation are told to speak in: see actors/node/generation.ts. */
export const namespaceOf = (cluster: string, generation: string): string => `${cluster}.${generation}`

export const subject = (namespace: string, kind: ActorKind, id: string, verb: string): string => `ps.${namespace}.${kind}.${id}.${verb}`

/** A transfer's own subjects: its chunks and its sender's progress go to the receiver, the receiver's status to the sender. */
export const transferSubject = (namespace: string, transferId: string, verb: "chunk" | "progress" | "status"): string => `ps.${namespace}.kv.${transferId}.${verb}`

/** Where every process says what serves in it. */
export const presenceSubject = (namespace: string): string => `ps.${namespace}.presence`

/**
 * Processes by what runs in them: what a user of NATS is made for. A worker has prefill, decode or both, and may change. A
 * gateway's process is that of `up`, where any actor may be embedded beside it; a node is the agent of a machine.
 */
export const processKinds = ["gateway", "request", "scheduler", "worker", "kv-store", "node"] as const
export type ProcessKind = (typeof processKinds)[number]

/**
 * Where answers to a process come in; never the shared inbox that NATS clients have by themselves. A process that speaks to
 * actors of several generations has it in `everyGeneration`.
 */
export const inboxPrefix = (namespace: string, kind: ProcessKind, id: string): string => `ps.${namespace}.inbox.${kind}.${id}`

/** Who runs an actor. */
const processOf: Readonly<Record<ActorKind, ProcessKind>> = { request: "request", scheduler: "scheduler", worker: "worker", prefill: "worker", decode: "worker", "kv-store": "kv-store" }

/** The bucket of JetStream that a cluster's wanted topology is kept in. */
export const topologyBucket = (cluster: string): string => `penstock-${cluster}`

interface Conversation {
  readonly from: ProcessKind
  readonly to: ActorKind
  readonly verbs: ReadonlyArray<string>
}

const verbs = (...types: ReadonlyArray<{ readonly verb: string }>): ReadonlyArray<string> => types.map(({ verb }) => verb)

/** Who begins to speak to whom, and about what. Answers, and the credits of streams, go between their inboxes. */
const conversations: ReadonlyArray<Conversation> = [
  { from: "gateway", to: "request", verbs: verbs(Generate, EndConversation, Tokenize, Detokenize, Drain) },
  { from: "gateway", to: "worker", verbs: verbs(Configure, Drain) },
  { from: "gateway", to: "scheduler", verbs: verbs(ConfigureScheduler) },
  { from: "node", to: "request", verbs: verbs(Drain) },
  { from: "node", to: "worker", verbs: verbs(Configure, Drain) },
  { from: "node", to: "scheduler", verbs: verbs(ConfigureScheduler) },
  { from: "request", to: "scheduler", verbs: verbs(Place, Prefilled, Release) },
  { from: "request", to: "decode", verbs: verbs(Reserve, Finish) },
  { from: "request", to: "prefill", verbs: verbs(Prefill) },
  { from: "request", to: "kv-store", verbs: verbs(Pin) },
  { from: "scheduler", to: "prefill", verbs: verbs(KvMissed) },
  { from: "worker", to: "scheduler", verbs: verbs(Heartbeat, Leave, KvEvents) },
  { from: "worker", to: "prefill", verbs: verbs(Get) },
  { from: "worker", to: "kv-store", verbs: verbs(Have, Get, Put) },
  { from: "kv-store", to: "kv-store", verbs: verbs(Have, Put, Pin) },
]

/** Who moves KV: transfers have subjects of their own, and each of these may be at either end. */
const movesKv: ReadonlySet<ProcessKind> = new Set(["worker", "kv-store"])

/** What may run in a process of a kind. */
const runs = (kind: ProcessKind): ReadonlyArray<ProcessKind> => (kind === "gateway" ? processKinds.filter((other) => other !== "node") : [kind])

export interface Permissions {
  readonly publish: ReadonlyArray<string>
  readonly subscribe: ReadonlyArray<string>
}

/**
 * What a process of a kind publishes and subscribes to, and nothing more, as NATS permissions.
 * @param id of the process; without it, for every process of the kind
 */
export const permissions = (cluster: string, kind: ProcessKind, id = "*"): Permissions => {
  const namespace = namespaceOf(cluster, "*")
  const mine = runs(kind)
  const begins = conversations.filter(({ from }) => mine.includes(from))
  // Whoever speaks to an actor may find it embedded beside the gateway.
  const partners = conversations.flatMap(({ from, to }) => [...(mine.includes(from) ? [processOf[to]] : []), ...(mine.includes(processOf[to]) ? [from] : []), "gateway" as const])
  const transfers = mine.some((own) => movesKv.has(own)) ? (["chunk", "progress", "status"] as const).map((verb) => transferSubject(namespace, "*", verb)) : []
  // The agents of machines agree over JetStream, which answers to an inbox as everybody does.
  const agreed = kind === "node" ? ["$JS.API.>", `$JS.FC.KV_${topologyBucket(cluster)}.>`, `$KV.${topologyBucket(cluster)}.>`] : []
  const unique = (subjects: ReadonlyArray<string>) => [...new Set(subjects)]
  return {
    publish: unique([
      ...begins.flatMap(({ to, verbs }) => verbs.map((verb) => subject(namespace, to, "*", verb))),
      ...partners.map((partner) => `${inboxPrefix(namespace, partner, "*")}.>`),
      ...transfers,
      presenceSubject(namespace),
      ...agreed,
    ]),
    subscribe: unique([
      ...actorKinds.filter((actor) => mine.includes(processOf[actor])).flatMap((actor) => (kind === "gateway" || id === "*" ? ["*"] : [id, anyId]).map((at) => subject(namespace, actor, at, "*"))),
      `${inboxPrefix(namespace, kind, id)}.>`,
      ...transfers,
      presenceSubject(namespace), // who serves
      ...(kind === "node" ? [`$KV.${topologyBucket(cluster)}.>`] : []),
    ]),
  }
}
