/**
 * This process's way to NATS: joined when a topology needs it, left when none does any more, with the nats-server of its own
 * where the topology asks for one. What speaks within this process goes on meanwhile.
 */
import { Effect, Exit, Scope } from "effect"
import type { NatsAddress, Topology } from "../../config/topology.ts"
import { joinNats, type BridgeBuses, type BusUser } from "./buses.ts"
import { superviseNatsServer } from "./nats-server.ts"
import { WorkerError } from "./worker.ts"

interface Joined {
  readonly label: string
  readonly address: NatsAddress
  readonly scope: Scope.Closeable
}

export class Uplink {
  readonly #buses: BridgeBuses
  readonly #user: BusUser | undefined
  #joined: Joined | undefined

  private constructor(buses: BridgeBuses, user: BusUser | undefined) {
    this.#buses = buses
    this.#user = user
  }

  /** Leaves when the Scope closes. */
  static readonly make = (buses: BridgeBuses, user?: BusUser): Effect.Effect<Uplink, never, Scope.Scope> =>
    Effect.acquireRelease(
      Effect.sync(() => new Uplink(buses, user)),
      (uplink) => uplink.leave(),
    )

  /** What it has joined, for people. */
  get label(): string | undefined {
    return this.#joined?.label
  }

  /** Where others connect to. */
  get address(): NatsAddress | undefined {
    return this.#joined?.address
  }

  /** Starts the topology's own nats-server where it asks for one, and connects. Nothing of it is left where it cannot. */
  join(label: string, { bus, cluster }: Pick<Topology, "bus" | "cluster">): Effect.Effect<void, WorkerError> {
    if (bus === "memory" || this.#joined !== undefined) return Effect.void
    const { nats } = bus
    return Effect.gen({ self: this }, function* () {
      const scope = yield* Scope.make()
      const joined = Effect.gen({ self: this }, function* () {
        const address = "spawn" in nats ? yield* Effect.mapError(superviseNatsServer({}), (error) => new WorkerError(error.message)) : nats
        yield* joinNats(this.#buses, cluster, address, this.#user)
        return address
      })
      const address = yield* Effect.onExit(Scope.provide(joined, scope), (exit) => (Exit.isSuccess(exit) ? Effect.void : Scope.close(scope, Exit.void)))
      this.#joined = { label, address, scope }
    })
  }

  leave(): Effect.Effect<void> {
    return Effect.suspend(() => {
      const { scope } = this.#joined ?? {}
      this.#joined = undefined
      return scope === undefined ? Effect.void : Scope.close(scope, Exit.void)
    })
  }
}
