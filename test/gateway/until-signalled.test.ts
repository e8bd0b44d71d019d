import { setTimeout as sleep } from "node:timers/promises"
import { Deferred, Effect } from "effect"
import { afterEach, beforeEach, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { untilSignalled } from "../../gateway/until-signalled.ts"

let said: ReadonlyArray<string>
beforeEach(() => {
  said = []
  vi.spyOn(process.stdout, "write").mockImplementation((line) => (said = [...said, String(line).trim()]).length > 0)
})
afterEach(() => vi.restoreAllMocks())

const signal = (name: "SIGINT" | "SIGTERM") => process.emit(name, name)
/** A command that runs, what has closed, and its exit code. */
const start = (leave?: Effect.Effect<void>) => {
  const events: Array<string> = []
  const main = Effect.andThen(Effect.addFinalizer(() => Effect.sync(() => void events.push("closed"))), Effect.never)
  const code = untilSignalled(main, leave).finally(() => events.push("ended"))
  return { events, code }
}

it("a signal closes what runs, in order also where another one comes, and ends with code 0", async () => {
  const { events, code } = start()
  signal("SIGTERM")
  signal("SIGINT")
  expect(await code).toBe(0)
  expect([events, said]).toEqual([["closed", "ended"], ["SIGTERM: stopping"]])
})

it("what leaves first does so while everything runs", async () => {
  const left = Deferred.makeUnsafe<void>()
  const { events, code } = start(Deferred.await(left))
  signal("SIGINT")
  while (said.length === 0) await sleep(1)
  expect(events).toEqual([])
  Effect.runSync(Deferred.succeed(left, undefined))
  expect(await code).toBe(0)
  expect(said).toEqual(["SIGINT: leaving; a second signal stops it at once", "SIGINT: stopping"])
})

it("a second signal cuts the leaving short; the same one that comes by a process group's other way is none", async () => {
  const { events, code } = start(Effect.never)
  signal("SIGTERM")
  signal("SIGTERM")
  await sleep(limits.groupSignalMs + 10)
  expect(events).toEqual([])
  signal("SIGTERM")
  expect(await code).toBe(0)
  expect(events).toEqual(["closed", "ended"])
})

it("one more during the shutdown ends the process", async () => {
  const exit = vi.spyOn(process, "exit").mockImplementation((() => {}) as never)
  const closed = Deferred.makeUnsafe<void>()
  const code = untilSignalled(Effect.andThen(Effect.addFinalizer(() => Deferred.await(closed)), Effect.never))
  signal("SIGTERM")
  while (said.length === 0) await sleep(1)
  signal("SIGTERM")
  expect(exit).not.toHaveBeenCalled()
  await sleep(limits.groupSignalMs + 10)
  signal("SIGTERM")
  expect(exit).toHaveBeenCalledWith(1)
  Effect.runSync(Deferred.succeed(closed, undefined))
  expect(await code).toBe(0)
})
