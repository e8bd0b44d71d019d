/** What a node runs of an assignment, and when. */
import { expect, it } from "vitest"
import { missingOf, partOf, type PartOptions } from "../../actors/cluster/part.ts"
import type { PresenceMessage } from "../../actors/messages/presence.ts"
import type { PlannedComponent, System } from "../../actors/node/system.ts"
import type { Role } from "../../config/topology.ts"

const worker = (id: string, roles: ReadonlyArray<Role> = ["prefill", "decode"], generation = "g1"): PlannedComponent => ({ generation, kind: "worker", id, host: "process", roles, live: {}, fixed: {} })
const request = (id: string, generation = "g1"): PlannedComponent => ({ generation, kind: "request", id, host: "process", roles: [], live: {}, fixed: {} })
const system = (components: ReadonlyArray<PlannedComponent>, generation: string | undefined = "g1"): System => ({ bus: "nats", generation: generation === undefined ? undefined : { id: generation, label: generation }, components, listen: { port: 1 } })
const placed = (...where: ReadonlyArray<readonly [PlannedComponent, string]>): PartOptions["assignment"] => ({
  wantedRevision: 1, wanted: { text: "", path: "/x" }, model: "", drained: [], unplaceable: [], components: where.map(([{ kind, id }, node]) => ({ kind, id, node, epoch: 1 })),
})
const heard = (component: PlannedComponent, agent: string): PresenceMessage => ({
  kind: component.kind, id: component.id, node: "m", pid: 1, epoch: 1, state: "serving", agent,
  ...(component.kind === "worker" ? { worker: { roles: component.roles, device: "cpu", load: { sequences: 0, waiting: 0, maxBatch: 1, preemptions: 0 }, kv: { blocks: 1, freeBlocks: 1, blockTokens: 16, bytesPerToken: 1, dtype: "f16", format: "" }, transfers: { completed: 0, failed: 0, fallbacks: 0, bytes: 0, ms: 0 } } } : {}),
})
const namesOf = ({ components }: System) => components.map(({ generation, kind, id, roles }) => [generation, kind, id, ...roles].join(" "))

it("what is new starts at once, and what is gone stops only when everything serves, on all nodes", () => {
  const [w0, w1, r0] = [worker("w0"), worker("w1"), request("r0")]
  const options = { node: "a", gateway: false, assignment: placed([w0, "a"], [r0, "b"]), whole: system([w0, r0]), actual: system([w1, r0]), heard: [] }
  expect(namesOf(partOf({ ...options, complete: false }))).toEqual(["g1 worker w0 prefill decode", "g1 worker w1 prefill decode", "g1 request r0"])
  expect(namesOf(partOf({ ...options, complete: true }))).toEqual(["g1 worker w0 prefill decode"])
})

it("a worker that is placed on another node leaves at once, and its successor waits until it is silent", () => {
  const w0 = worker("w0")
  const assignment = placed([w0, "b"])
  const before = partOf({ node: "a", gateway: false, assignment, whole: system([w0]), actual: system([w0]), heard: [heard(w0, "a")], complete: false })
  expect(namesOf(before)).toEqual([])
  const after = (said: ReadonlyArray<PresenceMessage>) => namesOf(partOf({ node: "b", gateway: false, assignment, whole: system([w0]), actual: system([]), heard: said, complete: false }))
  expect(after([heard(w0, "a")])).toEqual([])
  expect(after([])).toEqual(["g1 worker w0 prefill decode"])
})

it("a request actor is there twice for a moment", () => {
  const r0 = request("r0")
  const part = partOf({ node: "b", gateway: false, assignment: placed([r0, "b"]), whole: system([r0]), actual: system([]), heard: [heard(r0, "a")], complete: false })
  expect(namesOf(part)).toEqual(["g1 request r0"])
})

it("roles are gained on all nodes before any are lost", () => {
  const options = { node: "a", gateway: false, assignment: placed([worker("w0"), "a"]), whole: system([worker("w0", ["decode"])]), actual: system([worker("w0", ["prefill"])]), heard: [] }
  expect(namesOf(partOf({ ...options, complete: false }))).toEqual(["g1 worker w0 prefill decode"])
  expect(namesOf(partOf({ ...options, complete: true }))).toEqual(["g1 worker w0 decode"])
})

it("new requests go to another generation, and the gateway listens elsewhere, when all of it serves", () => {
  const [old, next] = [worker("w0", ["decode"], "g1"), worker("w0", ["decode"], "g2")]
  const options = { node: "a", gateway: true, assignment: placed([next, "a"]), whole: { ...system([next], "g2"), listen: { port: 2 } }, actual: system([old]), heard: [] }
  expect(partOf({ ...options, complete: false })).toMatchObject({ generation: { id: "g1" }, listen: { port: 1 } })
  expect(namesOf(partOf({ ...options, complete: false }))).toEqual(["g2 worker w0 decode", "g1 worker w0 decode"])
  expect(partOf({ ...options, complete: true })).toMatchObject({ generation: { id: "g2" }, listen: { port: 2 } })
  expect(partOf({ ...options, complete: true, gateway: false }).listen).toBeUndefined()
})

it("complete is what serves on its own node, with its roles", () => {
  const w0 = worker("w0", ["decode"])
  const missing = (said: ReadonlyArray<PresenceMessage>) => missingOf({ assignment: placed([w0, "a"]), whole: system([w0]), heard: said }).map(({ id }) => id)
  expect(missing([])).toEqual(["w0"])
  expect(missing([heard(w0, "b")])).toEqual(["w0"])
  expect(missing([heard(worker("w0", ["prefill"]), "a")])).toEqual(["w0"])
  expect(missing([heard(worker("w0"), "a")])).toEqual([])
})
