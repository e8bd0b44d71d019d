/**
 * Who serves now, as announced: the latest word of each member that has not been silent too long.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { Bus } from "../runtime/bus.ts"
import { Presence, type PresenceMessage } from "../messages/presence.ts"
import { presenceSubject } from "../messages/subjects.ts"

interface Member {
  readonly message: PresenceMessage
  /** Beats since it was heard. They are counted, not time: where this process itself was stopped, words wait that it has not read. */
  silentBeats: number
}

/** A member with this kind and id of an epoch up to this one is gone. */
export type OnGone = (kind: PresenceMessage["kind"], id: string, epoch: number) => void

/** A member with this kind and id serves that did not before, or not under this epoch. */
export type OnCome = (kind: PresenceMessage["kind"], id: string, epoch: number) => void

export class Members {
  readonly #members = new Map<string, Member>()
  readonly #watchers = new Set<OnGone>()
  readonly #greeters = new Set<OnCome>()
  readonly #mostSilentBeats: number

  private constructor(silenceMs: number) {
    this.#mostSilentBeats = silenceMs / limits.heartbeatIntervalMs
  }

  /**
   * Listens until the Scope closes.
   * @param silenceMs after which a member is gone
   */
  static readonly listen = (bus: Bus, namespace: string, silenceMs: number = limits.heartbeatSilenceMs): Effect.Effect<Members, never, Scope.Scope> =>
    Effect.gen(function* () {
      const members = new Members(silenceMs)
      yield* Effect.acquireRelease(
        Effect.sync(() => bus.subscribe(presenceSubject(namespace), ({ data }) => members.#hear(data))),
        (subscription) => Effect.sync(() => subscription.unsubscribe()),
      )
      yield* Effect.acquireRelease(
        Effect.sync(() => setInterval(() => members.#sweep(), limits.heartbeatIntervalMs).unref()),
        (timer) => Effect.sync(() => clearInterval(timer)),
      )
      return members
    })

  /** The latest word of each member, by kind and id. */
  get all(): ReadonlyArray<PresenceMessage> {
    return [...this.#members.values()].map(({ message }) => message).sort((a, b) => (a.kind + a.id < b.kind + b.id ? -1 : 1))
  }

  /** Of the members of a kind; 0 where none serves. */
  latestEpoch(kind: PresenceMessage["kind"]): number {
    let latest = 0
    for (const { message } of this.#members.values()) if (message.kind === kind) latest = Math.max(latest, message.epoch)
    return latest
  }

  /** Tells of members that leave, fall silent or come back under a later epoch. Returns how to stop. */
  onGone(watcher: OnGone): () => void {
    this.#watchers.add(watcher)
    return () => this.#watchers.delete(watcher)
  }

  /** Tells of members that are new, or back under a later epoch. Returns how to stop. */
  onCome(greeter: OnCome): () => void {
    this.#greeters.add(greeter)
    return () => this.#greeters.delete(greeter)
  }

  /** Waits until all of these have been heard of, or for a beat: their first words may still be on their way. */
  untilServing(wanted: ReadonlyArray<{ readonly kind: string; readonly id: string }>): Effect.Effect<void> {
    const isServing = () => wanted.every(({ kind, id }) => this.#members.has(`${kind} ${id}`))
    const waiting = Effect.suspend((): Effect.Effect<void> => (isServing() ? Effect.void : Effect.andThen(Effect.sleep(5), waiting)))
    return Effect.ignore(Effect.timeout(waiting, 2 * limits.heartbeatIntervalMs))
  }

  #hear(data: Uint8Array): void {
    let message: PresenceMessage
    try {
      message = Presence.decode(data)
    } catch {
      return // another version's word, or none at all
    }
    const key = `${message.kind} ${message.id}`
    const known = this.#members.get(key)
    if (known !== undefined && known.message.epoch > message.epoch) return
    if (known !== undefined && known.message.epoch < message.epoch) this.#gone(known.message)
    if (message.state === "leaving") {
      if (known !== undefined && this.#members.delete(key)) this.#gone(message)
      return
    }
    this.#members.set(key, { message, silentBeats: 0 })
    if (known?.message.epoch !== message.epoch) for (const greeter of this.#greeters) greeter(message.kind, message.id, message.epoch)
  }

  #sweep(): void {
    for (const [key, member] of this.#members) {
      if (++member.silentBeats <= this.#mostSilentBeats) continue
      this.#members.delete(key)
      this.#gone(member.message)
    }
  }

  #gone({ kind, id, epoch }: PresenceMessage): void {
    for (const watcher of this.#watchers) watcher(kind, id, epoch)
  }
}
