import fc from "fast-check"
import { describe, expect, it } from "vitest"
import { describe as sentence, plan, type Step } from "../../actors/node/plan.ts"
import { keyOf, nothing, type Host, type PlannedComponent, type System } from "../../actors/node/system.ts"
import type { Role } from "../../config/topology.ts"

/** A system that does at once what a step says, and refuses what cannot be. */
const apply = (system: System, step: Step, during: (between: System) => void = () => {}): System => {
  const { components } = system
  const without = (component: PlannedComponent) => {
    if (!components.some((other) => keyOf(other) === keyOf(component))) throw new Error(`${keyOf(component)} does not run`)
    return { ...system, components: components.filter((other) => keyOf(other) !== keyOf(component)) }
  }
  const started = (to: System, component: PlannedComponent): System => {
    if (component.host === "process" && to.bus === undefined) throw new Error(`${keyOf(component)} has no bus`)
    if (to.components.some((other) => keyOf(other) === keyOf(component))) throw new Error(`${keyOf(component)} runs already`)
    if (component.kind === "kv-store" && to.components.some(({ kind, id }) => kind === "kv-store" && id === component.id)) throw new Error(`the folder of ${component.id} is locked`)
    const asked = component.live["blocks"]
    const pool = asked === undefined ? undefined : { asked, blocks: asked === "auto" ? 1000 : Number(asked) }
    return { ...to, components: [...to.components, { ...component, ...(pool === undefined ? {} : { pool }) }] }
  }
  switch (step.type) {
    case "attach-bus":
      if (system.bus !== undefined) throw new Error("attached already")
      return { ...system, bus: step.bus }
    case "detach-bus":
      if (components.some(({ host }) => host === "process")) throw new Error("processes are left without a bus")
      return { ...system, bus: undefined }
    case "start":
      return started(system, step.component)
    case "restart": {
      const gone = without(step.component)
      if (step.component.kind === "worker" || step.component.kind === "kv-store") during(gone)
      return started(gone, step.component)
    }
    case "configure":
    case "drain": {
      const running = components.find((other) => keyOf(other) === keyOf(step.component))!
      const { blocks } = step.component.live
      if (running.pool !== undefined && blocks !== "auto" && Number(blocks) > running.pool.blocks) throw new Error("a pool cannot grow")
      const { roles, live, fixed, host } = step.type === "drain" ? { ...running, roles: [] } : step.component
      if (host !== running.host || JSON.stringify(fixed) !== JSON.stringify(running.fixed)) throw new Error("that needs a restart")
      return { ...without(running), components: components.map((other) => (other === running ? { ...running, roles, live } : other)) }
    }
    case "stop":
      return without(step.component)
    case "switch-generation":
      return { ...system, generation: { id: step.to, label: step.label } }
    case "listen":
      return { ...system, listen: step.listen }
    case "retire-generation":
      if (system.generation?.id === step.generation) throw new Error("new requests go there")
      return system
  }
}

/** How many serve new requests in each part of the pipeline. */
const capacity = ({ generation, components }: System) => {
  const here = components.filter((component) => component.generation === generation?.id)
  const count = (holds: (component: PlannedComponent) => boolean) => here.filter(holds).length
  return {
    prefill: count(({ roles }) => roles.includes("prefill")),
    decode: count(({ roles }) => roles.includes("decode")),
    request: count(({ kind }) => kind === "request"),
    scheduler: count(({ kind }) => kind === "scheduler"),
  }
}

const normal = (system: System): unknown => ({ ...system, components: system.components.map((one) => ({ ...one, pool: undefined, roles: [...one.roles].sort() })).sort((a, b) => (keyOf(a) < keyOf(b) ? -1 : 1)) })

