/**
 * What a cluster keeps: a few keys with values that everybody may read and write, each with a revision that rises with every
 * write. Implementations pass one suite (test/actors/cluster-bucket.test.ts).
 */
import type { Subscription } from "./bus.ts"

export interface BucketEntry {
  readonly value: Uint8Array
  /** Rises with every write to the bucket, never falls. */
  readonly revision: number
}

/** All promises reject with a Fault where the bucket cannot be reached within a deadline; the write may have happened then. */
export interface ClusterBucket {
  /** The newest value. */
  get(key: string): Promise<BucketEntry | undefined>
  /**
   * Writes a value in place of the one with `revision`; 0: where there is none. Resolves to the new revision, or to undefined
   * where somebody else has written meanwhile, and then nothing is changed.
   */
  put(key: string, value: Uint8Array, revision: number): Promise<number | undefined>
  /** Calls back with the value that there is, and then with newer ones; of several that follow quickly perhaps only the last. */
  watch(key: string, handler: (entry: BucketEntry) => void): Subscription
  close(): Promise<void>
}
