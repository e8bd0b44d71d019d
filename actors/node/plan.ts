/**
 * From what runs to what is wanted, in an order that keeps capacity: what is new starts first, roles are gained before they
 * are lost, and nothing stops before others serve in its place.
 */
import { roles, type Role } from "../../config/topology.ts"
import { differences, keyOf, sameSettings, type PlannedComponent, type Settings, type System } from "./system.ts"

/** What follows each other of `atOnce` may be done at once; everything else is done in its order. */
export type Step =
  | { readonly type: "attach-bus"; readonly bus: string }
  | { readonly type: "start"; readonly component: PlannedComponent }
  /** Roles and live settings, without a restart: `component` is how it is afterwards. */
  | { readonly type: "configure"; readonly component: PlannedComponent; readonly changes: ReadonlyArray<string> }
  /** A request or a scheduler actor is there twice for a moment; a worker is drained, stopped and started; a store is stopped first. */
  | { readonly type: "restart"; readonly component: PlannedComponent; readonly changes: ReadonlyArray<string> }
  | { readonly type: "switch-generation"; readonly from: string | undefined; readonly to: string; readonly label: string }
  | { readonly type: "listen"; readonly listen: Settings; readonly changes: ReadonlyArray<string> }
  /** It has no roles afterwards, and what it decoded goes on elsewhere. */
  | { readonly type: "drain"; readonly component: PlannedComponent }
  | { readonly type: "stop"; readonly component: PlannedComponent }
  /** Waits until the last request of an earlier generation has ended. */
  | { readonly type: "retire-generation"; readonly generation: string }
  | { readonly type: "detach-bus"; readonly bus: string }

/** A step in one line, for people. */
export const describe = (step: Step): string => {
  switch (step.type) {
    case "attach-bus":
      return `connect to NATS (${step.bus})`
    case "start":
      return `start ${nameOf(step.component)}${step.component.host === "process" ? " in a process of its own" : ""}`
    case "configure":
      return `change ${step.component.kind} ${step.component.id}: ${step.changes.join(", ")}`
    case "restart":
      return `restart ${step.component.kind} ${step.component.id}: ${step.changes.join(", ")}`
    case "switch-generation":
      return `send new requests to ${step.label}`
    case "listen":
      return `listen at ${step.listen["host"]}:${step.listen["port"]}${step.changes.length > 0 ? ` (${step.changes.join(", ")})` : ""}`
    case "drain":
      return `drain ${step.component.kind} ${step.component.id}: what runs there goes on elsewhere`
    case "stop":
      return `stop ${step.component.kind} ${step.component.id}`
    case "retire-generation":
      return `let the requests of generation ${step.generation} end`
    case "detach-bus":
      return `leave NATS (${step.bus})`
  }
}

/** Which of the steps that may be done at once it belongs to; undefined: it is done alone. */
export const atOnce = (step: Step): "beginning" | "draining" | undefined => {
  if (step.type === "start" || (step.type === "restart" && step.component.kind !== "worker")) return "beginning"
  return step.type === "drain" ? "draining" : undefined
}

/** Has nothing of its own that two could not have. */
export const isTwiceForAMoment = ({ kind }: Pick<PlannedComponent, "kind">): boolean => kind === "request" || kind === "scheduler"

const nameOf = ({ kind, id, roles }: PlannedComponent): string => (kind === "worker" ? `worker ${id} (${roleText(roles)})` : `${kind} ${id}`)

const roleText = (held: ReadonlyArray<Role>): string => (held.length === 0 ? "no role" : inOrder(held).join(", "))

const inOrder = (held: ReadonlyArray<Role>): ReadonlyArray<Role> => roles.filter((role) => held.includes(role))

const union = (a: ReadonlyArray<Role>, b: ReadonlyArray<Role>): ReadonlyArray<Role> => inOrder([...a, ...b])

