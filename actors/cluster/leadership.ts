/**
 * What the leader of a cluster does, and nobody else: it keeps the assignment in step with what is wanted and with the nodes
 * that live. Every node tries to lead with each heartbeat; one does.
 */
import { isDeepStrictEqual } from "node:util"
import { Effect, type Scope } from "effect"
import { parseTopology } from "../../config/load-topology.ts"
import { limits } from "../../config/limits.ts"
import type { ModelSpec } from "../../config/models.ts"
import type { ResolvedModel } from "../node/fetch-model.ts"
import type { Members } from "../presence/members.ts"
import type { ClusterBucket } from "../runtime/cluster-bucket.ts"
import { Fault } from "../runtime/fault.ts"
import type { Assignment } from "./assignment.ts"
import { clusterKeys } from "./cluster-keys.ts"
import type { Lease } from "./lease.ts"
import { place, type NodeOffer } from "./place.ts"

export interface LeadershipOptions {
  /** Its own name. */
  readonly node: string
  readonly bucket: ClusterBucket
  readonly lease: Lease
  /** The nodes that live. */
  readonly nodes: Members
  readonly fetchModel: (spec: ModelSpec) => Promise<ResolvedModel>
  /** The highest epoch that a component is heard under. */
  readonly heardEpoch: (component: { readonly kind: string; readonly id: string }) => number | undefined
  readonly say: (line: string) => void
}

/** Nodes that live, as they say themselves. */
export const offersOf = (nodes: Members): ReadonlyArray<NodeOffer> =>
  nodes.all.flatMap(({ kind, id, machine }) => (kind === "node" && machine !== undefined ? [{ name: id, labels: machine.labels, cores: Math.max(1, machine.cores), leaving: machine.state === "leaving" }] : []))

/** Leads when it can, until the Scope closes; then it leaves it to others at once. */
export const leadership = (options: LeadershipOptions): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function* () {
    const leader = new ClusterLeader(options)
    yield* Effect.addFinalizer(() => Effect.promise(() => options.lease.resign().catch(() => {})))
    yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.promise(() => leader.beat()), Effect.sleep(limits.heartbeatIntervalMs))))
  })

interface FetchedModel {
  readonly revision: number
  /** Those that have failed. */
  attempts: number
  sha256?: string
  error?: string | undefined
}

class ClusterLeader {
  readonly #options: LeadershipOptions
  #led = false
  #complaint: string | undefined
  /** Since when every word of the nodes has come here. */
  #hearsSinceMs = performance.now()
  /** The model of a wanted topology: fetched beside the beats, since that may take long. */
  #model: FetchedModel | undefined

  constructor(options: LeadershipOptions) {
    this.#options = options
  }

  async beat(): Promise<void> {
    const { lease, say } = this.#options
    try {
      await lease.beat()
      if (lease.held !== this.#led) say(`this node leads the cluster${this.#led ? " no more" : ""}`)
      this.#led = lease.held
      if (this.#led) await this.#lead()
      if (this.#model?.error === undefined) this.#complaint = undefined
      else this.#complain(this.#model.error)
    } catch (error) {
      // What cannot reach the bucket may not have heard the nodes either.
      if (error instanceof Fault) this.#hearsSinceMs = performance.now()
      this.#complain(error instanceof Error ? error.message : String(error))
    }
  }

  /** Once for each reason in a row. */
  #complain(why: string): void {
    if (why !== this.#complaint) this.#options.say(`the assignment stays as it is: ${why}`)
    this.#complaint = why
  }

  async #lead(): Promise<void> {
    const { bucket, lease, node, nodes, heardEpoch, say } = this.#options
    const [wanted, drained, assigned] = await Promise.all([clusterKeys.wanted.read(bucket), clusterKeys.drained.read(bucket), clusterKeys.assignment.read(bucket)])
    if (wanted.value === undefined) return
    const offers = offersOf(nodes)
    if (!offers.some(({ name }) => name === node)) this.#hearsSinceMs = performance.now()
    const previous = assigned.value?.components ?? []
    // Whoever has just begun to listen has not heard everybody yet, and would take them for lost.
    const unheard = previous.some((placed) => !offers.some(({ name }) => name === placed.node))
    if (performance.now() - this.#hearsSinceMs < (unheard ? limits.nodeLossMs : 2 * limits.heartbeatIntervalMs)) return
    const { topology, model: spec } = parseTopology(wanted.value.text, { path: wanted.value.path })
    const model = assigned.value?.wantedRevision === wanted.revision ? assigned.value.model : this.#digestOf(wanted.revision, spec)
    if (model === undefined) return
    const out = drained.value ?? { nodes: [], workers: [] }
    const placed = place({ topology, nodes: offers, drained: new Set(out.nodes), previous, nowMs: Date.now(), heardEpoch })
    const next: Assignment = { wantedRevision: wanted.revision, wanted: wanted.value, model, drained: out.workers.filter((name) => topology.workers.some((worker) => worker.name === name)), ...placed }
    if (isDeepStrictEqual(next, assigned.value)) return
    // What came before may have taken long.
    if (!lease.held || (await clusterKeys.assignment.write(bucket, next, assigned.revision)) === undefined) return
    for (const line of changesOf(assigned.value, next)) say(line)
  }

  /** Undefined while it is fetched, and where it cannot be, which is tried again. */
  #digestOf(revision: number, spec: ModelSpec): string | undefined {
    if (this.#model?.revision !== revision) this.#fetch({ revision, attempts: 0 }, spec)
    return this.#model?.sha256
  }

  #fetch(model: FetchedModel, spec: ModelSpec): void {
    this.#model = model
    void this.#options.fetchModel(spec).then(
      ({ sha256 }) => {
        model.sha256 = sha256
        model.error = undefined
      },
      (error: unknown) => {
        model.error = error instanceof Error ? error.message : String(error)
        const delayMs = Math.min(limits.reconcileRetryMs * 2 ** model.attempts++, limits.reconcileRetryMaxMs)
        setTimeout(() => this.#model === model && this.#fetch(model, spec), delayMs).unref()
      },
    )
  }
}

/** What another assignment changes, for people. */
export const changesOf = (from: Assignment | undefined, to: Assignment): ReadonlyArray<string> => {
  const before = new Map(from?.components.map((placed) => [`${placed.kind} ${placed.id}`, placed.node]))
  const after = new Map(to.components.map((placed) => [`${placed.kind} ${placed.id}`, placed.node]))
  const moves = [...after].flatMap(([name, node]) => {
    const last = before.get(name)
    return last === node ? [] : [last === undefined ? `${name}: on ${node}` : `${name}: ${last} -> ${node}`]
  })
  const gone = [...before].flatMap(([name, node]) => (after.has(name) ? [] : [`${name}: no more on ${node}`]))
  const told = new Set(from?.unplaceable.map(({ kind, id, why }) => `${kind} ${id}: ${why}`))
  return [...moves, ...gone, ...to.unplaceable.map(({ kind, id, why }) => `${kind} ${id}: ${why}`).filter((line) => !told.has(line)).map((line) => `unplaceable: ${line}`)]
}
