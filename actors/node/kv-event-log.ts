/**
 * What a worker's prefix index gains and loses, gathered into messages for the scheduler, with ids that show a gap. The newest
 * events are kept in a ring, from which a gap is repaired; a longer one takes a dump of the index.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { Link } from "../runtime/link.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { KvEvents, type KvDelta } from "../messages/scheduler.ts"
import { anyId, subject } from "../messages/subjects.ts"

interface Event {
  readonly stored: boolean
  readonly hash: BlockHash
}

/** The last event of each hash decides: of a hash that was removed and stored again it is known that it is there. */
const deltaOf = (events: Iterable<Event>): KvDelta => {
  const last = new Map<BlockHash, boolean>()
  for (const { stored, hash } of events) last.set(hash, stored)
  const hashes = (wanted: boolean): Uint8Array => packHashes([...last].filter(([, stored]) => stored === wanted).map(([hash]) => hash))
  return { stored: hashes(true), removed: hashes(false) }
}

export class KvEventLog {
  /** Id of the next event. */
  nextId = 0
  /** Event `id` lies at `id % limits.kvEventRing`. */
  readonly #ring: Array<Event> = []
  #publishedId = 0
  #wake: (() => void) | undefined

  stored(hash: BlockHash): void {
    this.#keep({ stored: true, hash })
  }

  removed(hash: BlockHash): void {
    this.#keep({ stored: false, hash })
  }

  /** What the events from `from` on come to; undefined where they are not kept any more, or never were. */
  since(from: number): KvDelta | undefined {
    if (from > this.nextId || this.nextId - from > limits.kvEventRing) return undefined
    return deltaOf(this.#between(from, this.nextId))
  }

  /** Publishes until the Scope closes. What came faster than it was published, and left the ring meanwhile, is a gap. */
  run(options: { readonly link: Link; readonly namespace: string; readonly worker: string; readonly epoch: number }): Effect.Effect<void, never, Scope.Scope> {
    const { link, namespace, worker, epoch } = options
    const publish = Effect.gen({ self: this }, function* () {
      yield* this.#unpublished()
      const firstId = Math.max(this.#publishedId, this.nextId - limits.kvEventRing)
      const nextId = this.nextId
      this.#publishedId = nextId
      yield* link.tell(KvEvents, subject(namespace, "scheduler", anyId, KvEvents.verb), { worker, epoch, firstId, nextId, delta: deltaOf(this.#between(firstId, nextId)) })
    })
    return Effect.asVoid(Effect.forkScoped(Effect.forever(Effect.ignore(publish))))
  }

  *#between(from: number, to: number): Iterable<Event> {
    for (let id = from; id < to; id++) yield this.#ring[id % limits.kvEventRing]!
  }

  #keep(event: Event): void {
    this.#ring[this.nextId++ % limits.kvEventRing] = event
    this.#wake?.()
    this.#wake = undefined
  }

  #unpublished(): Effect.Effect<void> {
    return Effect.callback<void>((resume) => {
      if (this.nextId > this.#publishedId) return resume(Effect.void)
      this.#wake = () => resume(Effect.void)
    })
  }
}
