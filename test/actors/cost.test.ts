/** What steps and transfers are believed to take, from what they took. */
import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { coefficientsOf, emptyFit, withSample, type Belief, type Fading } from "../../actors/cost/linear-fit.ts"
import { MeasuredCosts } from "../../actors/cost/measured-costs.ts"
import { prefillMs, type PrefillCost } from "../../actors/cost/prefill-cost.ts"
import { transferMs } from "../../actors/cost/transfer-cost.ts"
import { limits } from "../../config/limits.ts"

const steps = 512
/** Within a share of what it should be. */
const near = (found: number, expected: number, share: number) => expect(Math.abs(found - expected)).toBeLessThanOrEqual(share * expected)

describe("a fit", () => {
  const fading: Fading = { halfLifeSamples: 32, halfLifeMs: 60_000 }
  const prior: ReadonlyArray<Belief> = [
    { value: 1, deviation: 10 },
    { value: 1, deviation: 10 },
  ]

  it("is its prior where nothing was measured, and what was measured where there is enough of it", () => {
    fc.assert(
      fc.property(fc.double({ min: 0.1, max: 20, noNaN: true }), fc.double({ min: 0.1, max: 20, noNaN: true }), fc.infiniteStream(fc.double({ min: 0.5, max: 50, noNaN: true })), (fixed, each, amounts) => {
        let fit = emptyFit(2, 0)
        expect(coefficientsOf(fit, prior, fading, 0)).toEqual([1, 1])
        for (let i = 0; i < 40; i++) {
          const amount = i % 2 === 0 ? 0.5 : amounts.next().value!
          fit = withSample(fit, [1, amount], fixed + each * amount, fading, 0)
        }
        const [a, b] = coefficientsOf(fit, prior, fading, 0) as [number, number]
        for (const amount of [0.5, 50]) near(a + b * amount, fixed + each * amount, 0.25)
      }),
      { numRuns: 100 },
    )
  })

  it("never has a negative coefficient, whatever was measured", () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.double({ min: 0, max: 1e6, noNaN: true }), fc.double({ min: 0, max: 1e6, noNaN: true })), { maxLength: 60 }), (samples) => {
        let fit = emptyFit(2, 0)
        for (const [amount, ms] of samples) fit = withSample(fit, [1, amount], ms, fading, 0)
        for (const value of coefficientsOf(fit, prior, fading, 0)) expect(value).toBeGreaterThanOrEqual(0)
      }),
    )
  })

  it("follows what changes, and goes back to its prior when nothing is measured for long", () => {
    let fit = emptyFit(2, 0)
    const measure = (ms: number, times: number, nowMs: number) => {
      for (let i = 0; i < times; i++) fit = withSample(fit, [1, i % 7], ms, fading, nowMs)
    }
    const at = (nowMs: number) => {
      const [a, b] = coefficientsOf(fit, prior, fading, nowMs) as [number, number]
      return a + 3 * b
    }
    measure(100, 40, 0)
    near(at(0), 100, 0.1)
    measure(10, 200, 1_000)
    near(at(1_000), 10, 0.1)
    near(at(60 * 60_000), 4, 0.01) // the prior's 1 + 3
  })
})

describe("what a worker has measured", () => {
  const real: PrefillCost = { stepMs: 3, tokenMs: 0.33, pairMs: 0.0002 }
  const learnt = (cost: PrefillCost) => {
    const costs = new MeasuredCosts(() => 0)
    expect(costs.prefill).toBeUndefined()
    for (const [newTokens, prefixTokens] of [[512, 0], [300, 512], [40, 0], [512, 0], [512, 512], [512, 1024], [17, 1500], [200, 3000]] as const) {
      const work = [{ newTokens, prefixTokens }]
      costs.prefilled({ work, ms: prefillMs(cost, work[0]!, steps) })
    }
    return costs.prefill!
  }

  it("tells what a prompt takes: tokens and attention to what is before them, on models a thousand times apart", () => {
    for (const scale of [0.01, 1, 100]) {
      const cost = { stepMs: scale * real.stepMs, tokenMs: scale * real.tokenMs, pairMs: scale * real.pairMs }
      const found = learnt(cost)
      for (const work of [{ newTokens: 100, prefixTokens: 0 }, { newTokens: 2_000, prefixTokens: 0 }, { newTokens: 16, prefixTokens: 4_000 }, { newTokens: 4_000, prefixTokens: 100 }]) {
        near(prefillMs(found, work, steps), prefillMs(cost, work, steps), 0.15)
      }
    }
    expect(prefillMs(real, { newTokens: 0, prefixTokens: 500 }, steps)).toBe(0)
  })

  it("has an opinion after one step, in which attention costs more the longer the prompt", () => {
    const costs = new MeasuredCosts(() => 0)
    costs.prefilled({ work: [{ newTokens: 512, prefixTokens: 0 }], ms: 200 })
    const ms = (newTokens: number, prefixTokens: number) => prefillMs(costs.prefill!, { newTokens, prefixTokens }, steps)
    near(ms(512, 0), 200, 0.1)
    expect(ms(512, 4_000)).toBeGreaterThan(ms(512, 0))
    expect(ms(4_000, 0)).toBeGreaterThan(8 * ms(500, 0))
  })

  it("tells sources apart, and memory from disk, and forgets the source that was used longest ago", () => {
    const costs = new MeasuredCosts(() => 0)
    for (let i = 1; i <= 20; i++) {
      costs.moved("store", { memory: i * 1e6, disk: 0, ms: 1 + i })
      costs.moved("store", { memory: 0, disk: i * 1e6, ms: 1 + 10 * i })
      costs.moved("prefill p1", { memory: i * 1e6, disk: 0, ms: 20 + 50 * i })
    }
    near(transferMs(costs.transfer("store"), { memory: 30e6, disk: 0 }), 31, 0.15)
    near(transferMs(costs.transfer("store"), { memory: 0, disk: 30e6 }), 301, 0.15)
    near(transferMs(costs.transfer("prefill p1"), { memory: 30e6, disk: 0 }), 1_520, 0.15)
    const unknown = costs.transfer("never seen")
    for (let i = 0; i < limits.costSources; i++) costs.moved(`other ${i}`, { memory: 1e6, disk: 0, ms: 1 })
    expect(costs.transfer("prefill p1")).toEqual(unknown)
  })
})
