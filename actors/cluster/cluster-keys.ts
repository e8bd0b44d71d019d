/**
 * The keys of a cluster's bucket with their types: what is wanted, who leads, who runs what, and who shall run nothing.
 */
import { Schema } from "effect"
import type { Subscription } from "../runtime/bus.ts"
import type { ClusterBucket } from "../runtime/cluster-bucket.ts"
import { Assignment, Drained, Leader, WantedText } from "./assignment.ts"

export interface Kept<A> {
  readonly value: A
  readonly revision: number
}

/** One key. What nobody of this version has written counts as not there, and is written over by its revision. */
export class ClusterKey<A> {
  readonly name: string
  readonly #decode: (json: unknown) => A

  constructor(name: string, schema: Schema.Codec<A, A, never, never>) {
    this.name = name
    this.#decode = Schema.decodeUnknownSync(schema)
  }

  async read(bucket: ClusterBucket): Promise<Kept<A | undefined>> {
    const entry = await bucket.get(this.name)
    return entry === undefined ? { value: undefined, revision: 0 } : { value: this.#value(entry.value), revision: entry.revision }
  }

  /** As `ClusterBucket.put`: undefined where somebody else was first. */
  write(bucket: ClusterBucket, value: A, revision: number): Promise<number | undefined> {
    return bucket.put(this.name, new TextEncoder().encode(JSON.stringify(value)), revision)
  }

  watch(bucket: ClusterBucket, handler: (kept: Kept<A>) => void): Subscription {
    return bucket.watch(this.name, (entry) => {
      const value = this.#value(entry.value)
      if (value !== undefined) handler({ value, revision: entry.revision })
    })
  }

  #value(bytes: Uint8Array): A | undefined {
    try {
      return this.#decode(JSON.parse(new TextDecoder().decode(bytes)))
    } catch {
      return undefined
    }
  }
}

export const clusterKeys = {
  wanted: new ClusterKey("wanted", WantedText),
  assignment: new ClusterKey("assignment", Assignment),
  drained: new ClusterKey("drained", Drained),
  leader: new ClusterKey("leader", Leader),
}
