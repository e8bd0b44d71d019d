/** A component's process and the agents that come and go: what is written down of it, and how it is taken over. */
import { spawn, type ChildProcess } from "node:child_process"
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from "node:fs"
import { createConnection } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterEach, beforeEach, expect, it, vi } from "vitest"
import { AdoptedChild } from "../../actors/node/adopted-child.ts"
import { ChildControl } from "../../actors/node/child-control.ts"
import { ChildRecords, endProcess, startTimeOf, type ChildRecord } from "../../actors/node/child-records.ts"
import { parseTopology } from "../../config/load-topology.ts"
import { limits } from "../../config/limits.ts"

let folder: string
const children: Array<ChildProcess> = []
const controls: Array<ChildControl> = []
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "penstock-adopt-"))
})
afterEach(() => {
  vi.useRealTimers()
  for (const child of children.splice(0)) child.kill("SIGKILL")
  for (const control of controls.splice(0)) control.close()
  rmSync(folder, { recursive: true, force: true })
})

const recordOf = (pid: number, startedAt: string, control = join(folder, "c.sock")): ChildRecord => ({
  pid,
  startedAt,
  control,
  planned: { generation: "g", kind: "worker", id: "w0", host: "process", roles: ["decode"], live: {}, fixed: {} },
  wanted: { topology: parseTopology("penstock: 1", { path: "/x.yaml" }).topology, model: { name: "m", aliases: [], path: "/m", sha256: "" } },
  nats: { url: "nats://127.0.0.1:1" },
})

const sleeper = (): number => {
  const child = spawn("sleep", ["60"], { stdio: "ignore" })
  children.push(child)
  return child.pid!
}

/** The control socket of this process, as if it were a component's. */
const control = async (id = "w0"): Promise<{ readonly record: ChildRecord; readonly opened: ChildControl; readonly expired: () => number }> => {
  let count = 0
  const record = recordOf(process.pid, startTimeOf(process.pid)!)
  const opened = new ChildControl(record.control, () => ({ type: "hello", pid: process.pid, component: { kind: "worker", id }, epoch: 7, ready: true, blocks: 3 }), () => count++)
  controls.push(opened)
  while (!existsSync(record.control)) await new Promise((resolve) => setTimeout(resolve, 1))
  return { record, opened, expired: () => count }
}

it("what is written down is read again while the process runs, by its user only, and cleared away afterwards", async () => {
  const records = new ChildRecords(join(folder, "run"))
  const pid = sleeper()
  const record = recordOf(pid, startTimeOf(pid)!)
  records.keep(record)
  records.keep(recordOf(process.pid, "another process that had this id before"))
  writeFileSync(join(folder, "run", "1.json"), "{ cut off")
  expect(new ChildRecords(join(folder, "run")).all()).toEqual([record])
  expect(readdirSync(join(folder, "run"))).toEqual([`${pid}.json`])
  expect(statSync(join(folder, "run")).mode & 0o777).toBe(0o700)
  await endProcess(record)
  expect(startTimeOf(pid)).toBeUndefined()
  expect(records.all()).toEqual([])
})

it("a process that took another's id is never ended in its place", async () => {
  const pid = sleeper()
  await endProcess(recordOf(pid, "long ago"))
  expect(startTimeOf(pid)).toBeDefined()
})

it("a process that heeds nothing is killed", async () => {
  const pid = sleeper()
  process.kill(pid, "SIGSTOP")
  await endProcess(recordOf(pid, startTimeOf(pid)!))
  expect(startTimeOf(pid)).toBeUndefined()
})

it("with a supervisor nobody else takes it over; without one who connects does, hears it, and is told of its end", async () => {
  const { record, opened } = await control()
  expect(await AdoptedChild.adopt(record)).toBeUndefined()
  opened.orphaned()
  const child = (await AdoptedChild.adopt(record))!
  expect(child.hello).toMatchObject({ epoch: 7, ready: true, blocks: 3 })
  const heard = new Promise((resolve) => child.on("message", resolve))
  opened.report({ type: "alive" })
  expect(await heard).toEqual({ type: "alive" })
  const ended = new Promise((resolve) => child.once("exit", resolve))
  opened.close()
  await ended
  expect([child.exitCode, child.kill("SIGTERM")]).toEqual([0, false])
})

it("another component, or one that says nothing, is not taken for the one that is looked for", async () => {
  const { record, opened } = await control("w1")
  opened.orphaned()
  expect(await AdoptedChild.adopt(record)).toBeUndefined()
  expect(await AdoptedChild.adopt({ ...record, control: join(folder, "nobody.sock") })).toBeUndefined()
})

it("one that nobody takes over ends after its lease; who takes it over in time stops that, until they go", async () => {
  const { record, opened, expired } = await control()
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] })
  opened.orphaned()
  vi.advanceTimersByTime(limits.orphanLeaseMs - 1)
  const adopter = createConnection(record.control)
  await new Promise((resolve) => adopter.once("data", resolve))
  vi.advanceTimersByTime(3 * limits.orphanLeaseMs)
  expect(expired()).toBe(0)
  const left = new Promise((resolve) => adopter.once("close", resolve))
  adopter.destroy()
  await left
  while (vi.getTimerCount() === 0) await new Promise((resolve) => setImmediate(resolve))
  vi.advanceTimersByTime(limits.orphanLeaseMs)
  expect(expired()).toBe(1)
})
