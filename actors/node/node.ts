/**
 * What runs by this process: its buses, the components of a topology, and whoever stands in front of them, from a first
 * topology on through every later one.
 */
import { Effect, type Scope } from "effect"
import { readEnv } from "../../config/env.ts"
import type { Bus } from "../runtime/bus.ts"
import { openBuses } from "./buses.ts"
import { Hosting } from "./hosting.ts"
import type { OnChange } from "./change.ts"
import { Reconciler, type Front } from "./reconciler.ts"
import { ServedGenerations } from "./served-generations.ts"
import { Uplink } from "./uplink.ts"
import type { Wanted } from "./wanted.ts"
import type { WorkerError } from "./worker.ts"

/** What is there before anything runs. */
export interface NodeParts {
  /** The bus of this process, for its front too. */
  readonly bus: Bus
  readonly hosting: Hosting
  readonly generations: ServedGenerations
}

export interface NodeOptions {
  readonly wanted: Wanted
  /** Made before anything runs, and closed before anything stops. */
  readonly front: (parts: NodeParts) => Effect.Effect<Front & { readonly close: () => Effect.Effect<void> }, never, Scope.Scope>
  readonly onChange?: OnChange | undefined
}

export interface RunningNode extends NodeParts {
  readonly reconciler: Reconciler
}

/**
 * Runs a topology until the Scope closes; fails where it cannot be brought up. Its end is written here, from the last to the
 * first: no more changes, the front, the components kind by kind, NATS and the nats-server, the buses.
 */
export const node = ({ wanted, front: makeFront, onChange }: NodeOptions): Effect.Effect<RunningNode, WorkerError, Scope.Scope> =>
  Effect.gen(function* () {
    const buses = yield* openBuses(wanted.topology.cluster)
    const uplink = yield* Uplink.make(buses)
    const generations = yield* ServedGenerations.make(buses.control)
    const hosting = yield* Hosting.make({ env: readEnv(), buses, nats: () => uplink.address })
    const parts: NodeParts = { bus: buses.control, hosting, generations }
    const front = yield* makeFront(parts)
    yield* Effect.addFinalizer(front.close)
    const reconciler = yield* Reconciler.start({ uplink, hosting, generations, front, ...(onChange === undefined ? {} : { onChange }) }, wanted)
    return { ...parts, reconciler }
  })
