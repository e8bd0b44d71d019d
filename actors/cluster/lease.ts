/**
 * Who leads a cluster: whoever wrote the key `leader` last and keeps writing it. Clocks of machines are never compared: each
 * measures on its own how long it has seen no renewal, and the leader stops before anybody else can have waited for so long.
 */
import type { ClusterBucket } from "../runtime/cluster-bucket.ts"
import { clusterKeys } from "./cluster-keys.ts"

export interface LeaseOptions {
  readonly bucket: ClusterBucket
  readonly node: string
  /** Of this incarnation of the node. */
  readonly epoch: number
  readonly leaseMs: number
  /** Monotonic. */
  readonly nowMs: () => number
}


export class Lease {
  readonly #options: LeaseOptions
  /** The revision that this node wrote last, while it leads. */
  #own: number | undefined
  #heldUntilMs = -Infinity
  /** The leader's last write, as it was seen here, and since when. */
  #seen: { readonly revision: number; readonly sinceMs: number } | undefined

  constructor(options: LeaseOptions) {
    this.#options = options
  }

  /** Whether this node may act as the leader at this moment. */
  get held(): boolean {
    return this.#own !== undefined && this.#options.nowMs() < this.#heldUntilMs
  }

  /** Renews the lease, or takes it where nobody does: to be called with each heartbeat. Rejects where the bucket cannot be reached. */
  async beat(): Promise<void> {
    const { bucket, nowMs, leaseMs } = this.#options
    if (this.#own !== undefined) return this.#write(this.#own)
    const { value, revision } = await clusterKeys.leader.read(bucket)
    if (revision === 0) return this.#write(0)
    if (this.#seen?.revision !== revision) this.#seen = { revision, sinceMs: nowMs() }
    if (value?.node === "" || nowMs() - this.#seen.sinceMs >= leaseMs) await this.#write(revision)
  }

  /** Leaves it to others at once. */
  async resign(): Promise<void> {
    const own = this.#own
    this.#own = undefined
    if (own !== undefined) await clusterKeys.leader.write(this.#options.bucket, { node: "", epoch: 0 }, own)
  }

  async #write(over: number): Promise<void> {
    const { bucket, node, epoch, leaseMs, nowMs } = this.#options
    // From before it is sent: others begin to wait once it has arrived.
    const sentAtMs = nowMs()
    try {
      const revision = await clusterKeys.leader.write(bucket, { node, epoch }, over)
      this.#own = revision
      if (revision !== undefined) this.#heldUntilMs = sentAtMs + leaseMs
    } catch (error) {
      // It may have been written all the same; what is read next tells.
      if (!this.held) this.#own = undefined
      throw error
    }
  }
}
