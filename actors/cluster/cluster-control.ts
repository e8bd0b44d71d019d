/**
 * What an operator does with a cluster, wherever they sit: says what is wanted, takes nodes and workers out, and looks at it.
 */
import { basename } from "node:path"
import { ConfigError } from "../../config/config-error.ts"
import { parseTopology, type LoadedTopology } from "../../config/load-topology.ts"
import { limits } from "../../config/limits.ts"
import type { ChangeSummary } from "../messages/presence.ts"
import type { Members } from "../presence/members.ts"
import type { ClusterBucket } from "../runtime/cluster-bucket.ts"
import type { Assignment, PlacedComponent, Unplaceable } from "./assignment.ts"
import { clusterKeys } from "./cluster-keys.ts"
import { changesOf, offersOf } from "./leadership.ts"
import { place, staying } from "./place.ts"

/** Somebody else has written meanwhile. `current` is what is wanted now. */
export class WantedConflict extends Error {
  readonly _tag = "WantedConflict"
  readonly current: number

  constructor(current: number) {
    super(`the wanted topology has changed since it was read: its revision is ${current} now; read it again, and apply your change to that`)
    this.current = current
  }
}

/** It cannot be taken out. */
export class DrainError extends Error {
  readonly _tag = "DrainError"
}

export interface NodeStatus {
  readonly name: string
  readonly machine: string
  readonly pid: number
  readonly labels: Readonly<Record<string, string>>
  readonly cores: number
  readonly gateway: string | undefined
  readonly state: string
  readonly detail: string | undefined
  /** Whether it follows the assignment as it is now. */
  readonly follows: boolean
  readonly drained: boolean
  readonly components: ReadonlyArray<string>
}

export interface ClusterStatus {
  readonly cluster: string
  readonly leader: string | undefined
  /** What is wanted; undefined: nobody has said. */
  readonly wanted: { readonly revision: number; readonly path: string; readonly text: string } | undefined
  /** What the leader has made of it; an earlier revision where it has not yet. */
  readonly assignedRevision: number | undefined
  readonly nodes: ReadonlyArray<NodeStatus>
  readonly components: ReadonlyArray<PlacedComponent>
  readonly unplaceable: ReadonlyArray<Unplaceable>
  readonly drainedWorkers: ReadonlyArray<string>
  /** Of all nodes, newest first. */
  readonly changes: ReadonlyArray<ChangeSummary & { readonly node: string }>
  /** Whether every node does what is wanted, and none is missing. */
  readonly settled: boolean
}

export class ClusterControl {
  readonly #cluster: string
  readonly #bucket: ClusterBucket
  readonly #nodes: Members

  constructor(cluster: string, bucket: ClusterBucket, nodes: Members) {
    this.#cluster = cluster
    this.#bucket = bucket
    this.#nodes = nodes
  }

