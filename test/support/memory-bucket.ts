/** A bucket in memory: several handles on the same keys. */
import type { Subscription } from "../../actors/runtime/bus.ts"
import type { BucketEntry, ClusterBucket } from "../../actors/runtime/cluster-bucket.ts"
import { Fault } from "../../actors/runtime/fault.ts"

export class MemoryKeys {
  readonly entries = new Map<string, BucketEntry>()
  readonly watchers = new Map<string, Set<(entry: BucketEntry) => void>>()
  revision = 0
}

export class MemoryBucket implements ClusterBucket {
  readonly #keys: MemoryKeys
  readonly #subscriptions = new Set<Subscription>()
  #closed = false
  /** Of this handle: as if the network to the others were cut. */
  cut = false

  constructor(keys = new MemoryKeys()) {
    this.#keys = keys
  }

  async get(key: string): Promise<BucketEntry | undefined> {
    this.#check()
    return this.#keys.entries.get(key)
  }

  async put(key: string, value: Uint8Array, revision: number): Promise<number | undefined> {
    this.#check()
    if ((this.#keys.entries.get(key)?.revision ?? 0) !== revision) return undefined
    const entry = { value: value.slice(), revision: ++this.#keys.revision }
    this.#keys.entries.set(key, entry)
    for (const watcher of this.#keys.watchers.get(key) ?? []) queueMicrotask(() => watcher(entry))
    return entry.revision
  }

  watch(key: string, handler: (entry: BucketEntry) => void): Subscription {
    let told = 0
    const tell = (entry: BucketEntry) => {
      if (entry.revision <= told || this.#closed || !watchers.has(tell)) return
      told = entry.revision
      handler(entry)
    }
    const watchers = this.#keys.watchers.get(key) ?? new Set()
    this.#keys.watchers.set(key, watchers.add(tell))
    const now = this.#keys.entries.get(key)
    if (now !== undefined) queueMicrotask(() => tell(now))
    const subscription = { unsubscribe: () => void watchers.delete(tell) }
    this.#subscriptions.add(subscription)
    return subscription
  }

  async close(): Promise<void> {
    this.#closed = true
    for (const subscription of this.#subscriptions) subscription.unsubscribe()
  }

  #check(): void {
    if (this.#closed || this.cut) throw new Fault({ code: "unavailable", message: "bucket: cannot be reached", hop: "bucket" })
  }
}
