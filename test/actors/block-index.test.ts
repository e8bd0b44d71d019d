/** What a tier of the KV store keeps and gives up: pure data, against lists as models. */
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { BlockIndex, type Lease } from "../../actors/kv-store/block-index.ts"
import { EvictionQueue, evictions, type EvictionName, type Kept } from "../../actors/kv-store/eviction.ts"
import { limits } from "../../config/limits.ts"

const names = Object.keys(evictions) as Array<EvictionName>
const capacityBytes = 1000

describe.each(names)("the policy %s", (name) => {
  const before = evictions[name]

  it("is an order: of any two blocks that differ one goes first, and of three the first goes before the last", () => {
    const kept = fc.record({ depth: fc.nat(3), uses: fc.nat(3), usedAt: fc.nat(3) })
    fc.assert(
      fc.property(kept, kept, kept, (a, b, c) => {
        expect(Math.sign(before(a, b))).toBe(-Math.sign(before(b, a)) + 0)
        if (before(a, b) <= 0 && before(b, c) <= 0) expect(before(a, c)).toBeLessThanOrEqual(0)
      }),
    )
  })

  it("gives a queue its order, whatever comes, moves and leaves", () => {
    type Item = { -readonly [K in keyof Kept]: number } & { place: number }
    const operation = fc.record({ type: fc.constantFrom("add", "remove", "move"), which: fc.nat(20), depth: fc.nat(5), uses: fc.nat(5), usedAt: fc.nat(1000) })
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 100 }), (operations) => {
        const queue = new EvictionQueue<Item>(before)
        const model: Array<Item> = []
        for (const { type, which, ...kept } of operations) {
          const item = model[which % Math.max(1, model.length)]
          if (type === "add" || item === undefined) {
            model.push({ ...kept, place: -1 })
            queue.add(model.at(-1)!)
          } else if (type === "move") queue.moved(Object.assign(item, kept))
          else {
            queue.remove(item)
            model.splice(model.indexOf(item), 1)
          }
          expect(queue.size).toBe(model.length)
          for (const other of model) expect(before(queue.first!, other)).toBeLessThanOrEqual(0)
        }
        const order: Array<Item> = []
        for (let first = queue.first; first !== undefined; first = queue.first) {
          order.push(first)
          queue.remove(first)
        }
        order.forEach((item, i) => i > 0 && expect(before(order[i - 1]!, item)).toBeLessThanOrEqual(0))
        expect(order).toHaveLength(model.length)
      }),
    )
  })

  it("decides what a tier gives up: from the high watermark down to the low one, never what is leased or pinned", () => {
    const operation = fc.oneof(
      { weight: 4, arbitrary: fc.record({ type: fc.constant("add" as const), key: fc.nat(40), bytes: fc.integer({ min: 1, max: 200 }), depth: fc.nat(5) }) },
      { weight: 3, arbitrary: fc.record({ type: fc.constantFrom("use" as const, "lease" as const, "release" as const, "remove" as const), key: fc.nat(40) }) },
      { weight: 1, arbitrary: fc.record({ type: fc.constant("pin" as const), key: fc.nat(40), forMs: fc.nat(50), tenant: fc.constantFrom("alice", "bob", "carol") }) },
      { weight: 1, arbitrary: fc.record({ type: fc.constantFrom("reserve" as const, "free" as const), bytes: fc.integer({ min: 1, max: 300 }) }) },
      { weight: 1, arbitrary: fc.record({ type: fc.constant("wait" as const), ms: fc.nat(30) }) },
    )
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 150 }), (operations) => {
        let now = 0
        let clock = 0
        const gone: Array<string> = []
        const index = new BlockIndex<string>({ capacityBytes, eviction: before, now: () => now, onEvict: (key) => gone.push(key) })
        const model = new Map<string, { depth: number; uses: number; usedAt: number; bytes: number; leases: Array<Lease<string>>; pinnedUntilMs: number; pinnedFor: string }>()
        const reservations: Array<number> = []
        const taken = () => [...model.values()].reduce((sum, { bytes }) => sum + bytes, 0) + reservations.reduce((sum, bytes) => sum + bytes, 0)
        /** Gives up in the model what the policy says, and returns whether the bytes fit then. */
        const makeRoom = (bytes: number): boolean => {
          if (reservations.reduce((sum, reserved) => sum + reserved, bytes) > capacityBytes) return false
          if (taken() + bytes > capacityBytes * limits.storeHighWatermark) {
            const order = [...model].filter(([, kept]) => kept.leases.length === 0 && kept.pinnedUntilMs <= now).sort(([, a], [, b]) => before(a, b))
            while (order.length > 0 && taken() + bytes > capacityBytes * limits.storeLowWatermark) model.delete(order.shift()![0])
          }
          return taken() + bytes <= capacityBytes
        }
        for (const operation of operations) {
          const key = "key" in operation ? `k${operation.key}` : ""
          const kept = model.get(key)
          const known = [...model.keys()]
          gone.length = 0
          if (operation.type === "wait") now += operation.ms
          else if (operation.type === "reserve") {
            const fits = makeRoom(operation.bytes)
            expect(index.reserve(operation.bytes)).toBe(fits)
            if (fits) reservations.push(operation.bytes)
          } else if (operation.type === "free") index.release(reservations.pop() ?? 0)
          else if (operation.type === "add") {
            const usedAt = ++clock
            if (kept === undefined) {
              const fits = makeRoom(operation.bytes)
              expect(index.add({ key, value: key, bytes: operation.bytes, depth: operation.depth, usedAt })).toBe(fits)
              if (fits) model.set(key, { depth: operation.depth, bytes: operation.bytes, uses: 0, usedAt, leases: [], pinnedUntilMs: 0, pinnedFor: "" })
            } else {
              expect(index.add({ key, value: "another", bytes: operation.bytes, depth: 0, usedAt })).toBe(true)
              Object.assign(kept, { usedAt, uses: kept.uses + 1 })
            }
          } else if (operation.type === "use") {
            expect(index.use(key, ++clock)).toBe(kept === undefined ? undefined : key)
            if (kept !== undefined) Object.assign(kept, { usedAt: clock, uses: kept.uses + 1 })
          } else if (operation.type === "lease") {
            const lease = index.lease(key)
            expect(lease?.value).toBe(kept === undefined ? undefined : key)
            if (lease !== undefined) kept!.leases.push(lease)
          } else if (operation.type === "release") kept?.leases.pop()?.release()
          else if (operation.type === "remove") {
            expect(index.remove(key)).toBe(kept === undefined || kept.leases.length === 0)
            if (kept?.leases.length === 0) model.delete(key)
          } else if (operation.type === "pin") {
            const isPinned = kept !== undefined && kept.pinnedUntilMs > now
            const tenant = isPinned ? kept.pinnedFor : operation.tenant
            const pinned = [...model.values()].filter((other) => other !== kept && other.pinnedUntilMs > now)
            const bytesOf = (some: typeof pinned) => some.reduce((sum, { bytes }) => sum + bytes, kept?.bytes ?? 0)
            const fits = bytesOf(pinned) <= capacityBytes * limits.storePinShare && bytesOf(pinned.filter(({ pinnedFor }) => pinnedFor === tenant)) <= capacityBytes * limits.storePinTenantShare
            const may = operation.forMs === 0 || isPinned || fits
            expect(index.pin(key, { untilMs: now + operation.forMs, tenant: operation.tenant })).toBe(kept !== undefined && may)
            if (kept !== undefined && may) Object.assign(kept, { pinnedUntilMs: now + operation.forMs, pinnedFor: tenant })
          }
          index.checkInvariants()
          if (operation.type !== "remove") expect(gone.toSorted()).toEqual(known.filter((other) => !model.has(other)).toSorted())
          expect([index.size, index.bytes]).toEqual([model.size, [...model.values()].reduce((sum, { bytes }) => sum + bytes, 0)])
        }
      }),
    )
  })
})

