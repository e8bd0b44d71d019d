/**
 * Makes what runs on this node its part of the assignment, and keeps it so.
 */
import { Effect, Exit, Scope } from "effect"
import { parseTopology, type TopologyOverrides } from "../../config/load-topology.ts"
import { limits } from "../../config/limits.ts"
import type { ModelSpec } from "../../config/models.ts"
import type { NatsAddress } from "../../config/topology.ts"
import type { NodePresence, PresenceMessage } from "../messages/presence.ts"
import { namespaceOf } from "../messages/subjects.ts"
import type { ResolvedModel } from "../node/fetch-model.ts"
import type { Reconciler } from "../node/reconciler.ts"
import { generationIn, systemOf, type Wanted } from "../node/wanted.ts"
import { Members } from "../presence/members.ts"
import type { Bus, Subscription } from "../runtime/bus.ts"
import type { ClusterBucket } from "../runtime/cluster-bucket.ts"
import type { Assignment } from "./assignment.ts"
import { clusterKeys, type Kept } from "./cluster-keys.ts"
import { missingOf, partOf } from "./part.ts"

export interface FollowerOptions {
  readonly node: string
  readonly cluster: string
  readonly gateway: boolean
  readonly nats: NatsAddress
  readonly overrides: TopologyOverrides
  readonly bucket: ClusterBucket
  readonly bus: Bus
  readonly reconciler: Reconciler
  readonly fetchModel: (spec: ModelSpec) => Promise<ResolvedModel>
  readonly say: (line: string) => void
}

/** An assignment that this node can follow: its topology read, its model here. */
interface Followed {
  readonly kept: Kept<Assignment>
  readonly wanted: Wanted
  readonly sinceMs: number
  complete: boolean
}

/** Who serves in the generation that is followed. */
interface Listening {
  readonly generation: string
  readonly members: Members
  readonly sinceMs: number
  readonly scope: Scope.Closeable
}

const tickMs = 100

export class Follower {
  readonly #options: FollowerOptions
  #assigned: Kept<Assignment> | undefined
  #followed: Followed | undefined
  #listening: Listening | undefined
  #told: { readonly revision: number; readonly part: string } | undefined
  #failure: string | undefined
  #retryAtMs = 0
  #retryMs: number = limits.reconcileRetryMs

  private constructor(options: FollowerOptions) {
    this.#options = options
  }

