/**
 * Says that actors serve: at once, again at every interval, and when they leave.
 */
import { hostname } from "node:os"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { Link } from "../runtime/link.ts"
import { Presence, type PresenceMessage } from "../messages/presence.ts"
import { presenceSubject } from "../messages/subjects.ts"

export interface AnnounceOptions {
  readonly link: Link
  readonly namespace: string
  readonly kind: PresenceMessage["kind"]
  readonly id: string
  readonly worker?: () => NonNullable<PresenceMessage["worker"]>
  readonly store?: () => NonNullable<PresenceMessage["store"]>
  readonly machine?: () => NonNullable<PresenceMessage["machine"]>
  /** The node of a cluster that runs it. */
  readonly agent?: string | undefined
}

/** Announces until the Scope closes. Returns how to say at once what has changed. */
export const announce = ({ link, namespace, kind, id, worker, store, machine, agent }: AnnounceOptions): Effect.Effect<Effect.Effect<void>, never, Scope.Scope> =>
  Effect.gen(function* () {
    const say = (state: PresenceMessage["state"]) =>
      Effect.ignore(
        Effect.suspend(() => {
          const said = { kind, id, node: hostname(), pid: process.pid, epoch: link.epoch, state, worker: worker?.(), store: store?.(), machine: machine?.(), agent }
          return link.tell(Presence, presenceSubject(namespace), said)
        }),
      )
    yield* Effect.addFinalizer(() => say("leaving"))
    yield* say("serving")
    yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(limits.heartbeatIntervalMs), say("serving"))))
    return say("serving")
  })
