/** Who is known to serve, from what everybody says of themselves. */
import { afterEach, beforeEach, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { Presence, type PresenceMessage } from "../../actors/messages/presence.ts"
import { presenceSubject } from "../../actors/messages/subjects.ts"
import { Members } from "../../actors/presence/members.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { testScope, type TestScope } from "../support/scoped.ts"

let scope: TestScope
beforeEach(() => void (scope = testScope()))
afterEach(() => scope.close())

it("tells once of each that comes, or comes back under a later epoch, and of each that goes", async () => {
  const bus = new MemoryBus()
  const members = await scope.start(Members.listen(bus, "main"))
  const told: Array<string> = []
  members.onCome((kind, id, epoch) => void told.push(`${kind} ${id} ${epoch} comes`))
  members.onGone((kind, id, epoch) => void told.push(`${kind} ${id} ${epoch} goes`))
  const say = async (kind: PresenceMessage["kind"], epoch: number, state: PresenceMessage["state"] = "serving") => {
    bus.publish(presenceSubject("main"), Presence.encode({ kind, id: "x", node: "here", pid: 1, epoch, state }))
    await new Promise((resolve) => setImmediate(resolve))
  }
  for (const epoch of [1, 1, 2, 1, 2]) await say("scheduler", epoch) // the fourth is an earlier one's last words
  await say("worker", 7)
  await say("scheduler", 2, "leaving")
  await say("scheduler", 2)
  expect(told).toEqual(["scheduler x 1 comes", "scheduler x 1 goes", "scheduler x 2 comes", "worker x 7 comes", "scheduler x 2 goes", "scheduler x 2 comes"])
  expect(members.all.map(({ kind, epoch }) => [kind, epoch])).toEqual([
    ["scheduler", 2],
    ["worker", 7],
  ])
})

it("takes a member for gone that was silent for so many beats, and nobody because this process itself was stopped", async () => {
  vi.useFakeTimers({ toFake: ["setInterval", "clearInterval", "performance"] })
  try {
    const bus = new MemoryBus()
    const members = await scope.start(Members.listen(bus, "main"))
    const gone: Array<string> = []
    members.onGone((_, id) => void gone.push(id))
    const say = async (id: string) => {
      bus.publish(presenceSubject("main"), Presence.encode({ kind: "worker", id, node: "here", pid: 1, epoch: 1, state: "serving" }))
      await new Promise((resolve) => setImmediate(resolve))
    }
    for (const id of ["silent", "heard"]) await say(id)
    for (let beat = 0; beat * limits.heartbeatIntervalMs < limits.heartbeatSilenceMs; beat++) {
      vi.advanceTimersByTime(limits.heartbeatIntervalMs)
      await say("heard")
    }
    expect(gone).toEqual([])
    vi.advanceTimersByTime(limits.heartbeatIntervalMs)
    expect(gone).toEqual(["silent"])
    const now = performance.now()
    vi.spyOn(performance, "now").mockReturnValue(now + 100 * limits.heartbeatSilenceMs)
    vi.advanceTimersByTime(limits.heartbeatIntervalMs)
    expect(gone).toEqual(["silent"])
  } finally {
    vi.useRealTimers()
    vi.restoreAllMocks()
  }
})
