/**
 * Which node runs what: workers where their labels match, everything where it already is while that is possible, and else
 * where least runs for each core.
 */
import type { Topology } from "../../config/topology.ts"
import { componentsOf, type Component } from "../node/component.ts"
import type { PlacedComponent, Unplaceable } from "./assignment.ts"

/** A node that lives. */
export interface NodeOffer {
  readonly name: string
  readonly labels: Readonly<Record<string, string>>
  readonly cores: number
  /** It is about to end. */
  readonly leaving?: boolean
}

export interface PlaceOptions {
  readonly topology: Topology
  readonly nodes: ReadonlyArray<NodeOffer>
  /** Names of nodes that shall run nothing. */
  readonly drained: ReadonlySet<string>
  /** Where everything was placed last. */
  readonly previous: ReadonlyArray<PlacedComponent>
  /** A component that moves gets an epoch of at least this. */
  readonly nowMs: number
  /** The highest epoch that a component of this kind and id was heard under. */
  readonly heardEpoch?: (component: Component) => number | undefined
}

export interface Placed {
  readonly components: ReadonlyArray<PlacedComponent>
  readonly unplaceable: ReadonlyArray<Unplaceable>
}

/** A later incarnation's epoch is larger by at least this, since restarts count up from it. */
const epochStep = 1_000

/** Every component of the topology once, in the order of starting; or why it is nowhere. */
export const place = ({ topology, nodes: alive, drained, previous, nowMs, heardEpoch = () => undefined }: PlaceOptions): Placed => {
  const nodes = [...alive].sort((a, b) => (a.name < b.name ? -1 : 1))
  const stay = staying(nodes, drained)
  // Where all leave, everything has its place again when they are back.
  const offers = stay.length > 0 ? stay : nodes.filter(({ name }) => !drained.has(name))
  const wanted = componentsOf(topology).flat()
  const keyOf = ({ kind, id }: Component) => `${kind} ${id}`
  const before = new Map(previous.map((placed) => [keyOf(placed), placed]))
  const labelsOf = ({ kind, id }: Component) => (kind === "worker" ? topology.workers.find(({ name }) => name === id)!.labels : {})
  const placed = new Map<string, PlacedComponent>()
  const countOn = (node: string, kind?: Component["kind"]) => [...placed.values()].filter((one) => one.node === node && (kind === undefined || one.kind === kind)).length

  // Whoever can stay does, before anybody else looks for a place.
  for (const component of wanted) {
    const last = before.get(keyOf(component))
    const offer = last === undefined ? undefined : offers.find(({ name }) => name === last.node)
    if (offer !== undefined && lacking(offer, labelsOf(component)).length === 0) placed.set(keyOf(component), last!)
  }
  const unplaceable: Array<Unplaceable> = []
  // The pickiest choose first, so that what goes anywhere does not crowd their nodes.
  const waiting = wanted.filter((component) => !placed.has(keyOf(component)))
  const byNeed = [...waiting].sort((a, b) => Object.keys(labelsOf(b)).length - Object.keys(labelsOf(a)).length || wanted.indexOf(a) - wanted.indexOf(b))
  for (const component of byNeed) {
    const labels = labelsOf(component)
    const fitting = offers.filter((offer) => lacking(offer, labels).length === 0)
    // Replicas apart where they can be; a worker's cores are its own as far as possible.
    const cost = ({ name, cores }: NodeOffer) => [component.kind === "worker" ? 0 : countOn(name, component.kind), countOn(name, "worker") / cores, countOn(name) / cores] as const
    const best = [...fitting].sort((a, b) => compare(cost(a), cost(b)))[0]
    if (best === undefined) unplaceable.push({ ...component, why: reason(nodes, drained, labels) })
    else {
      const { epoch = 0 } = before.get(keyOf(component)) ?? {}
      placed.set(keyOf(component), { ...component, node: best.name, epoch: Math.max(nowMs, epoch + epochStep, (heardEpoch(component) ?? 0) + epochStep) })
    }
  }
  return {
    components: wanted.flatMap((component) => placed.get(keyOf(component)) ?? []),
    unplaceable: unplaceable.sort((a, b) => wanted.findIndex((one) => keyOf(one) === keyOf(a)) - wanted.findIndex((one) => keyOf(one) === keyOf(b))),
  }
}

/** Those of the nodes that go on running something. */
export const staying = (nodes: ReadonlyArray<NodeOffer>, drained: ReadonlySet<string>): ReadonlyArray<NodeOffer> => nodes.filter(({ name, leaving }) => leaving !== true && !drained.has(name))

const compare = (a: ReadonlyArray<number>, b: ReadonlyArray<number>): number => a.reduce((order, value, i) => order || value - b[i]!, 0)

/** Labels that it does not have, as text. */
const lacking = ({ labels }: NodeOffer, wanted: Readonly<Record<string, string>>): ReadonlyArray<string> =>
  Object.entries(wanted).flatMap(([name, value]) => (labels[name] === value ? [] : [`${name}=${value}`]))

const reason = (nodes: ReadonlyArray<NodeOffer>, drained: ReadonlySet<string>, labels: Readonly<Record<string, string>>): string => {
  if (nodes.length === 0) return "no node lives: start one with the command node"
  const each = nodes.map((node) => `${node.name} ${drained.has(node.name) ? "is drained" : node.leaving === true ? "leaves" : `lacks ${lacking(node, labels).join(", ")}`}`)
  return `no node fits: ${each.join("; ")}`
}