  /** Follows until the Scope closes. */
  static readonly start = (options: FollowerOptions): Effect.Effect<Follower, never, Scope.Scope> =>
    Effect.gen(function* () {
      const follower = new Follower(options)
      yield* Effect.acquireRelease(
        Effect.sync((): Subscription => clusterKeys.assignment.watch(options.bucket, (kept) => (follower.#assigned = kept))),
        (watching) => Effect.sync(() => watching.unsubscribe()),
      )
      yield* Effect.addFinalizer(() => follower.#stopListening())
      yield* Effect.forkScoped(Effect.forever(Effect.andThen(follower.#tick(), Effect.sleep(tickMs))))
      return follower
    })

  /** What is followed, or will be. */
  get assignment(): Assignment | undefined {
    return this.#assigned?.value
  }

  get wanted(): Wanted | undefined {
    return this.#followed?.wanted
  }

  /** What is heard in the generation that is followed. */
  get heard(): ReadonlyArray<PresenceMessage> {
    return this.#listening?.members.all ?? []
  }

  /** What of the assignment does not serve, on whatever node. */
  get missing(): ReadonlyArray<string> {
    const followed = this.#followed
    if (followed === undefined) return ["a topology"]
    const whole = this.#whole(followed)
    return missingOf({ assignment: followed.kept.value, whole, heard: this.heard }).map(({ kind, id }) => `${kind} ${id}`)
  }

  /** As this node says it of itself. */
  get state(): Pick<NodePresence, "state" | "detail" | "revision"> {
    const revision = this.#followed?.kept.revision ?? 0
    if (this.#failure !== undefined) return { state: "failed", detail: this.#failure, revision }
    if (this.#assigned === undefined) return { state: "waiting", revision }
    const { state, changes } = this.#options.reconciler
    if (state === "failed") return { state, detail: changes[0]?.error, revision }
    const settled = this.#followed?.kept.revision === this.#assigned.revision && this.#followed.complete && this.#toldAll && state === "settled"
    return { state: settled ? "settled" : "changing", revision }
  }

  /** Whether the reconciler has been told of the last part. */
  get #toldAll(): boolean {
    return this.#told?.revision === this.#followed?.kept.revision
  }

  #tick(): Effect.Effect<void> {
    return Effect.gen({ self: this }, function* () {
      if (this.#assigned !== undefined && this.#followed?.kept.revision !== this.#assigned.revision) yield* this.#prepare(this.#assigned)
      if (this.#followed !== undefined) this.#follow(this.#followed)
    }).pipe(Effect.catchCause((cause) => Effect.sync(() => console.error("cluster: following the assignment failed", cause))))
  }

  /** Reads a new assignment, fetches its model, and listens to its generation. */
  #prepare(kept: Kept<Assignment>): Effect.Effect<void> {
    if (performance.now() < this.#retryAtMs) return Effect.void
    const { fetchModel, nats, overrides, cluster, say } = this.#options
    const { wanted: written, model: digest, components } = kept.value
    const prepared = Effect.tryPromise({
      try: async (): Promise<Wanted> => {
        const { topology, model: spec } = parseTopology(written.text, { path: written.path, overrides })
        const model = await fetchModel(spec)
        if (model.sha256 !== digest) throw new Error(`${model.path} is another file than the other nodes have: its SHA-256 is ${model.sha256}, theirs ${digest}; give all nodes the same one`)
        const epochs = Object.fromEntries(components.map(({ kind, id, epoch }) => [`${kind} ${id}`, epoch]))
        return { topology: { ...topology, cluster, bus: { nats } }, model, revision: String(kept.value.wantedRevision), epochs }
      },
      catch: (error) => (error instanceof Error ? error.message : String(error)),
    })
    return Effect.matchEffect(prepared, {
      onFailure: (why) =>
        Effect.sync(() => {
          if (why !== this.#failure) say(`the assignment cannot be followed, and what runs stays: ${why}`)
          this.#failure = why
          this.#retryAtMs = performance.now() + this.#retryMs
          this.#retryMs = Math.min(2 * this.#retryMs, limits.reconcileRetryMaxMs)
        }),
      onSuccess: (wanted) =>
        Effect.gen({ self: this }, function* () {
          this.#failure = undefined
          this.#retryMs = limits.reconcileRetryMs
          yield* this.#listen(generationIn(wanted))
          this.#followed = { kept, wanted, sinceMs: performance.now(), complete: false }
        }),
    })
  }

  #listen(generation: string): Effect.Effect<void> {
    return Effect.gen({ self: this }, function* () {
      if (this.#listening?.generation === generation) return
      yield* this.#stopListening()
      const scope = yield* Scope.make()
      const members = yield* Scope.provide(Members.listen(this.#options.bus, namespaceOf(this.#options.cluster, generation)), scope)
      this.#listening = { generation, members, scope, sinceMs: performance.now() }
    })
  }

  #stopListening(): Effect.Effect<void> {
    return Effect.suspend(() => {
      const { scope } = this.#listening ?? {}
      this.#listening = undefined
      return scope === undefined ? Effect.void : Scope.close(scope, Exit.void)
    })
  }

  #follow(followed: Followed): void {
    const { reconciler, node, gateway, say } = this.#options
    const { kept, wanted, sinceMs } = followed
    // Whoever serves elsewhere says so with each beat.
    if (performance.now() - this.#listening!.sinceMs < 2 * limits.heartbeatIntervalMs) return
    // Steps that are under way for this assignment are not given up for its next stage.
    if (this.#told?.revision === kept.revision && reconciler.state === "changing") return
    const whole = this.#whole(followed)
    const missing = missingOf({ assignment: kept.value, whole, heard: this.heard })
    if (missing.length === 0) followed.complete = true
    else if (!followed.complete && performance.now() - sinceMs > limits.assignmentDeadlineMs) {
      followed.complete = true
      say(`what does not serve yet is not waited for any more: ${missing.map(({ kind, id, node: at }) => `${kind} ${id} on ${at}`).join(", ")}`)
    }
    const part = partOf({ node, gateway, assignment: kept.value, whole, actual: reconciler.actual, heard: this.heard, complete: followed.complete })
    const told = { revision: kept.revision, part: JSON.stringify({ ...part, components: part.components.map((component) => ({ ...component, pool: undefined })) }) }
    if (this.#told?.revision === told.revision && this.#told.part === told.part) return
    this.#told = told
    reconciler.want({ ...wanted, part: () => part })
  }

  /** All that the topology wants, on whatever node. */
  #whole({ wanted, kept }: Followed) {
    return systemOf(wanted, new Set(kept.value.drained))
  }
}
