/** How long a node that is told to end stays, on a bus in memory and a clock of the test's. */
import { Deferred, Effect } from "effect"
import { afterEach, beforeEach, expect, it, vi } from "vitest"
import { leave } from "../../actors/cluster/leave.ts"
import { Presence, type NodePresence } from "../../actors/messages/presence.ts"
import { nodesNamespace, presenceSubject } from "../../actors/messages/subjects.ts"
import { Members } from "../../actors/presence/members.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { limits } from "../../config/limits.ts"
import { testScope, type TestScope } from "../support/scoped.ts"

let scope: TestScope
let bus: MemoryBus
let components: number
let closed: Deferred.Deferred<void>
let told: Array<string>

beforeEach(() => {
  vi.useFakeTimers()
  scope = testScope()
  bus = new MemoryBus()
  components = 2
  closed = Deferred.makeUnsafe<void>()
  told = []
})
afterEach(async () => {
  await scope.close()
  vi.useRealTimers()
})

const pass = (ms: number) => vi.advanceTimersByTimeAsync(ms)
const say = async (id: string, state: NodePresence["state"], leaves: "serving" | "leaving" = "serving") => {
  bus.publish(presenceSubject(nodesNamespace("main")), Presence.encode({ kind: "node", id, node: id, pid: 1, epoch: 1, state: leaves, machine: { labels: {}, cores: 2, memoryBytes: 1, components: [], revision: 0, state } }))
  await pass(1)
}
const tell = (word: string) => Effect.sync(() => void told.push(word))
const start = async (drained: ReadonlyArray<string> = []) => {
  const nodes = await scope.start(Members.listen(bus, nodesNamespace("main"), 2 * limits.drainDeadlineMs))
  for (const id of ["a", "b"]) await say(id, "settled")
  const left = leave({ node: "a", nodes, drained: Effect.succeed(new Set(drained)), announced: tell("says that it leaves"), runsNothing: () => components === 0, closeFront: Effect.andThen(tell("closes its front"), Deferred.await(closed)) })
  void Effect.runPromise(Effect.andThen(left, tell("has left")))
  await pass(1)
}
const leaving = ["says that it leaves", "closes its front"]

it("it stays until others run what it ran, and its gateway's last request has ended", async () => {
  await start()
  components = 0
  await pass(1_000)
  expect(told).toEqual(leaving)
  Effect.runSync(Deferred.succeed(closed, undefined))
  await pass(1)
  expect(told).toEqual([...leaving, "has left"])
})

it("it stays no longer than a drain may take", async () => {
  await start()
  await pass(limits.drainDeadlineMs - 10)
  expect(told).toEqual(leaving)
  await pass(10)
  expect(told).toEqual([...leaving, "has left"])
})

it.each([["leaves too", "serving"], ["has gone", "leaving"]] as const)("it stays no longer where the only other node %s", async (_, state) => {
  await start()
  await pass(1_000)
  expect(told).toEqual(leaving)
  await say("b", "leaving", state)
  await pass(100)
  expect(told).toEqual([...leaving, "has left"])
})

it("it does not stay, and its gateway serves to the end, where the only other node is drained", async () => {
  await start(["b"])
  expect(told).toEqual(["says that it leaves", "has left"])
})