/** Walks a plan; checks that nothing loses its last server on the way. */
const walk = (actual: System, wanted: System, steps = plan(actual, wanted)): System => {
  const [before, after] = [capacity(actual), capacity(wanted)]
  let state = actual
  for (const step of steps) {
    const serving = capacity(state)
    const check = (now: System, alone: boolean) => {
      for (const part of ["prefill", "decode", "request", "scheduler"] as const) {
        // The only one of its part may be away while it starts again under its own name.
        if (before[part] > 0 && after[part] > 0 && capacity(now)[part] === 0 && !(alone && serving[part] === 1)) throw new Error(`no ${part} is left after: ${sentence(step)}`)
      }
    }
    state = apply(state, step, (between) => check(between, true))
    check(state, false)
  }
  return state
}

const roleSets: ReadonlyArray<ReadonlyArray<Role>> = [["prefill"], ["decode"], ["prefill", "decode"]]

const component = (generation: string, kind: PlannedComponent["kind"], id: string, host: Host, more: Partial<PlannedComponent> = {}): PlannedComponent => ({ generation, kind, id, host, roles: [], live: {}, fixed: {}, ...more })

const generations = ["aaaaaaaa", "bbbbbbbb"]

const wantedSystem: fc.Arbitrary<System> = fc
  .record({
    generation: fc.constantFrom(...generations),
    bus: fc.constantFrom(undefined, "nats://one", "nats://two"),
    workers: fc.uniqueArray(
      fc.record({ id: fc.constantFrom("a", "b", "c", "d"), roles: fc.constantFrom(...roleSets), maxBatch: fc.constantFrom(8, 32), blocks: fc.constantFrom("auto", 100, 2000), threads: fc.constantFrom("auto", 2) }),
      { selector: ({ id }) => id, minLength: 1, maxLength: 4 },
    ),
    requests: fc.integer({ min: 1, max: 2 }),
    stores: fc.integer({ min: 1, max: 2 }),
    policy: fc.constantFrom("cache-aware", "least-loaded"),
    memory: fc.constantFrom(1, 2),
    port: fc.constantFrom(1, 2),
  })
  .map(({ generation, bus, workers, requests, stores, policy, memory, port }) => {
    const host: Host = bus === undefined ? "embedded" : "process"
    const both = workers.map(({ roles }) => roles).flat()
    // A file without one of the roles is refused before there is a plan.
    const complete = workers.map((worker, i) => (i === 0 ? { ...worker, roles: (["prefill", "decode"] as const).filter((role) => worker.roles.includes(role) || !both.includes(role)) } : worker))
    return {
      bus,
      generation: { id: generation, label: generation },
      listen: { host: "127.0.0.1", port },
      components: [
        ...complete.map(({ id, roles, maxBatch, blocks, threads }) => component(generation, "worker", id, host, { roles, live: { maxBatch, blocks }, fixed: { threads } })),
        ...Array.from({ length: requests }, (_, i) => component(generation, "request", `r${i}`, host)),
        component(generation, "scheduler", "s0", host, { live: { policy } }),
        ...Array.from({ length: stores }, (_, i) => component(generation, "kv-store", `k${i}`, host, { fixed: { memory } })),
      ],
    }
  })

/** What runs after plans of which each but the last was given up somewhere in the middle. */
const anySystem: fc.Arbitrary<System> = fc.array(fc.tuple(wantedSystem, fc.nat(30)), { maxLength: 4 }).map((targets) =>
  targets.reduce((state, [wanted, most]) => plan(state, wanted).slice(0, most).reduce((at, step) => apply(at, step), state), nothing),
)

