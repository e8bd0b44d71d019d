/** The block manager against a model that is too simple to be wrong. */
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { BlockManager } from "../../actors/engine/block-manager.ts"
import { blockHash, chainHashes, hashRoot } from "../../actors/engine/block-hash.ts"

type Step =
  | { readonly type: "allocate" | "acquire" | "seal" | "share" | "release" | "limit"; readonly pick: number; readonly hash: number }

const total = 6
const hashes = Array.from({ length: 9 }, (_, i) => `hash ${i}`)

const step: fc.Arbitrary<Step> = fc.record({ type: fc.constantFrom("allocate", "allocate", "acquire", "seal", "seal", "share", "release", "release", "limit"), pick: fc.nat(), hash: fc.nat(hashes.length - 1) })

describe("the block manager", () => {
  it("keeps every block free, cached or referenced, finds content by hash, evicts what was used least recently, and minds its limit", () => {
    fc.assert(
      fc.property(fc.array(step, { maxLength: 80, size: "max" }), (steps) => {
        const events: Array<string> = []
        const manager = new BlockManager(total, { stored: (hash) => events.push(`+${hash}`), removed: (hash) => events.push(`-${hash}`) })
        const held: Array<Array<number>> = [] // one block a holder
        const content = new Map<number, string>() // of sealed blocks
        let cached: Array<number> = [] // least recently used first
        let limit = total
        const holders = (block: number) => held.filter(([own]) => own === block).length
        const referenced = () => new Set(held.flat()).size

        for (const { type, pick, hash: wanted } of steps) {
          const hash = hashes[wanted]!
          const holder = held.length === 0 ? undefined : pick % held.length
          const before = events.length
          const expected: Array<string> = []
          if (type === "allocate") {
            const block = manager.allocate()
            expect(block === undefined).toBe(referenced() >= limit)
            if (block === undefined) continue
            if (content.has(block)) {
              expect(block).toBe(cached[0]) // and only where no other may be used
              expect(referenced() + cached.length).toBe(limit)
              expected.push(`-${content.get(block)!}`)
              content.delete(block)
              cached = cached.slice(1)
            }
            expect(holders(block)).toBe(0)
            held.push([block])
          } else if (type === "acquire") {
            const block = manager.acquire(hash)
            expect(block === undefined ? undefined : content.get(block)).toBe([...content.values()].includes(hash) ? hash : undefined)
            if (block !== undefined) {
              held.push([block])
              cached = cached.filter((other) => other !== block)
            }
          } else if (type === "limit") {
            limit = 1 + (pick % total)
            manager.limit = limit
            while (cached.length > 0 && referenced() + cached.length > limit) {
              const block = cached.shift()!
              expected.push(`-${content.get(block)!}`)
              content.delete(block)
            }
          } else if (holder !== undefined) {
            const [block] = held[holder] as [number]
            if (type === "seal") {
              const isNew = !content.has(block) && ![...content.values()].includes(hash)
              manager.seal(block, hash)
              if (isNew) {
                content.set(block, hash)
                expected.push(`+${hash}`)
              }
            } else if (type === "share") {
              manager.share(block)
              held.push([block])
            } else {
              const over = referenced() > limit // none is cached then
              manager.release([block])
              held.splice(holder, 1)
              if (holders(block) === 0 && content.has(block) && over) {
                expected.push(`-${content.get(block)!}`)
                content.delete(block)
              } else if (holders(block) === 0 && content.has(block)) cached.push(block)
            }
          }
          expect(events.slice(before)).toEqual(expected)
          manager.check(held)
          for (let block = 0; block < total; block++) expect(manager.references(block)).toBe(holders(block))
          expect(manager.cached).toBe(cached.length)
          expect(manager.available).toBe(Math.max(0, limit - referenced()))
          expect(manager.excess).toBe(Math.max(0, referenced() - limit))
          expect(manager.cached === 0 || referenced() + manager.cached <= limit).toBe(true)
          expect(new Set(manager.knownHashes())).toEqual(new Set(content.values()))
          for (const [block, known] of content) expect(manager.find(known)).toBe(block)
        }
      }),
      { numRuns: 80 },
    )
  })

  it("counts the leading blocks of a chain that are known, not those after a gap", () => {
    const manager = new BlockManager(4)
    for (const hash of ["a", "b", "d"]) manager.seal(manager.allocate()!, hash)
    expect(manager.countPrefix(["a", "b", "c", "d"])).toBe(2)
    expect(manager.countPrefix(["c", "d"])).toBe(0)
    expect(manager.countPrefix([])).toBe(0)
  })

  it("evicts the tail of a released sequence before its head", () => {
    const manager = new BlockManager(3)
    const table = [0, 1, 2].map(() => manager.allocate()!)
    table.forEach((block, i) => manager.seal(block, `block ${i}`))
    manager.release([...table].reverse())
    manager.allocate()
    expect(["block 0", "block 1", "block 2"].map((hash) => manager.find(hash) !== undefined)).toEqual([true, true, false])
    manager.allocate()
    expect(manager.countPrefix(["block 0", "block 1", "block 2"])).toBe(1)
  })

  it("refuses what would lose or double a block", () => {
    const manager = new BlockManager(2)
    const block = manager.allocate()!
    manager.release([block])
    expect(() => manager.release([block])).toThrow("more often than it was taken")
    expect(() => manager.share(block)).toThrow("no holder")
    expect(() => manager.seal(block, "a")).toThrow("nobody's")
    expect(() => manager.check([[block]])).toThrow("1 holders but 0 references")
  })
})

describe("block hashes", () => {
  const root = hashRoot({ modelDigest: "m", tenant: "t", cacheSalt: undefined })

  it("name the whole prefix: equal up to the first difference, and different after it for ever", () => {
    fc.assert(
      fc.property(fc.array(fc.nat(5), { minLength: 4, maxLength: 60 }), fc.nat(), fc.integer({ min: 1, max: 8 }), (tokens, place, blockTokens) => {
        const changed = [...tokens]
        changed[place % tokens.length]!++
        const [left, right] = [chainHashes(root, Int32Array.from(tokens), blockTokens), chainHashes(root, Int32Array.from(changed), blockTokens)]
        expect(left).toHaveLength(Math.floor(tokens.length / blockTokens))
        const same = Math.floor((place % tokens.length) / blockTokens)
        left.forEach((hash, i) => expect(hash === right[i]).toBe(i < same))
      }),
    )
  })

  it("keep models, tenants and salts apart, and do not depend on where the tokens lie in memory", () => {
    const roots = [root, hashRoot({ modelDigest: "n", tenant: "t", cacheSalt: undefined }), hashRoot({ modelDigest: "m", tenant: "u", cacheSalt: undefined }), hashRoot({ modelDigest: "m", tenant: "t", cacheSalt: "s" }), hashRoot({ modelDigest: "m", tenant: "t", cacheSalt: "null" }), hashRoot({ modelDigest: "m", tenant: undefined, cacheSalt: undefined }), hashRoot({ modelDigest: "m", tenant: "null", cacheSalt: undefined })]
    expect(new Set(roots.map((other) => blockHash(other, Int32Array.of(1, 2)))).size).toBe(roots.length)
    expect(blockHash(root, Int32Array.of(0, 1, 2, 3).subarray(1, 3))).toBe(blockHash(root, Int32Array.of(1, 2)))
    expect(root).toHaveLength(16)
  })
})
