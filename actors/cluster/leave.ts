/**
 * How a node leaves a cluster in order: it says so, others take over what it runs, as when it is drained, and its gateway's open
 * requests end, while all of it still serves.
 */
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import type { Members } from "../presence/members.ts"
import { offersOf } from "./leadership.ts"
import { staying } from "./place.ts"
import { until } from "./until.ts"

export interface LeaveOptions {
  readonly node: string
  /** The nodes that live. */
  readonly nodes: Members
  /** Those of them that shall run nothing. */
  readonly drained: Effect.Effect<ReadonlySet<string>>
  /** Tells the cluster that this node leaves. */
  readonly announced: Effect.Effect<void>
  readonly runsNothing: () => boolean
  /** Lets nobody in any more; returns when the last request has ended. */
  readonly closeFront: Effect.Effect<void>
}

/** Returns when nothing is left here, when there is no other node for it, or at the deadline of a drain. */
export const leave = ({ node, nodes, drained, announced, runsNothing, closeFront }: LeaveOptions): Effect.Effect<void> =>
  Effect.gen(function* () {
    yield* announced
    const out = yield* drained
    const isAlone = () => !staying(offersOf(nodes), out).some(({ name }) => name !== node)
    const handedOver = Effect.all([until(runsNothing), closeFront], { concurrency: "unbounded" })
    if (!isAlone()) yield* Effect.raceFirst(Effect.asVoid(handedOver), until(isAlone))
  }).pipe(Effect.timeout(limits.drainDeadlineMs), Effect.ignore)
