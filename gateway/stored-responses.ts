/**
 * The completed responses that a gateway keeps for GET and `previous_response_id`, each for the tenant that asked for it and for
 * nobody else. In memory only: they end with the process.
 */
import { limits } from "../config/limits.ts"
import { Turns, type Turn } from "./turns.ts"

export class StoredResponses {
  readonly lifetimeMs: number
  readonly #turns = new Map<string, Turns>() // by tenant
  readonly #deleted = new Set<(responseId: string) => void>()

  constructor(lifetimeMs: number) {
    this.lifetimeMs = lifetimeMs
  }

  get(tenant: string, responseId: string): Turn | undefined {
    return this.#turns.get(tenant)?.get(responseId)
  }

  add(tenant: string, responseId: string, turn: Turn): void {
    const turns = this.#turns.get(tenant) ?? new Turns({ count: limits.storedResponses, bytes: limits.storedResponseBytes, lifetimeMs: this.lifetimeMs })
    this.#turns.set(tenant, turns)
    turns.add(responseId, turn)
  }

  /** Whether it was kept. Connections that have it beside forget it too. */
  delete(tenant: string, responseId: string): boolean {
    if (this.#turns.get(tenant)?.get(responseId) === undefined) return false
    for (const forget of this.#deleted) forget(responseId)
    return this.#turns.get(tenant)!.delete(responseId)
  }

  /** Calls `forget` with each id that is deleted, until the returned function is called. */
  onDelete(forget: (responseId: string) => void): () => void {
    this.#deleted.add(forget)
    return () => this.#deleted.delete(forget)
  }

  /** Forgets what has outlived its time. */
  expire(): void {
    for (const [tenant, turns] of this.#turns) {
      turns.expire()
      if (turns.size === 0) this.#turns.delete(tenant)
    }
  }
}