describe("a plan", () => {
  it("leads from any system to any other, and never without somebody who serves", () => {
    fc.assert(
      fc.property(anySystem, wantedSystem, (actual, wanted) => {
        const reached = walk(actual, wanted)
        expect(normal(reached)).toEqual(normal(wanted))
        expect(plan(reached, wanted)).toEqual([])
      }),
      { numRuns: 500 },
    )
  })

  it("that is given up in the middle leaves a system from which the next one leads on", () => {
    fc.assert(
      fc.property(wantedSystem, wantedSystem, wantedSystem, fc.nat(20), (first, second, third, most) => {
        const running = walk(nothing, first)
        const half = walk(running, second, plan(running, second).slice(0, most))
        expect(normal(walk(half, third))).toEqual(normal(third))
      }),
      { numRuns: 400 },
    )
  })

  const single: System = {
    bus: undefined,
    generation: { id: "aaaaaaaa", label: "tiny" },
    listen: { host: "127.0.0.1", port: 1 },
    components: [
      component("aaaaaaaa", "worker", "w0", "embedded", { roles: ["prefill", "decode"], live: { maxBatch: 32, blocks: "auto" }, pool: { asked: "auto", blocks: 500 } }),
      component("aaaaaaaa", "request", "r0", "embedded"),
      component("aaaaaaaa", "scheduler", "s0", "embedded", { live: { policy: "cache-aware" } }),
      component("aaaaaaaa", "kv-store", "k0", "embedded"),
    ],
  }
  const change = (system: System, id: string, more: Partial<PlannedComponent>): System => ({ ...system, components: system.components.map((one) => (one.id === id ? { ...one, ...more } : one)) })
  const said = (actual: System, wanted: System) => plan(actual, wanted).map(sentence)

  it("from one process to many starts what is new before it drains what goes", () => {
    const disaggregated: System = {
      ...single,
      bus: "a nats-server of its own",
      components: [
        ...single.components.slice(1).map((one) => ({ ...one, host: "process" as const })),
        component("aaaaaaaa", "worker", "p0", "process", { roles: ["prefill"] }),
        component("aaaaaaaa", "worker", "d0", "process", { roles: ["decode"] }),
      ],
    }
    expect(said(single, disaggregated)).toEqual([
      "connect to NATS (a nats-server of its own)",
      "start worker p0 (prefill) in a process of its own",
      "start worker d0 (decode) in a process of its own",
      "restart scheduler s0: into a process of its own",
      "restart request r0: into a process of its own",
      "restart kv-store k0: into a process of its own",
      "drain worker w0: what runs there goes on elsewhere",
      "stop worker w0",
    ])
  })

  it("changes batch, policy and a smaller pool without a restart, and a larger pool with one", () => {
    expect(said(single, change(single, "w0", { live: { maxBatch: 16, blocks: 400 } }))).toEqual(["change worker w0: maxBatch 32 -> 16, blocks auto -> 400"])
    expect(said(single, change(single, "s0", { live: { policy: "least-loaded" } }))).toEqual(["change scheduler s0: policy cache-aware -> least-loaded"])
    expect(said(single, change(single, "w0", { live: { maxBatch: 32, blocks: 501 } }))).toEqual(["restart worker w0: blocks auto -> 501"])
  })

  it("gives roles before it takes them where two workers change theirs", () => {
    const pair: System = {
      ...single,
      components: [...single.components.slice(1), component("aaaaaaaa", "worker", "a", "embedded", { roles: ["prefill"] }), component("aaaaaaaa", "worker", "b", "embedded", { roles: ["decode"] })],
    }
    expect(said(pair, change(change(pair, "a", { roles: ["decode"] }), "b", { roles: ["prefill"] }))).toEqual([
      "change worker a: roles prefill -> prefill, decode",
      "change worker b: roles decode -> prefill, decode",
      "change worker a: roles prefill, decode -> decode",
      "change worker b: roles prefill, decode -> prefill",
    ])
  })

  it("to another model lets the requests of the old one end before it stops", () => {
    const other: System = { ...single, generation: { id: "bbbbbbbb", label: "other" }, components: single.components.map((one) => ({ ...one, generation: "bbbbbbbb", pool: undefined })) }
    expect(said(single, other)).toEqual([
      "start worker w0 (prefill, decode)",
      "start request r0",
      "start scheduler s0",
      "send new requests to other",
      "stop kv-store k0",
      "start kv-store k0",
      "let the requests of generation aaaaaaaa end",
      "stop request r0",
      "stop worker w0",
      "stop scheduler s0",
    ])
  })
})
