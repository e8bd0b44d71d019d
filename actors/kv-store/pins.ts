/**
 * Who wants which blocks kept, and until when: also blocks that are not here yet, since what is computed comes in the background.
 * Bounded in all, and where it is too much it is the greediest tenant that loses its oldest.
 */
import { limits } from "../../config/limits.ts"

/** Until when a block is to be kept, and on whose account. */
export interface Pin {
  readonly untilMs: number
  readonly tenant: string
}

interface Owner extends Pin {
  readonly keys: ReadonlySet<string>
}

export class Pins {
  readonly #owners = new Map<string, Owner>() // by tenant and name; the one that was set longest ago first
  readonly #wanted = new Map<string, Set<Owner>>() // by block
  readonly #tenants = new Map<string, number>() // blocks that each wants
  readonly #now: () => number

  constructor(now: () => number = () => performance.now()) {
    this.#now = now
  }

  /** Blocks that owners want, those of several counted for each. */
  get size(): number {
    let sum = 0
    for (const count of this.#tenants.values()) sum += count
    return sum
  }

  of(key: string): Pin | undefined {
    let latest: Pin | undefined
    for (const owner of this.#wanted.get(key) ?? []) if (owner.untilMs > (latest?.untilMs ?? this.#now())) latest = owner
    return latest
  }

  /** What an owner wants from now on, in place of what it wanted before; nothing where the time has passed. Returns every block concerned. */
  set(name: string, tenant: string, keys: ReadonlyArray<string>, untilMs: number): ReadonlySet<string> {
    const id = JSON.stringify([tenant, name])
    const concerned = new Set([...keys, ...this.#drop(id)])
    const now = this.#now()
    for (const [other, owner] of this.#owners) if (owner.untilMs <= now) this.#drop(other).forEach((key) => concerned.add(key))
    if (untilMs > now && keys.length > 0) {
      const owner: Owner = { tenant, untilMs, keys: new Set(keys) }
      this.#owners.set(id, owner)
      this.#count(tenant, owner.keys.size)
      for (const key of owner.keys) {
        const owners = this.#wanted.get(key) ?? new Set()
        this.#wanted.set(key, owners.add(owner))
      }
    }
    while (this.size > limits.storePinnedBlocks || this.#owners.size > limits.storePinOwners) this.#drop(this.#greediest()).forEach((key) => concerned.add(key))
    return concerned
  }

  #greediest(): string {
    const [greedy] = [...this.#tenants].reduce((most, entry) => (entry[1] > most[1] ? entry : most))
    for (const [id, { tenant }] of this.#owners) if (tenant === greedy) return id
    throw new Error(`${greedy} has pinned nothing`)
  }

  #drop(id: string): ReadonlySet<string> {
    const owner = this.#owners.get(id)
    if (owner === undefined) return new Set()
    this.#owners.delete(id)
    this.#count(owner.tenant, -owner.keys.size)
    for (const key of owner.keys) {
      const owners = this.#wanted.get(key)!
      owners.delete(owner)
      if (owners.size === 0) this.#wanted.delete(key)
    }
    return owner.keys
  }

  #count(tenant: string, more: number): void {
    const count = (this.#tenants.get(tenant) ?? 0) + more
    if (count === 0) this.#tenants.delete(tenant)
    else this.#tenants.set(tenant, count)
  }
}
