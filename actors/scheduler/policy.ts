/**
 * Where a request goes. Policies are pure functions of the cluster's state and the request.
 */
import type { PlaceMessage } from "../messages/scheduler.ts"
import type { ClusterState, WorkerView } from "./cluster-state.ts"

export interface Choice {
  readonly prefill: WorkerView
  readonly decode: WorkerView
  /** Leading blocks that the prefill worker holds. */
  readonly prefixBlocks: number
}

/** Chooses among candidates, none of which is empty; the decode candidates have room. */
export type Policy = (
  request: PlaceMessage,
  state: ClusterState,
  candidates: { readonly prefill: ReadonlyArray<WorkerView>; readonly decode: ReadonlyArray<WorkerView> },
) => Choice

/** A waiting prompt token costs about as much as a sixteenth of a running sequence: a block's worth. */
const load = (worker: WorkerView, state: ClusterState): number => state.sequences(worker.id) + state.queuedTokens(worker.id) / worker.load.blockTokens

const least = (workers: ReadonlyArray<WorkerView>, cost: (worker: WorkerView) => number): WorkerView => {
  const costs = workers.map(cost)
  return workers[costs.indexOf(Math.min(...costs))]!
}

/** The same worker for both roles, where the best for prefill can also decode: nothing has to be moved then. */
const together = (prefill: WorkerView, decode: ReadonlyArray<WorkerView>, otherwise: () => WorkerView): WorkerView =>
  decode.includes(prefill) ? prefill : otherwise()

/** The worker with the least predicted load. */
const leastLoaded: Policy = (request, state, { prefill, decode }) => {
  const chosen = least(prefill, (worker) => load(worker, state))
  return {
    prefill: chosen,
    decode: together(chosen, decode, () => least(decode, (worker) => load(worker, state))),
    prefixBlocks: state.prefixBlocks(chosen, request),
  }
}

/**
 * The worker on which the prompt is computed soonest: what waits there, and what the prompt lacks there. The decode load
 * weighs in, so that a prefix that everybody shares does not draw everybody to one worker.
 */
const cacheAware: Policy = (request, state, { prefill, decode }) => {
  const cost = (worker: WorkerView): number => {
    const missing = request.tokens - state.prefixBlocks(worker, request) * worker.load.blockTokens
    return missing + state.queuedTokens(worker.id) + state.sequences(worker.id) * worker.load.blockTokens
  }
  const chosen = least(prefill, cost)
  return {
    prefill: chosen,
    decode: together(chosen, decode, () => least(decode, (worker) => load(worker, state))),
    prefixBlocks: state.prefixBlocks(chosen, request),
  }
}

export const policies = { "least-loaded": leastLoaded, "cache-aware": cacheAware } as const satisfies Record<string, Policy>
export type PolicyName = keyof typeof policies

export const isPolicyName = (name: string): name is PolicyName => Object.hasOwn(policies, name)
