import { Effect } from "effect"
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { limits } from "../../config/limits.ts"
import { unpackHashes } from "../../actors/messages/hashes.ts"
import { KvEvents, type KvDelta, type KvEventsMessage } from "../../actors/messages/scheduler.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { KvEventLog } from "../../actors/node/kv-event-log.ts"
import { actor, onTell } from "../../actors/runtime/actor.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"

const hashOf = (n: number): string => String(n).padStart(16, "0")

const apply = (known: Set<string>, delta: KvDelta): void => {
  if (delta.cleared === true) known.clear()
  for (const hash of unpackHashes(delta.stored)) known.add(hash)
  for (const hash of unpackHashes(delta.removed)) known.delete(hash)
}

/** A log, the index that it tells of, and that index as it was before each event. */
const history = (toggles: ReadonlyArray<number>) => {
  const log = new KvEventLog()
  const index = new Set<string>()
  const before: Array<ReadonlySet<string>> = [new Set()]
  for (const n of toggles) {
    const hash = hashOf(n)
    if (index.delete(hash)) log.removed(hash)
    else {
      index.add(hash)
      log.stored(hash)
    }
    before.push(new Set(index))
  }
  return { log, index, before }
}

describe("the events of a prefix index", () => {
  it("bring any earlier state to the present one, and later ones again do no harm", () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 0, max: 5 }), { maxLength: 40 }), fc.nat(), fc.nat(), (toggles, a, b) => {
        const { log, index, before } = history(toggles)
        const from = a % (toggles.length + 1)
        for (const start of [from, from + (b % (toggles.length + 1 - from))]) {
          const known = new Set(before[start])
          apply(known, log.since(from)!)
          expect(known).toEqual(index)
        }
      }),
    )
  })

  it("are kept so many, and no more", () => {
    const { log } = history(Array.from({ length: limits.kvEventRing + 5 }, (_, i) => i))
    expect(log.nextId).toBe(limits.kvEventRing + 5)
    expect(log.since(4)).toBeUndefined()
    expect(unpackHashes(log.since(5)!.stored)).toHaveLength(limits.kvEventRing)
    expect(log.since(log.nextId)!.stored).toHaveLength(0)
    expect(log.since(log.nextId + 1)).toBeUndefined()
  })

  it("are published as they come, with a gap where more came at once than are kept", () =>
    Effect.runPromise(
      Effect.scoped(
        Effect.gen(function* () {
          const bus = new MemoryBus()
          const heard: Array<KvEventsMessage> = []
          yield* actor(new Link(bus, "scheduler", 1), [onTell(KvEvents, [{ subject: subject("test", "scheduler", anyId, KvEvents.verb) }], (message) => Effect.sync(() => void heard.push(message)))])
          const log = new KvEventLog()
          yield* log.run({ link: new Link(bus, "worker w", 1), namespace: "test", worker: "w", epoch: 1 })
          const upToId = (id: number) => Effect.promise(() => expect.poll(() => heard.at(-1)?.nextId).toBe(id))
          log.stored(hashOf(1))
          log.stored(hashOf(2))
          log.removed(hashOf(1))
          yield* upToId(3)
          expect(heard[0]!.firstId).toBe(0)
          for (let i = 0; i < limits.kvEventRing + 7; i++) log.stored(hashOf(10 + i))
          yield* upToId(limits.kvEventRing + 10)
          expect(heard.at(-1)!.firstId).toBe(10)
        }),
      ),
    ))
})