  /** @throws ConfigError where it is no topology of this cluster */
  check(text: string, path: string): LoadedTopology {
    const loaded = parseTopology(text, { path })
    const { cluster } = loaded.topology
    if (cluster !== this.#cluster) throw new ConfigError([`${basename(path)}: cluster: expected ${this.#cluster}, as this cluster is called, found ${cluster}`])
    return loaded
  }

  /**
   * Wants a topology from now on. Resolves to its revision.
   * @param ifRevision the one that it replaces; undefined: whatever is there
   * @throws ConfigError, WantedConflict, Fault
   */
  async want(text: string, path: string, ifRevision?: number): Promise<number> {
    this.check(text, path)
    const { revision } = await clusterKeys.wanted.read(this.#bucket)
    if (ifRevision !== undefined && ifRevision !== revision) throw new WantedConflict(revision)
    const written = await clusterKeys.wanted.write(this.#bucket, { text, path }, revision)
    if (written === undefined) throw new WantedConflict((await clusterKeys.wanted.read(this.#bucket)).revision)
    return written
  }

  /** What the leader would change for this topology, with the nodes that live now. */
  async plan(text: string, path: string): Promise<ReadonlyArray<string>> {
    const { topology } = this.check(text, path)
    const [assigned, drained] = await Promise.all([clusterKeys.assignment.read(this.#bucket), clusterKeys.drained.read(this.#bucket)])
    const out = drained.value ?? { nodes: [], workers: [] }
    const placed = place({ topology, nodes: offersOf(this.#nodes), drained: new Set(out.nodes), previous: assigned.value?.components ?? [], nowMs: Date.now() })
    const next: Assignment = { wantedRevision: 0, wanted: { text, path }, model: "", drained: out.workers, ...placed }
    const same = assigned.value?.wanted.text === text
    const moves = changesOf(assigned.value, next)
    return moves.length > 0 || same ? moves : ["nothing moves; what runs is changed in its place"]
  }

  /**
   * Takes a node out of use, or the roles from a worker, until it is undone. Resolves to what it is, and to what has no place then.
   * @throws DrainError where there is none of that name, or it is the last one
   */
  async drain(name: string, undo: boolean): Promise<{ readonly kind: "node" | "worker"; readonly unplaceable: ReadonlyArray<Unplaceable> }> {
    const offers = offersOf(this.#nodes)
    for (;;) {
      const [wanted, drained] = await Promise.all([clusterKeys.wanted.read(this.#bucket), clusterKeys.drained.read(this.#bucket)])
      const { nodes, workers } = drained.value ?? { nodes: [], workers: [] }
      const topology = wanted.value === undefined ? undefined : parseTopology(wanted.value.text, { path: wanted.value.path }).topology
      const there = topology?.workers ?? []
      const isNode = offers.some((node) => node.name === name) || nodes.includes(name)
      const worker = there.find((one) => one.name === name)
      if (!isNode && worker === undefined) throw new DrainError(`there is no node and no worker ${name}: ${[...offers, ...there].map((one) => one.name).join(", ") || "nothing"} is there`)
      if (!undo && isNode && staying(offers, new Set([...nodes, name])).length === 0) throw new DrainError(`${name} is the only node that can run anything: start another first`)
      const others = there.filter((one) => one.name !== name && !workers.includes(one.name))
      const lone = undo || isNode ? undefined : worker!.roles.find((role) => !others.some(({ roles }) => roles.includes(role)))
      if (lone !== undefined) throw new DrainError(`${name} is the only worker that can ${lone}: add another to the topology first`)
      const changed = (names: ReadonlyArray<string>) => [...names.filter((one) => one !== name), ...(undo ? [] : [name])].sort()
      const next = isNode ? { nodes: changed(nodes), workers } : { nodes, workers: changed(workers) }
      if ((await clusterKeys.drained.write(this.#bucket, next, drained.revision)) === undefined) continue
      if (!isNode || topology === undefined) return { kind: isNode ? "node" : "worker", unplaceable: [] }
      return { kind: "node", unplaceable: place({ topology, nodes: offers, drained: new Set(next.nodes), previous: [], nowMs: Date.now() }).unplaceable }
    }
  }

  async status(): Promise<ClusterStatus> {
    const { wanted, assignment, drained, leader } = clusterKeys
    const [said, assigned, out, leads] = await Promise.all([wanted.read(this.#bucket), assignment.read(this.#bucket), drained.read(this.#bucket), leader.read(this.#bucket)])
    const nodes = this.#nodes.all.flatMap(({ kind, id, node, pid, machine }): ReadonlyArray<NodeStatus> => {
      if (kind !== "node" || machine === undefined) return []
      const { labels, cores, gateway, state, detail, components } = machine
      return [{ name: id, machine: node, pid, labels, cores, gateway, state, detail, follows: machine.revision === assigned.revision, drained: out.value?.nodes.includes(id) ?? false, components: components.map((one) => `${one.kind} ${one.id}`) }]
    })
    const components = assigned.value?.components ?? []
    const lives = (name: string) => nodes.some((node) => node.name === name)
    const settled = said.value !== undefined && assigned.value?.wantedRevision === said.revision && nodes.length > 0 && nodes.every((node) => node.follows && node.state === "settled") && components.every(({ node }) => lives(node))
    return {
      cluster: this.#cluster,
      leader: leads.value?.node === "" ? undefined : leads.value?.node,
      wanted: said.value === undefined ? undefined : { revision: said.revision, ...said.value },
      assignedRevision: assigned.value?.wantedRevision,
      nodes,
      components,
      unplaceable: assigned.value?.unplaceable ?? [],
      drainedWorkers: assigned.value?.drained ?? [],
      changes: this.#nodes.all.flatMap(({ id, machine }) => machine?.changes?.map((change) => ({ node: id, ...change })) ?? []).sort((a, b) => (a.at > b.at ? -1 : 1)).slice(0, limits.shownChanges),
      settled,
    }
  }
}
