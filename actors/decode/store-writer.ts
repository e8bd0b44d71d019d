/**
 * Puts what a worker computes into the KV store, in the background and by hash only: a block that was evicted before its
 * turn, or a store that does not answer, costs a later miss and nothing else.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { Link } from "../runtime/link.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { Have, Put } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Worker } from "../engine/worker.ts"

const batchBlocks = 64

export class StoreWriter {
  #queue: Array<BlockHash> = []
  #wake: (() => void) | undefined

  /** A block's content became known. Beyond the bound the oldest in the queue is forgotten. */
  stored(hash: BlockHash): void {
    this.#queue.push(hash)
    if (this.#queue.length > limits.storeQueueBlocks) this.#queue.shift()
    this.#wake?.()
    this.#wake = undefined
  }

  /** Writes until the Scope closes. */
  run(options: { readonly link: Link; readonly cluster: string; readonly worker: Pick<Worker, "engine" | "formatId"> }): Effect.Effect<void, never, Scope.Scope> {
    const { link, cluster, worker } = options
    const hop = { hop: "kv-store", deadlineMs: limits.storeDeadlineMs }
    const { formatId } = worker
    const putBatch = Effect.gen({ self: this }, function* () {
      yield* this.#nonEmpty()
      const hashes = this.#queue.splice(0, batchBlocks)
      const { present } = yield* link.ask(Have, subject(cluster, "kv-store", anyId, Have.verb), { formatId, hashes: packHashes(hashes) }, hop)
      for (const hash of hashes.filter((_, i) => present[i] !== true)) {
        const bytes = worker.engine.exportBlock(hash)
        if (bytes === undefined) continue
        yield* link.ask(Put, subject(cluster, "kv-store", anyId, Put.verb), { formatId, hash: packHashes([hash]), bytes }, hop)
      }
    })
    const quietly = putBatch.pipe(Effect.catch(() => Effect.sleep(limits.heartbeatIntervalMs)))
    return Effect.asVoid(Effect.forkScoped(Effect.forever(quietly)))
  }

  #nonEmpty(): Effect.Effect<void> {
    return Effect.callback<void>((resume) => {
      if (this.#queue.length > 0) return resume(Effect.void)
      this.#wake = () => resume(Effect.void)
    })
  }
}
