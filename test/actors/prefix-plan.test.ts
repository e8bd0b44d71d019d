/** Where a prefix comes from. */
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { prefillMs, type PrefillCost } from "../../actors/cost/prefill-cost.ts"
import { transferMs } from "../../actors/cost/transfer-cost.ts"
import { isWorthParking } from "../../actors/prefill/parking.ts"
import { planPrefix, type PrefixNeed, type PrefixOffer } from "../../actors/prefill/prefix-plan.ts"

const need: PrefixNeed = { tokens: 2_000, computedTokens: 0, blockTokens: 16, blockBytes: 1e6, queuedTokens: 0, stepTokens: 512 }
const prefill: PrefillCost = { stepMs: 1, tokenMs: 0.3, pairMs: 0.0001 }
const inMemory = (blocks: number) => Array.from({ length: blocks }, () => false)
const onDisk = (blocks: number) => Array.from({ length: blocks }, () => true)
/** 1 ms and so much for each block. */
const offer = (source: string, disk: ReadonlyArray<boolean>, memoryMs: number, diskMs = memoryMs): PrefixOffer => ({ source, onDisk: disk, cost: { latencyMs: 1, memoryMsPerMb: memoryMs, diskMsPerMb: diskMs } })
const chosen = (...args: Parameters<typeof planPrefix>) => {
  const { offer: found, blocks } = planPrefix(...args)
  return [found?.source, blocks]
}

describe("a prefix", () => {
  it("comes from where the sequence goes on soonest: the nearest of two that have the same, the one that has much more of it", () => {
    expect(chosen(need, [offer("store", inMemory(100), 1), offer("peer", inMemory(100), 0.5)], prefill)).toEqual(["peer", 100])
    expect(chosen(need, [offer("store", inMemory(120), 1), offer("peer", inMemory(20), 0.5)], prefill)).toEqual(["store", 120])
    expect(chosen(need, [], prefill)).toEqual([undefined, 0])
  })

  it("is computed where that is sooner", () => {
    expect(chosen(need, [offer("store", inMemory(100), 30)], prefill)).toEqual([undefined, 0])
    expect(chosen({ ...need, tokens: 20 }, [offer("store", inMemory(1), 6)], prefill)).toEqual([undefined, 0])
  })

  it("comes in part where the disk, which has the rest, is slower than computing it", () => {
    expect(chosen(need, [offer("store", [...inMemory(40), ...onDisk(60)], 1, 50)], prefill)).toEqual(["store", 40])
    expect(chosen(need, [offer("store", [...inMemory(40), ...onDisk(60)], 1, 2)], prefill)).toEqual(["store", 100])
  })

  it("comes while others' prompts are computed, though it would be slower alone", () => {
    const slow = [offer("store", inMemory(100), 8)]
    expect(chosen(need, slow, prefill)).toEqual([undefined, 0])
    expect(chosen({ ...need, queuedTokens: 4_000 }, slow, prefill)).toEqual(["store", 100])
  })

  it("comes, as much of it as there is, as long as nobody knows what computing takes", () => {
    expect(chosen(need, [offer("store", inMemory(3), 1_000), offer("peer", inMemory(4), 2_000), offer("other", inMemory(4), 1_500)], undefined)).toEqual(["other", 4])
    expect(chosen(need, [], undefined)).toEqual([undefined, 0])
  })

  it("comes by the best of all ways that there are: no part of any offer would be sooner", () => {
    const costs = fc.record({ latencyMs: fc.double({ min: 0, max: 50, noNaN: true }), memoryMsPerMb: fc.double({ min: 0, max: 20, noNaN: true }), diskMsPerMb: fc.double({ min: 0, max: 20, noNaN: true }) })
    // The store's blocks that were not used for long are on disk only, mostly the last ones of a chain.
    const offers = fc.array(fc.record({ source: fc.string(), cost: costs, onDisk: fc.tuple(fc.nat(30), fc.nat(30)).map(([memory, disk]) => [...inMemory(memory), ...onDisk(disk)]) }), { maxLength: 3 })
    const prefills = fc.record({ stepMs: fc.double({ min: 0, max: 20, noNaN: true }), tokenMs: fc.double({ min: 0, max: 2, noNaN: true }), pairMs: fc.double({ min: 0, max: 0.01, noNaN: true }) })
    fc.assert(
      fc.property(offers, prefills, fc.nat(500), fc.nat(5), (offers, cost, queuedTokens, computed) => {
        const of = { ...need, tokens: 16 * 66, computedTokens: 16 * computed, queuedTokens, stepTokens: 1e9 }
        const { planMs, computeMs } = planPrefix(of, offers, cost)
        const queuedMs = prefillMs(cost, { newTokens: queuedTokens, prefixTokens: 0 }, 1e9)
        const rest = (prefixTokens: number) => prefillMs(cost, { newTokens: of.tokens - prefixTokens, prefixTokens }, 1e9)
        expect(computeMs).toBe(queuedMs + rest(of.computedTokens))
        let best = computeMs!
        for (const { onDisk: disk, cost: way } of offers) {
          for (let blocks = 1; blocks <= disk.length; blocks++) {
            const fromDisk = disk.slice(0, blocks).filter((is) => is).length
            const moved = transferMs(way, { memory: (blocks - fromDisk) * of.blockBytes, disk: fromDisk * of.blockBytes })
            best = Math.min(best, Math.max(queuedMs, moved) + rest(of.computedTokens + 16 * blocks))
          }
        }
        // Behind a queue a part may end anywhere; the estimate is then at most the step's grain off.
        expect(planMs!).toBeLessThanOrEqual(best * (queuedTokens === 0 ? 1 + 1e-9 : 2))
        expect(planMs!).toBeLessThanOrEqual(computeMs!)
      }),
    )
  })
})

describe("KV that a sequence gives away", () => {
  const kv = { dtype: "f16", blockTokens: 16, layers: 1, layerBlockBytes: 1e6 } as const
  const transfer = () => ({ latencyMs: 2, memoryMsPerMb: 1, diskMsPerMb: 1 })

  it("is worth parking where it comes back sooner than it is computed", () => {
    expect(isWorthParking(10, kv, { prefill, transfer })).toBe(true)
    expect(isWorthParking(10, kv, { prefill: { stepMs: 0, tokenMs: 0.01, pairMs: 0 }, transfer })).toBe(false)
    expect(isWorthParking(0, kv, { prefill, transfer })).toBe(false)
    expect(isWorthParking(10, kv, { prefill: undefined, transfer })).toBe(true)
  })
})
