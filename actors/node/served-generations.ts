/**
 * The generations that have actors: for each who serves in it, and what clients may know of it. The gateway sends new
 * requests to one of them.
 */
import { Effect, Exit, Scope } from "effect"
import type { Topology } from "../../config/topology.ts"
import { namespaceOf } from "../messages/subjects.ts"
import { Members } from "../presence/members.ts"
import type { Bus } from "../runtime/bus.ts"
import { contextTokensOf } from "./component.ts"
import type { ResolvedModel } from "./fetch-model.ts"
import type { Wanted } from "./wanted.ts"
import type { WorkerError } from "./worker.ts"

export interface ServedGeneration {
  readonly id: string
  /** Where its actors speak. */
  readonly namespace: string
  readonly model: ResolvedModel
  readonly members: Members
  /** Most tokens of a sequence. */
  readonly contextTokens: number
  /** When it was first served, in seconds since 1970. */
  readonly sinceS: number
}

interface Known extends ServedGeneration {
  readonly scope: Scope.Closeable
}

export class ServedGenerations {
  readonly #bus: Bus
  readonly #known = new Map<string, Known>()

  private constructor(bus: Bus) {
    this.#bus = bus
  }

  static readonly make = (bus: Bus): Effect.Effect<ServedGenerations, never, Scope.Scope> =>
    Effect.acquireRelease(
      Effect.sync(() => new ServedGenerations(bus)),
      (generations) => generations.keep(new Set()),
    )

  get all(): ReadonlyArray<ServedGeneration> {
    return [...this.#known.values()]
  }

  get(id: string): ServedGeneration | undefined {
    return this.#known.get(id)
  }

  /** Knows a generation from now on, as this topology has it. Fails where its model's file says too little. */
  learn(id: string, { topology, model }: Wanted): Effect.Effect<void, WorkerError> {
    return Effect.gen({ self: this }, function* () {
      const contextTokens = yield* contextTokensOf({ topology, model })
      const known = this.#known.get(id)
      if (known !== undefined) return void this.#known.set(id, { ...known, model, contextTokens })
      const scope = yield* Scope.make()
      const members = yield* Scope.provide(Members.listen(this.#bus, this.#namespace(id, topology)), scope)
      this.#known.set(id, { id, namespace: this.#namespace(id, topology), model, members, contextTokens, sinceS: Math.floor(Date.now() / 1000), scope })
    })
  }

  /** Forgets all others. */
  keep(ids: ReadonlySet<string>): Effect.Effect<void> {
    return Effect.forEach(
      [...this.#known.values()].filter(({ id }) => !ids.has(id)),
      ({ id, scope }) => {
        this.#known.delete(id)
        return Scope.close(scope, Exit.void)
      },
      { discard: true },
    )
  }

  #namespace(id: string, { cluster }: Topology): string {
    return namespaceOf(cluster, id)
  }
}
