/**
 * What the scheduler knows of the cluster: who lives, which prefixes they hold, and the load they will have. Load is
 * predicted when a request is placed, not polled: it is added then, corrected when the prompt is done, and taken away at
 * the end. Pure state and time: the same code serves the actor and a simulation.
 */
import { limits } from "../../config/limits.ts"
import { unpackHashes } from "../messages/hashes.ts"
import type { HeartbeatMessage, Holder, KvEventsMessage, PlaceMessage, Role, WorkerLoad } from "../messages/scheduler.ts"

export interface WorkerView {
  readonly id: string
  readonly epoch: number
  roles: ReadonlyArray<Role>
  load: WorkerLoad
  prefillTokPerS: number | undefined
  heardAtMs: number
  /** Chained hashes of the blocks in its pool. */
  readonly prefixes: Set<string>
  /** Id of the next event that continues `prefixes`; -1: they are unknown. */
  nextEventId: number
  requests: ReadonlySet<string>
}

export interface Charge {
  readonly requestId: string
  readonly attempt: number
  readonly prefill: string
  readonly decode: string
  readonly choices: number
  /** Prompt tokens still to compute, as predicted. */
  computeTokens: number
  readonly placedAtMs: number
}

export class ClusterState {
  readonly workers = new Map<string, WorkerView>()
  readonly charges = new Map<string, Charge>()
  readonly #silenceMs: number
  readonly #leaseMs: number

  constructor(options: { readonly silenceMs: number; readonly leaseMs: number }) {
    this.#silenceMs = options.silenceMs
    this.#leaseMs = options.leaseMs
  }

  /** Returns whether the worker's prefixes, or some events of them, are unknown, so that they are to be asked for. */
  heartbeat(message: HeartbeatMessage, nowMs: number): boolean {
    let view = this.workers.get(message.worker)
    if (view !== undefined && message.epoch < view.epoch) return false // an earlier incarnation's last words
    if (view === undefined || message.epoch > view.epoch) {
      this.#forget(message.worker) // and what was placed on the earlier incarnation, which is gone
      view = {
        id: message.worker,
        epoch: message.epoch,
        roles: message.roles,
        load: message.load,
        prefillTokPerS: undefined,
        heardAtMs: nowMs,
        prefixes: new Set(),
        nextEventId: message.nextEventId === 0 ? 0 : -1,
        requests: new Set(),
      }
      this.workers.set(message.worker, view)
    }
    view.roles = message.roles
    view.load = message.load
    view.prefillTokPerS = message.prefillTokPerS
    view.heardAtMs = nowMs
    view.requests = new Set(message.requests)
    return view.nextEventId < message.nextEventId
  }

  leave(worker: string, epoch: number): void {
    if (this.workers.get(worker)?.epoch === epoch) this.#forget(worker)
  }

  /**
   * Events of a worker of this epoch, pushed or asked for; an earlier incarnation's are void, and so are those that are known.
   * Returns whether some before them were missed, which are to be asked for.
   */
  kvEvents({ worker, epoch, firstId, nextId, delta }: KvEventsMessage): boolean {
    const view = this.workers.get(worker)
    if (view === undefined || view.epoch !== epoch || nextId <= view.nextEventId) return false
    if (delta.cleared === true) view.prefixes.clear()
    // What is known already may be told again: the last word on a hash is the same.
    else if (view.nextEventId < firstId) return true
    for (const hash of unpackHashes(delta.stored)) view.prefixes.add(hash)
    for (const hash of unpackHashes(delta.removed)) view.prefixes.delete(hash)
    view.nextEventId = nextId
    return false
  }

  /** Forgets workers that have been silent too long, and charges that no worker knows of after their lease. */
  sweep(nowMs: number): void {
    for (const view of [...this.workers.values()]) if (nowMs - view.heardAtMs > this.#silenceMs) this.#forget(view.id)
    for (const [key, charge] of [...this.charges]) {
      const known = this.workers.get(charge.decode)?.requests.has(charge.requestId) ?? false
      if (!known && nowMs - charge.placedAtMs > this.#leaseMs) this.charges.delete(key)
    }
  }

  /**
   * Workers of a role that live. Those whose pool can never hold the request only where no pool can, and of these, those that it
   * has failed on, or was moved from, only where there are no others.
   */
  candidates(role: Role, request: PlaceMessage): Array<WorkerView> {
    const living = [...this.workers.values()].filter((worker) => worker.roles.includes(role))
    const fitting = living.filter(({ load }) => request.tokens + request.maxTokens <= load.blocks * load.blockTokens)
    const able = fitting.length > 0 ? fitting : living
    const others = able.filter(({ id }) => id !== request.movedFrom && !request.exclude.includes(id))
    return others.length > 0 ? others : able
  }

  /** Sequences that decode there, as predicted. */
  sequences(worker: string): number {
    let sum = 0
    for (const charge of this.charges.values()) if (charge.decode === worker) sum += charge.choices
    return sum
  }

  /** Prompt tokens that wait to be computed there, as predicted. */
  queuedTokens(worker: string): number {
    let sum = 0
    for (const charge of this.charges.values()) if (charge.prefill === worker) sum += charge.computeTokens
    return sum
  }

  /**
   * Whether a prompt that is placed there now begins soon: what waits there is less than a short time's work. More waits here, for
   * whoever has room first, also for a worker that is yet to come.
   */
  beginsSoon(worker: WorkerView): boolean {
    const { prefillTokPerS } = worker
    const most = prefillTokPerS === undefined ? limits.prefillQueueTokens : (prefillTokPerS * limits.prefillQueueMs) / 1000
    return this.queuedTokens(worker.id) < Math.max(most, limits.stepTokens)
  }

  hasSlot(worker: WorkerView, choices: number): boolean {
    return this.sequences(worker.id) + choices <= worker.load.maxBatch
  }

  /** Leading blocks of the request that the worker holds. */
  prefixBlocks(worker: WorkerView, request: PlaceMessage): number {
    const hashes = unpackHashes(request.hashes)
    let count = 0
    while (count < hashes.length && worker.prefixes.has(hashes[count]!)) count++
    return count
  }

  /** The worker, other than `but`, that holds most leading blocks of the request, where these are more than `least`. */
  holder(request: PlaceMessage, but: string, least: number): Holder | undefined {
    let most: Holder | undefined
    for (const worker of this.workers.values()) {
      const blocks = worker.id === but || request.exclude.includes(worker.id) ? 0 : this.prefixBlocks(worker, request)
      if (blocks > (most?.blocks ?? least)) most = { worker: worker.id, blocks }
    }
    return most
  }

  charge(charge: Charge): void {
    this.charges.set(chargeKey(charge), charge)
  }

  prefilled(key: { readonly requestId: string; readonly attempt: number }): void {
    const charge = this.charges.get(chargeKey(key))
    if (charge !== undefined) charge.computeTokens = 0
  }

  release(key: { readonly requestId: string; readonly attempt: number }): void {
    this.charges.delete(chargeKey(key))
  }

  #forget(worker: string): void {
    this.workers.delete(worker)
    for (const [key, charge] of [...this.charges]) {
      if (charge.decode === worker) this.charges.delete(key)
      // Its decode worker serves it still, or computes the prompt itself: the sequence keeps its place there.
      else if (charge.prefill === worker) charge.computeTokens = 0
    }
  }
}

const chargeKey = ({ requestId, attempt }: { readonly requestId: string; readonly attempt: number }): string => `${requestId}.${attempt}`
