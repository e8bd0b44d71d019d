/** When a request whose work has failed is placed again, and when it fails. */
import { describe, expect, it } from "vitest"
import { limits } from "../../config/limits.ts"
import { Recovery } from "../../actors/request/recovery.ts"
import { Fault, type FaultCode } from "../../actors/runtime/fault.ts"

const fault = (code: FaultCode, hop = "decode w0") => new Fault({ code, message: code, hop })

/** Placed, and failed at once; how long until it is placed again. */
const fail = (recovery: Recovery, code: FaultCode, nowMs = 0): number | undefined => {
  recovery.placements++
  recovery.failedAt("w0", fault(code))
  return recovery.delayMs(fault(code), nowMs)
}

describe("a request whose work has failed", () => {
  it("is placed again later and later, elsewhere, and not more often than the bound", () => {
    const recovery = new Recovery("request r0", 0)
    const delays = Array.from({ length: limits.placementAttempts }, () => fail(recovery, "disconnected"))
    expect(delays).toEqual([...Array.from({ length: limits.placementAttempts - 1 }, (_, i) => Math.min(limits.restartDelayMs * 2 ** i, limits.heartbeatIntervalMs)), undefined])
    expect(recovery.exclude).toContain("w0")
    expect(recovery.movedFrom).toBeUndefined()
  })

  it.each(["invalid_request", "context_length_exceeded", "cancelled", "internal", "overloaded"] as const)("fails with %s", (code) => {
    expect(fail(new Recovery("request r0", 0), code)).toBeUndefined()
  })

  it("waits for somebody to serve without counting that, but not for ever", () => {
    const recovery = new Recovery("request r0", 0)
    for (let nowMs = 0; nowMs <= limits.recoveryDeadlineMs; nowMs += limits.heartbeatIntervalMs) expect(recovery.delayMs(fault("unavailable", "scheduler"), nowMs)).toBeLessThanOrEqual(limits.heartbeatIntervalMs)
    expect(recovery.delayMs(fault("unavailable", "scheduler"), limits.recoveryDeadlineMs + 1)).toBeUndefined()
  })

  it("has the time to recover anew after each token", () => {
    const recovery = new Recovery("request r0", 0)
    expect(fail(recovery, "disconnected", 0)).toBe(limits.restartDelayMs)
    recovery.progressed()
    expect(fail(recovery, "disconnected", limits.recoveryDeadlineMs + 1)).toBe(limits.restartDelayMs)
  })
})

describe("a request that is given away", () => {
  it("is placed again at once, with the worker that had it as the one that holds its KV, and may fail as often as before", () => {
    const recovery = new Recovery("request r0", 0)
    for (let i = 0; i < limits.movesPerRequest; i++) {
      expect(fail(recovery, "moved")).toBe(0)
      expect(recovery.movedFrom).toBe("w0")
      recovery.progressed()
      expect(recovery.movedFrom).toBeUndefined()
    }
    expect(recovery.exclude).toEqual([])
    for (let i = 1; i < limits.placementAttempts; i++) expect(fail(recovery, "disconnected")).toBeGreaterThan(0)
    expect(fail(recovery, "disconnected")).toBeUndefined()
  })

  it("is placed again later and later where nobody keeps it, and at the bound of moves that is a failure like another", () => {
    const recovery = new Recovery("request r0", 0)
    const delays = Array.from({ length: 6 }, () => fail(recovery, "moved"))
    expect(delays[0]).toBe(0)
    expect(delays.slice(1).every((delayMs, i) => delayMs === Math.min(limits.restartDelayMs * 2 ** (i + 1), limits.heartbeatIntervalMs))).toBe(true)
    let placements = 6
    while (fail(recovery, "moved") !== undefined) placements++
    expect(placements + 1).toBe(limits.movesPerRequest + limits.placementAttempts)
  })

  it("has a number for each placement, over all attempts of the gateway, that is larger than those before", () => {
    const numbers: Array<number> = []
    for (let attempt = 0; attempt < 3; attempt++) {
      const recovery = new Recovery("request r0", attempt)
      do numbers.push(recovery.attempt)
      while (fail(recovery, numbers.length % 3 === 0 ? "disconnected" : "moved") !== undefined)
    }
    expect(numbers.length).toBeGreaterThan(3 * limits.placementAttempts)
    numbers.slice(1).forEach((number, i) => expect(number).toBeGreaterThan(numbers[i]!))
  })

  it("is asked for again where whoever placed it, or was meant, is over; but where its request actor is, it is another's", () => {
    const recovery = new Recovery("request r0", 0)
    expect(recovery.delayMs(fault("stale", "decode w0"), 0)).toBe(0)
    recovery.progressed()
    expect(recovery.delayMs(fault("stale", "scheduler s0"), 0)).toBe(0)
    recovery.progressed()
    expect(recovery.delayMs(fault("stale", "request r0"), 0)).toBeUndefined()
  })
})
