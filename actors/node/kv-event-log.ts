/**
 * What a worker's prefix index gains and loses, gathered into messages for the scheduler, with ids that show a gap.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { Link } from "../runtime/link.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { KvEvents } from "../messages/scheduler.ts"
import { anyId, subject } from "../messages/subjects.ts"

interface Entry {
  readonly firstId: number
  readonly stored: Array<BlockHash>
  readonly removed: Array<BlockHash>
}

export class KvEventLog {
  nextEventId = 0
  #pending: Array<Entry> = []
  #wake: (() => void) | undefined

  stored(hash: BlockHash): void {
    let entry = this.#pending.at(-1)
    // Within a message removals follow additions, so an addition after a removal begins a new one.
    if (entry === undefined || entry.removed.length > 0 || entry.stored.length >= limits.kvEventRing) entry = this.#begin()
    entry.stored.push(hash)
    this.#count()
  }

  removed(hash: BlockHash): void {
    const entry = this.#pending.at(-1) ?? this.#begin()
    entry.removed.push(hash)
    this.#count()
  }

  /** Publishes until the Scope closes. */
  run(options: { readonly link: Link; readonly namespace: string; readonly worker: string; readonly epoch: number }): Effect.Effect<void, never, Scope.Scope> {
    const { link, namespace, worker, epoch } = options
    const publish = Effect.gen({ self: this }, function* () {
      yield* this.#nonEmpty()
      for (const { firstId, stored, removed } of this.#pending.splice(0)) {
        yield* link.tell(KvEvents, subject(namespace, "scheduler", anyId, KvEvents.verb), { worker, epoch, firstId, stored: packHashes(stored), removed: packHashes(removed) })
      }
    })
    return Effect.asVoid(Effect.forkScoped(Effect.forever(Effect.ignore(publish))))
  }

  #begin(): Entry {
    const entry: Entry = { firstId: this.nextEventId, stored: [], removed: [] }
    this.#pending.push(entry)
    return entry
  }

  #count(): void {
    this.nextEventId++
    this.#wake?.()
    this.#wake = undefined
  }

  #nonEmpty(): Effect.Effect<void> {
    return Effect.callback<void>((resume) => {
      if (this.#pending.length > 0) return resume(Effect.void)
      this.#wake = () => resume(Effect.void)
    })
  }
}
