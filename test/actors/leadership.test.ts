/** What a cluster's leader decides, on a bus and a bucket in memory and a clock of the test's. */
import { afterEach, beforeEach, expect, it, vi } from "vitest"
import { clusterKeys } from "../../actors/cluster/cluster-keys.ts"
import { leadership } from "../../actors/cluster/leadership.ts"
import { Lease } from "../../actors/cluster/lease.ts"
import { Presence } from "../../actors/messages/presence.ts"
import { nodesNamespace, presenceSubject } from "../../actors/messages/subjects.ts"
import { Members } from "../../actors/presence/members.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { limits } from "../../config/limits.ts"
import { MemoryBucket } from "../support/memory-bucket.ts"
import { testScope, type TestScope } from "../support/scoped.ts"

let scope: TestScope
let bus: MemoryBus
let bucket: MemoryBucket
let said: Array<string>
/** Nodes that say that they live. */
let alive: Set<string>

beforeEach(async () => {
  vi.useFakeTimers()
  scope = testScope()
  bus = new MemoryBus()
  bucket = new MemoryBucket()
  said = []
  alive = new Set(["a", "b"])
  const machine = (labels: Record<string, string>) => ({ labels, cores: 2, memoryBytes: 1, components: [], revision: 0, state: "waiting" as const })
  setInterval(() => {
    for (const id of alive) bus.publish(presenceSubject(nodesNamespace("main")), Presence.encode({ kind: "node", id, node: id, pid: 1, epoch: 1, state: "serving", machine: machine({ on: id }) }))
  }, limits.heartbeatIntervalMs)
})
afterEach(async () => {
  await scope.close()
  vi.useRealTimers()
})

const lead = async (fetchModel = async () => ({ name: "m", aliases: [], path: "/m", sha256: "digest" })) => {
  const nodes = await scope.start(Members.listen(bus, nodesNamespace("main"), limits.nodeLossMs))
  const lease = new Lease({ bucket, node: "a", epoch: 1, leaseMs: limits.leaderLeaseMs, nowMs: () => performance.now() })
  await scope.start(leadership({ node: "a", bucket, lease, nodes, fetchModel, heardEpoch: () => undefined, say: (line) => said.push(line) }))
}
const want = async (...workers: ReadonlyArray<object>) => {
  const { revision } = await clusterKeys.wanted.read(bucket)
  await clusterKeys.wanted.write(bucket, { text: JSON.stringify({ penstock: 1, workers }), path: "/wanted.yaml" }, revision)
}
const assigned = async () => (await clusterKeys.assignment.read(bucket)).value
const workersOf = async () => Object.fromEntries((await assigned())?.components.flatMap(({ kind, id, node }) => (kind === "worker" ? [[id, node]] : [])) ?? [])
const pass = (ms: number) => vi.advanceTimersByTimeAsync(ms)

it("assigns what is wanted to the nodes that live, and follows both", async () => {
  await lead()
  await want({ name: "w0", labels: { on: "b" } }, { name: "w1", labels: { on: "a" } })
  await pass(4 * limits.heartbeatIntervalMs)
  expect(await workersOf()).toEqual({ w0: "b", w1: "a" })
  await want({ name: "w1" }, { name: "w2", labels: { on: "b" } })
  await pass(4 * limits.heartbeatIntervalMs)
  expect(await workersOf()).toEqual({ w1: "a", w2: "b" })
  alive.delete("b")
  await pass(limits.nodeLossMs - limits.heartbeatIntervalMs)
  expect(await workersOf()).toEqual({ w1: "a", w2: "b" })
  await pass(3 * limits.heartbeatIntervalMs)
  expect([await workersOf(), (await assigned())!.unplaceable]).toEqual([{ w1: "a" }, [{ kind: "worker", id: "w2", why: "no node fits: a lacks on=b" }]])
  alive.add("b")
  await pass(2 * limits.heartbeatIntervalMs)
  expect(await workersOf()).toEqual({ w1: "a", w2: "b" })
})

it("after an outage of NATS it waits for the nodes to be heard again, and moves nothing", async () => {
  await lead()
  await want({ name: "w0" }, { name: "w1" })
  await pass(4 * limits.heartbeatIntervalMs)
  const before = await assigned()
  expect(Object.values(await workersOf()).sort()).toEqual(["a", "b"])
  bucket.cut = true
  alive.clear()
  await pass(3 * limits.nodeLossMs)
  bucket.cut = false
  alive.add("a")
  // Long enough to lead again, and too short to be lost.
  await pass((limits.leaderLeaseMs + limits.nodeLossMs) / 2)
  alive.add("b")
  await pass(2 * limits.nodeLossMs)
  expect(await assigned()).toEqual(before)
})

it("a topology that cannot be read, or whose model cannot be had, leaves the assignment as it is, is said once, and is tried again", async () => {
  let fails = false
  await lead(async () => {
    if (fails) throw new Error("no such model")
    return { name: "m", aliases: [], path: "/m", sha256: "digest" }
  })
  await want({ name: "w0" })
  await pass(4 * limits.heartbeatIntervalMs)
  const before = await assigned()
  fails = true
  await want({ name: "w1" })
  await pass(10 * limits.heartbeatIntervalMs)
  expect(await assigned()).toEqual(before)
  expect(said.filter((line) => line.includes("no such model"))).toHaveLength(1)
  fails = false
  await pass(8 * limits.reconcileRetryMs)
  expect(Object.keys(await workersOf())).toEqual(["w1"])
  const { revision } = await clusterKeys.wanted.read(bucket)
  await clusterKeys.wanted.write(bucket, { text: "penstock: 2", path: "/wanted.yaml" }, revision)
  await pass(10 * limits.heartbeatIntervalMs)
  expect(Object.keys(await workersOf())).toEqual(["w1"])
  expect(said.filter((line) => line.includes("wanted.yaml:1"))).toHaveLength(1)
})
