/** Where the components of a topology run, on a cluster's nodes. */
import fc from "fast-check"
import { expect, it } from "vitest"
import { place, type NodeOffer, type Placed } from "../../actors/cluster/place.ts"
import { componentsOf } from "../../actors/node/component.ts"
import { parseTopology } from "../../config/load-topology.ts"
import type { Topology } from "../../config/topology.ts"

const topologyOf = (...workers: ReadonlyArray<{ readonly name: string; readonly labels?: Record<string, string>; readonly roles?: ReadonlyArray<string> }>): Topology =>
  parseTopology(JSON.stringify({ penstock: 1, workers }), { path: "/wanted.yaml" }).topology

const node = (name: string, labels: Record<string, string> = {}, cores = 2): NodeOffer => ({ name, labels, cores })
const placed = (topology: Topology, nodes: ReadonlyArray<NodeOffer>, previous: Placed["components"] = [], more: { readonly drained?: ReadonlyArray<string>; readonly nowMs?: number } = {}) =>
  place({ topology, nodes, drained: new Set(more.drained), previous, nowMs: more.nowMs ?? 1_000_000 })
const nodeOf = ({ components }: Placed, id: string) => components.find((one) => one.id === id)?.node

it("workers go where their labels match, and what matches nowhere is reported with what each node lacks", () => {
  const topology = topologyOf({ name: "w0", labels: { gpu: "h100" } }, { name: "w1", labels: { gpu: "a100", zone: "b" } }, { name: "w2" })
  const found = placed(topology, [node("n0"), node("n1", { gpu: "h100" }), node("n2", { gpu: "a100", zone: "a" })])
  expect(nodeOf(found, "w0")).toBe("n1")
  expect(nodeOf(found, "w2")).toBe("n0")
  expect(found.unplaceable).toEqual([{ kind: "worker", id: "w1", why: "no node fits: n0 lacks gpu=a100, zone=b; n1 lacks gpu=a100, zone=b; n2 lacks zone=b" }])
})

it("what was placed stays where it is while that node lives and matches", () => {
  const topology = topologyOf({ name: "w0" }, { name: "w1" })
  const first = placed(topology, [node("n0"), node("n1")])
  expect(new Set(["w0", "w1"].map((id) => nodeOf(first, id)))).toEqual(new Set(["n0", "n1"]))
  // A third node, and another worker: only what is new looks for a place, and the new node has the least.
  const wider = topologyOf({ name: "w0" }, { name: "w1" }, { name: "w2" })
  const second = placed(wider, [node("n2"), node("n0"), node("n1")], first.components, { nowMs: 2_000_000 })
  for (const component of first.components) expect(second.components).toContainEqual(component)
  expect(nodeOf(second, "w2")).toBe("n2")
})

it("what runs on a node that leaves moves as if that were drained; where all leave, everything stays", () => {
  const topology = topologyOf({ name: "w0" }, { name: "w1" }, { name: "w2", labels: { zone: "a" } })
  const [n0, n1] = [node("n0", { zone: "a" }), node("n1")]
  const first = placed(topology, [n0, n1])
  const one = placed(topology, [{ ...n0, leaving: true }, n1], first.components)
  expect(new Set(one.components.map((component) => component.node))).toEqual(new Set(["n1"]))
  expect(one.unplaceable).toEqual([{ kind: "worker", id: "w2", why: "no node fits: n0 leaves; n1 lacks zone=a" }])
  expect(placed(topology, [{ ...n0, leaving: true }, { ...n1, leaving: true }], first.components)).toEqual(first)
})

it("a lost or drained node's components move under later epochs, the others stay", () => {
  const topology = topologyOf({ name: "w0" }, { name: "w1" })
  const first = placed(topology, [node("n0"), node("n1")])
  const stays = (found: Placed) => found.components.filter(({ node }) => node === "n1")
  for (const after of [placed(topology, [node("n1")], first.components, { nowMs: 1 }), placed(topology, [node("n0"), node("n1")], first.components, { drained: ["n0"], nowMs: 1 })]) {
    expect(after.components.map(({ node }) => node)).toEqual(after.components.map(() => "n1"))
    for (const component of stays(first)) expect(after.components).toContainEqual(component)
    for (const { kind, id, epoch } of after.components) {
      const before = first.components.find((one) => one.kind === kind && one.id === id)!
      if (before.node === "n0") expect(epoch).toBeGreaterThan(before.epoch)
    }
  }
})

it("a later epoch is later than any that was heard, whatever the clocks say", () => {
  const topology = topologyOf({ name: "w0" })
  const { components } = place({ topology, nodes: [node("n0")], drained: new Set(), previous: [], nowMs: 5, heardEpoch: ({ id }) => (id === "w0" ? 9_000_000 : undefined) })
  expect(components.find(({ id }) => id === "w0")!.epoch).toBeGreaterThan(9_000_000)
})

it("without a node everything is unplaceable, and says what to do", () => {
  const { components, unplaceable } = placed(topologyOf({ name: "w0" }), [])
  expect(components).toEqual([])
  expect(unplaceable.map(({ why }) => why)).toEqual(unplaceable.map(() => "no node lives: start one with the command node"))
  expect(unplaceable.length).toBe(4)
})

const label = fc.dictionary(fc.constantFrom("gpu", "zone"), fc.constantFrom("a", "b"), { maxKeys: 2 })
const cluster = fc.record({
  workers: fc.array(label, { minLength: 1, maxLength: 6 }).map((all) => topologyOf(...all.map((labels, i) => ({ name: `w${i}`, labels })))),
  nodes: fc.uniqueArray(fc.record({ name: fc.constantFrom("n0", "n1", "n2", "n3"), labels: label, cores: fc.integer({ min: 1, max: 64 }) }), { selector: ({ name }) => name, maxLength: 4 }),
  drained: fc.subarray(["n0", "n1", "n2", "n3"]),
})

it("every component is once in one place that fits, or unplaceable where none does; the same each time, in whatever order the nodes come", () => {
  fc.assert(
    fc.property(cluster, cluster, ({ workers: topology, nodes, drained }, earlier) => {
      const before = placed(earlier.workers, earlier.nodes, [], { drained: earlier.drained })
      const found = placed(topology, nodes, before.components, { drained })
      const keys = [...found.components, ...found.unplaceable].map(({ kind, id }) => `${kind} ${id}`)
      expect(keys.sort()).toEqual(componentsOf(topology).flat().map(({ kind, id }) => `${kind} ${id}`).sort())
      const labelsOf = (id: string, kind: string) => Object.entries(kind === "worker" ? topology.workers.find(({ name }) => name === id)!.labels : {})
      const fits = (offer: NodeOffer, id: string, kind: string) => !drained.includes(offer.name) && labelsOf(id, kind).every(([name, value]) => offer.labels[name] === value)
      for (const { kind, id, node: at, epoch } of found.components) {
        expect(fits(nodes.find(({ name }) => name === at)!, id, kind)).toBe(true)
        const last = before.components.find((one) => one.kind === kind && one.id === id)
        const stays = last !== undefined && nodes.some((offer) => offer.name === last.node && fits(offer, id, kind))
        if (stays) expect([at, epoch]).toEqual([last.node, last.epoch])
        else if (last !== undefined) expect(epoch).toBeGreaterThan(last.epoch)
      }
      for (const { kind, id } of found.unplaceable) expect(nodes.some((offer) => fits(offer, id, kind))).toBe(false)
      expect(placed(topology, [...nodes].reverse(), before.components, { drained })).toEqual(found)
    }),
    { numRuns: 50 },
  )
})