describe("a tier's index", () => {
  const filled = (name: EvictionName) => {
    const index = new BlockIndex<string>({ capacityBytes: 100, eviction: evictions[name] })
    for (const [depth, key] of ["head", "middle", "tail"].entries()) index.add({ key, value: key, bytes: 30, depth, usedAt: 1 })
    return index
  }

  it.each(names)("gives up the tail of a chain before its head, where nothing else tells them apart (%s)", (name) => {
    const index = filled(name)
    index.add({ key: "new", value: "new", bytes: 30, depth: 0 })
    expect(["head", "middle", "tail"].map((key) => index.has(key))).toEqual([true, true, false])
  })

  it("keeps the start of an old chain rather than the end of a new one where it is length-aware, and the other way round where it is lru", () => {
    for (const [name, expected] of [["length-aware", [true, false]], ["lru", [false, true]]] as const) {
      const index = new BlockIndex<string>({ capacityBytes: 100, eviction: evictions[name] })
      index.add({ key: "old start", value: "", bytes: 45, depth: 0 })
      index.add({ key: "new end", value: "", bytes: 45, depth: 9 })
      index.add({ key: "another", value: "", bytes: 30, depth: 1 })
      expect(["old start", "new end"].map((key) => index.has(key))).toEqual(expected)
    }
  })

  it("keeps what is used often where it is lfu, though it was not used for long", () => {
    const index = new BlockIndex<string>({ capacityBytes: 100, eviction: evictions.lfu })
    index.add({ key: "often", value: "", bytes: 45, depth: 0 })
    for (let i = 0; i < 3; i++) index.use("often")
    index.add({ key: "once", value: "", bytes: 45, depth: 0 })
    index.use("once")
    index.add({ key: "another", value: "", bytes: 45, depth: 0 })
    expect(["often", "once"].map((key) => index.has(key))).toEqual([true, false])
  })

  it("refuses what is larger than all of it, and keeps what it has", () => {
    const index = filled("lru")
    expect(index.add({ key: "large", value: "", bytes: 101, depth: 0 })).toBe(false)
    expect(index.reserve(101)).toBe(false)
    expect(index.size).toBe(3)
  })
})
