/** Who leads a cluster, on a bucket in memory and clocks of the test's. */
import { beforeEach, expect, it } from "vitest"
import { Lease } from "../../actors/cluster/lease.ts"
import { MemoryBucket, MemoryKeys } from "../support/memory-bucket.ts"

const leaseMs = 5_000
let keys: MemoryKeys
beforeEach(() => {
  keys = new MemoryKeys()
})

interface Candidate {
  readonly lease: Lease
  readonly bucket: MemoryBucket
  nowMs: number
}

/** Each has a clock of its own. */
const candidate = (node: string, nowMs: number): Candidate => {
  const bucket = new MemoryBucket(keys)
  const made: Candidate = { bucket, nowMs, lease: new Lease({ bucket, node, epoch: 1, leaseMs, nowMs: () => made.nowMs }) }
  return made
}

it("of several that begin at once one leads, and it stays", async () => {
  const all = [candidate("a", 0), candidate("b", 1e9), candidate("c", 55)]
  for (let beat = 0; beat < 30; beat++) {
    await Promise.all(all.map(({ lease }) => lease.beat()))
    expect(all.map(({ lease }) => lease.held)).toEqual([true, false, false])
    for (const one of all) one.nowMs += 500
  }
})

it("a leader that falls silent is followed once its lease is over, by exactly one", async () => {
  const [a, b, c] = [candidate("a", 0), candidate("b", 7_000), candidate("c", 3)]
  await a.lease.beat()
  await b.lease.beat()
  await c.lease.beat()
  for (let ms = 500; ms < leaseMs; ms += 500) {
    for (const one of [b, c]) {
      one.nowMs += 500
      await one.lease.beat()
      expect(one.lease.held).toBe(false)
    }
  }
  for (const one of [b, c]) {
    one.nowMs += 500
    await one.lease.beat()
  }
  expect([b.lease.held, c.lease.held]).toEqual([true, false])
})

it("a leader that cannot renew does not lead any more before another may, and follows when it is back", async () => {
  const [a, b] = [candidate("a", 0), candidate("b", 0)]
  await a.lease.beat()
  await b.lease.beat()
  a.bucket.cut = true
  for (let ms = 500; ms <= 2 * leaseMs; ms += 500) {
    for (const one of [a, b]) {
      one.nowMs += 500
      await one.lease.beat().catch(() => {})
    }
    expect(a.lease.held && b.lease.held).toBe(false)
  }
  expect([a.lease.held, b.lease.held]).toEqual([false, true])
  a.bucket.cut = false
  await a.lease.beat()
  expect([a.lease.held, b.lease.held]).toEqual([false, true])
})

it("a leader that leaves is followed at once", async () => {
  const [a, b] = [candidate("a", 0), candidate("b", 0)]
  await a.lease.beat()
  await b.lease.beat()
  await a.lease.resign()
  expect(a.lease.held).toBe(false)
  await b.lease.beat()
  expect(b.lease.held).toBe(true)
})

it("a write whose answer is lost does not make two leaders", async () => {
  const [a, b] = [candidate("a", 0), candidate("b", 0)]
  await a.lease.beat()
  const put = a.bucket.put.bind(a.bucket)
  a.bucket.put = async (key, value, revision) => {
    await put(key, value, revision)
    throw new Error("no answer")
  }
  a.nowMs += 500
  await expect(a.lease.beat()).rejects.toThrow("no answer")
  a.bucket.put = put
  for (let ms = 0; ms < 3 * leaseMs; ms += 500) {
    for (const one of [a, b]) {
      one.nowMs += 500
      await one.lease.beat()
    }
    expect(a.lease.held && b.lease.held).toBe(false)
  }
  expect(a.lease.held || b.lease.held).toBe(true)
})
