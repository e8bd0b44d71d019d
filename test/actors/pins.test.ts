/** Who wants which blocks kept, against a model that is too simple to be wrong. */
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { Pins } from "../../actors/kv-store/pins.ts"
import { limits } from "../../config/limits.ts"

const keys = fc.uniqueArray(fc.nat(12).map((n) => `k${n}`), { maxLength: 6 })
const operation = fc.record({ wait: fc.nat(20), owner: fc.nat(3).map((n) => `o${n}`), tenant: fc.constantFrom("alice", "bob"), keys, forMs: fc.nat(60) })

describe("pins", () => {
  it("are of what each owner wanted last, until its time is over, and say of every block that changes", () => {
    fc.assert(
      fc.property(fc.array(operation, { maxLength: 60 }), (operations) => {
        let now = 0
        const pins = new Pins(() => now)
        const model = new Map<string, { readonly tenant: string; readonly keys: ReadonlyArray<string>; readonly untilMs: number }>()
        const pinned = (key: string) => Math.max(0, ...[...model.values()].filter((owner) => owner.keys.includes(key) && owner.untilMs > now).map(({ untilMs }) => untilMs))
        const all = Array.from({ length: 13 }, (_, n) => `k${n}`)
        for (const { wait, owner, tenant, keys, forMs } of operations) {
          now += wait
          const before = new Map(all.map((key) => [key, pinned(key)]))
          const concerned = pins.set(owner, tenant, keys, now + forMs)
          model.set(`${tenant} ${owner}`, { tenant, keys, untilMs: now + forMs })
          for (const key of all) {
            expect(pins.of(key)?.untilMs ?? 0).toBe(pinned(key))
            if (pinned(key) !== before.get(key)) expect(concerned).toContain(key)
          }
          expect(pins.size).toBe([...model.values()].filter(({ untilMs }) => untilMs > now).reduce((sum, { keys }) => sum + keys.length, 0))
        }
      }),
    )
  })

  it("are bounded: beyond it the tenant that wants most loses its oldest, and the others nothing", () => {
    const pins = new Pins(() => 0)
    const many = (name: string, count: number) => Array.from({ length: count }, (_, i) => `${name} ${i}`)
    const third = Math.ceil(limits.storePinnedBlocks / 3)
    pins.set("mine", "bob", many("mine", 10), 1)
    for (const name of ["a", "b", "c", "d"]) pins.set(name, "alice", many(name, third), 1)
    expect(["a 0", "b 0", "c 0", "d 0", "mine 0"].map((key) => pins.of(key)?.tenant)).toEqual([undefined, undefined, "alice", "alice", "bob"])
    for (let i = 0; i < limits.storePinOwners + 10; i++) pins.set(`small ${i}`, "carol", [`small ${i}`], 1)
    expect(pins.of("mine 0")?.tenant).toBe("bob")
    expect(pins.size).toBeLessThanOrEqual(limits.storePinnedBlocks)
  })
})