/** The steps that make `wanted` of `actual`; none where they are the same. */
export const plan = (actual: System, wanted: System): ReadonlyArray<Step> => {
  // Processes can be at one NATS only: from one to another everything passes through this process, which serves meanwhile.
  if (actual.bus !== undefined && wanted.bus !== undefined && actual.bus !== wanted.bus) {
    const between: System = { ...wanted, bus: undefined, components: wanted.components.map((component) => ({ ...component, host: "embedded" })) }
    return [...plan(actual, between), ...plan(between, wanted)]
  }
  const running = new Map(actual.components.map((component) => [keyOf(component), component]))
  const kept = new Set(wanted.components.map(keyOf))
  const pairs = wanted.components.map((to) => ({ to, from: running.get(keyOf(to)) }))
  const generation = wanted.generation?.id
  const leaving = actual.components.filter((component) => !kept.has(keyOf(component)))
  const removed = leaving.filter((component) => component.generation === generation)
  const old = leaving.filter((component) => component.generation !== generation)
  // The folder of a store is locked: its predecessor in another generation stops first, which costs misses only.
  const predecessor = (to: PlannedComponent) => old.find(({ kind, id }) => to.kind === "kv-store" && kind === to.kind && id === to.id)

  const start: Array<Step> = []
  const widen: Array<Step> = []
  const revive: Array<Step> = []
  const restart: Array<Step> = []
  const succeed: Array<Step> = []
  const narrow: Array<Step> = []
  for (const { to, from } of pairs) {
    const before = predecessor(to)
    if (from === undefined) {
      if (before === undefined) start.push({ type: "start", component: to })
      else succeed.push({ type: "stop", component: before }, { type: "start", component: to })
      continue
    }
    const roles = union(from.roles, to.roles)
    const gains = roles.length > from.roles.length
    const reasons = reasonsToRestart(from, to)
    // A worker that will start again is already what it will be, while others of its kind do; a drained one starts first.
    const widened = reasons.length > 0 ? { ...from, roles } : { ...to, roles, pool: from.pool }
    if (reasons.length > 0 ? gains && from.roles.length > 0 : gains || !sameSettings(from.live, to.live)) {
      widen.push({ type: "configure", component: widened, changes: changesOf(from, widened) })
    }
    if (reasons.length > 0) (from.kind === "worker" && from.roles.length === 0 ? revive : restart).push({ type: "restart", component: to, changes: reasons })
    else if (to.roles.length === 0 && roles.length > 0) narrow.push({ type: "drain", component: { ...to, pool: from.pool } })
    else if (roles.length > to.roles.length) narrow.push({ type: "configure", component: { ...to, pool: from.pool }, changes: changesOf(widened, to) })
  }

  const steps: Array<Step> = []
  if (wanted.bus !== undefined && actual.bus === undefined) steps.push({ type: "attach-bus", bus: wanted.bus })
  steps.push(...start, ...byKind(restart, ["scheduler", "request", "kv-store"]), ...widen, ...revive, ...byKind(restart, ["worker"]))
  if (wanted.generation !== undefined && actual.generation?.id !== generation) {
    steps.push({ type: "switch-generation", from: actual.generation?.id, to: wanted.generation.id, label: wanted.generation.label })
  }
  steps.push(...succeed)
  if (wanted.listen !== undefined && (actual.listen === undefined || !sameSettings(actual.listen, wanted.listen))) {
    steps.push({ type: "listen", listen: wanted.listen, changes: actual.listen === undefined ? [] : differences(actual.listen, wanted.listen) })
  }
  steps.push(...narrow)
  steps.push(...removed.filter(({ roles }) => roles.length > 0).map((component): Step => ({ type: "drain", component })))
  steps.push(...stops(removed))
  const storesGone = new Set(succeed.map((step) => (step.type === "stop" ? keyOf(step.component) : undefined)))
  for (const retired of new Set(old.map((component) => component.generation))) {
    steps.push({ type: "retire-generation", generation: retired })
    steps.push(...stops(old.filter((component) => component.generation === retired && !storesGone.has(keyOf(component)))))
  }
  if (actual.bus !== undefined && wanted.bus === undefined) steps.push({ type: "detach-bus", bus: actual.bus })
  return steps
}

/** Requests first, so that what they hold is freed in order; others are still there to be told. */
const stops = (components: ReadonlyArray<PlannedComponent>): ReadonlyArray<Step> =>
  byKind(components.map((component): Step => ({ type: "stop", component })), ["request", "worker", "scheduler", "kv-store"])

const byKind = (steps: ReadonlyArray<Step>, order: ReadonlyArray<PlannedComponent["kind"]>): ReadonlyArray<Step> =>
  order.flatMap((kind) => steps.filter((step) => "component" in step && step.component.kind === kind))

const changesOf = (from: PlannedComponent, to: PlannedComponent): ReadonlyArray<string> => {
  const roleChange = roleText(from.roles) === roleText(to.roles) ? [] : [`roles ${roleText(from.roles)} -> ${roleText(to.roles)}`]
  return [...roleChange, ...differences(from.live, to.live)]
}

const reasonsToRestart = (from: PlannedComponent, to: PlannedComponent): ReadonlyArray<string> => {
  const reasons = [...differences(from.fixed, to.fixed)]
  if (from.host !== to.host) reasons.unshift(to.host === "process" ? "into a process of its own" : "into this process")
  // A pool can be used less than it was made for, and never more.
  const [asked, blocks] = [to.live["blocks"], from.pool?.blocks]
  if (from.pool !== undefined && asked !== undefined && asked !== from.live["blocks"]) {
    const fits = asked === "auto" ? from.pool.asked === "auto" : Number(asked) <= blocks!
    if (!fits) reasons.push(`blocks ${from.live["blocks"]} -> ${asked}`)
  }
  return reasons.length === 0 ? [] : [...reasons, ...changesOf(from, to).filter((change) => !reasons.includes(change))]
}
