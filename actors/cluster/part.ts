/**
 * What a node runs of an assignment, and when: what is new at once, what is gone only when all nodes together serve the new
 * assignment. Workers and stores have one place at a time, so that their successor elsewhere waits until they are silent.
 */
import { roles, type Role } from "../../config/topology.ts"
import type { PresenceMessage } from "../messages/presence.ts"
import type { PlannedComponent, System } from "../node/system.ts"
import type { Assignment, PlacedComponent } from "./assignment.ts"

export interface PartOptions {
  readonly node: string
  readonly assignment: Assignment
  /** All that the assignment's topology wants, wherever it runs. */
  readonly whole: System
  /** What runs here. */
  readonly actual: System
  /** Who serves in the generation of `whole`, on whatever node. */
  readonly heard: ReadonlyArray<PresenceMessage>
  /** Whether all of the assignment serves, or has been waited for long enough. */
  readonly complete: boolean
  /** Whether this node has a gateway. */
  readonly gateway: boolean
}

const nameOf = ({ kind, id }: Pick<PlannedComponent, "kind" | "id">): string => `${kind} ${id}`

/** Those of which two must not be: what is said to them is said to a name. */
const single: ReadonlySet<string> = new Set(["worker", "kv-store"])

export const partOf = ({ node, assignment, whole, actual, heard, complete, gateway }: PartOptions): System => {
  const placedOn = new Map(assignment.components.map((placed) => [nameOf(placed), placed.node]))
  const generation = whole.generation?.id
  const mine = whole.components.filter((component) => placedOn.get(nameOf(component)) === node)
  const running = new Map(actual.components.map((component) => [`${component.generation} ${nameOf(component)}`, component]))
  const elsewhere = new Set(heard.flatMap(({ kind, id, agent }) => (single.has(kind) && agent !== node ? [`${kind} ${id}`] : [])))

  const components = mine.flatMap((component): ReadonlyArray<PlannedComponent> => {
    const now = running.get(`${component.generation} ${nameOf(component)}`)
    if (now === undefined) return elsewhere.has(nameOf(component)) ? [] : [component]
    // Roles are gained before any are lost, on all nodes.
    return [complete ? component : { ...now, roles: roles.filter((role) => now.roles.includes(role) || component.roles.includes(role)) }]
  })
  const kept = new Set(components.map((component) => `${component.generation} ${nameOf(component)}`))
  const leaving = actual.components.filter((component) => !kept.has(`${component.generation} ${nameOf(component)}`))
  const waitsForIt = (component: PlannedComponent) => component.generation === generation && single.has(component.kind) && placedOn.has(nameOf(component))
  return {
    bus: whole.bus,
    generation: complete ? whole.generation : (actual.generation ?? whole.generation),
    components: [...components, ...(complete ? [] : leaving.filter((component) => !waitsForIt(component)))],
    listen: gateway ? (complete ? whole.listen : actual.listen) : undefined,
  }
}

/** What of an assignment does not serve where it shall, with the roles that it shall have; none: it is complete. */
export const missingOf = ({ assignment, whole, heard }: Pick<PartOptions, "assignment" | "whole" | "heard">): ReadonlyArray<PlacedComponent> => {
  const wantedRoles = new Map(whole.components.map((component) => [nameOf(component), component.roles]))
  const serves = ({ kind, id, node }: PlacedComponent): boolean => {
    const said = heard.find((message) => message.kind === kind && message.id === id)
    if (said === undefined || said.agent !== node) return false
    const held: ReadonlyArray<Role> = said.worker?.roles ?? []
    return kind !== "worker" || (wantedRoles.get(nameOf({ kind, id })) ?? []).every((role) => held.includes(role))
  }
  return assignment.components.filter((placed) => !serves(placed))
}
