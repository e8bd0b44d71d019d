/** Placement: the policies as functions of the cluster's state, and the actor with its queue, leases and dumps. */
import { Deferred, Effect, Exit } from "effect"
import { TestClock } from "effect/testing"
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { chainHashes } from "../../actors/engine/block-hash.ts"
import { packHashes } from "../../actors/messages/hashes.ts"
import { KvMissed } from "../../actors/messages/prefill.ts"
import { Configure, Heartbeat, KvEvents, Leave, Place, Prefilled, Release, type HeartbeatMessage, type KvEventsMessage, type PlaceMessage } from "../../actors/messages/scheduler.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { actor, onAsk } from "../../actors/runtime/actor.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { announce } from "../../actors/presence/announce.ts"
import { Members } from "../../actors/presence/members.ts"
import { ClusterState } from "../../actors/scheduler/cluster-state.ts"
import { policies, type PolicyName } from "../../actors/scheduler/policy.ts"
import { schedulerActor } from "../../actors/scheduler/scheduler.ts"
import { until } from "../support/scoped.ts"

const blockTokens = 16
const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)
const hashesOf = (tokens: ReadonlyArray<number>) => chainHashes("0123456789abcdef", Int32Array.from(tokens), blockTokens)

const heartbeat = (worker: string, more: Partial<HeartbeatMessage> & { readonly maxBatch?: number } = {}): HeartbeatMessage => {
  const { maxBatch = 4, ...fields } = more
  return {
    worker,
    epoch: 1,
    roles: ["prefill", "decode"],
    load: { sequences: 0, waiting: 0, maxBatch, blocks: 100, freeBlocks: 100, blockTokens },
    requests: [],
    nextEventId: 0,
    ...fields,
  }
}

const request = (id: string, tokens: ReadonlyArray<number> = upTo(40), more: Partial<PlaceMessage> = {}): PlaceMessage => ({
  requestId: id,
  attempt: 0,
  tokens: tokens.length,
  hashes: packHashes(hashesOf(tokens)),
  choices: 1,
  maxTokens: 16,
  exclude: [],
  ...more,
})

/** Events from `firstId` on: the full blocks of these tokens are stored, then these hashes removed. */
const events = (worker: string, tokens: ReadonlyArray<number>, firstId = 0, removed: ReadonlyArray<string> = []): KvEventsMessage => {
  const stored = hashesOf(tokens)
  return { worker, epoch: 1, firstId, nextId: firstId + stored.length + removed.length, delta: { stored: packHashes(stored), removed: packHashes(removed) } }
}

/** All that a worker holds before event `nextId`, as it tells a scheduler that knows nothing. */
const everything = (worker: string, tokens: ReadonlyArray<number>, nextId: number): KvEventsMessage => ({ worker, epoch: 1, firstId: 0, nextId, delta: { cleared: true, stored: packHashes(hashesOf(tokens)), removed: new Uint8Array(0) } })

describe("a policy", () => {
  const cluster = (names: ReadonlyArray<string>): ClusterState => {
    const state = new ClusterState({ silenceMs: limits.heartbeatSilenceMs, leaseMs: limits.placementLeaseMs })
    for (const name of names) state.heartbeat(heartbeat(name, { maxBatch: 100 }), 0)
    return state
  }
  /** Places as the actor does, and returns the worker. */
  const place = (policy: PolicyName, state: ClusterState, message: PlaceMessage): string => {
    const candidates = { prefill: state.candidates("prefill", message), decode: state.candidates("decode", message) }
    const { prefill, decode, prefixBlocks } = policies[policy](message, state, candidates)
    expect(decode.id).toBe(prefill.id) // nothing has to be moved
    state.charge({ requestId: message.requestId, attempt: message.attempt, prefill: prefill.id, decode: decode.id, choices: message.choices, computeTokens: message.tokens - prefixBlocks * blockTokens, placedAtMs: 0 })
    return prefill.id
  }

  it("least-loaded spreads requests by the load they are predicted to bring, choices and prompts included", () => {
    const state = cluster(["a", "b", "c"])
    expect(upTo(6).map((i) => place("least-loaded", state, request(`r${i}`)))).toEqual(["a", "b", "c", "a", "b", "c"])
    const uneven = cluster(["a", "b"])
    expect(place("least-loaded", uneven, request("many", upTo(40), { choices: 8 }))).toBe("a")
    expect(upTo(3).map((i) => place("least-loaded", uneven, request(`r${i}`, upTo(20))))).toEqual(["b", "b", "b"])
  })

  it("cache-aware sends a prefix to the worker that holds it, and what nobody holds to the least loaded", () => {
    const state = cluster(["a", "b", "c"])
    state.kvEvents(events("b", upTo(320)))
    expect(place("cache-aware", state, request("known", upTo(330)))).toBe("b")
    expect(place("cache-aware", state, request("strange", upTo(330).map((token) => token + 1)))).toBe("a")
    expect(place("cache-aware", state, request("other", upTo(330).map((token) => token + 2)))).toBe("c")
  })

  it("cache-aware does not herd: a short prefix that everybody shares is computed once more where there is room", () => {
    const state = cluster(["a", "b"])
    state.kvEvents(events("a", upTo(64)))
    const places = upTo(20).map((i) => {
      const message = request(`r${i}`, [...upTo(64), ...upTo(10).map((token) => 1000 * (i + 1) + token)])
      const worker = place("cache-aware", state, message)
      state.prefilled(message)
      if (worker === "b") state.kvEvents(events("b", upTo(64)))
      return worker
    })
    expect(places.slice(0, 3)).toEqual(["a", "a", "a"])
    const onB = places.filter((worker) => worker === "b").length
    expect(onB).toBeGreaterThanOrEqual(7)
    expect(onB).toBeLessThanOrEqual(10)
  })
})

describe("the cluster's state", () => {
  const fresh = () => new ClusterState({ silenceMs: 1000, leaseMs: 5000 })
  const charge = { requestId: "r", attempt: 0, prefill: "w", decode: "w", choices: 3, computeTokens: 100, placedAtMs: 0 }

  it("adds load when a request is placed, corrects it when the prompt is done, and takes it away at the end", () => {
    const state = fresh()
    state.heartbeat(heartbeat("w"), 0)
    const load = () => [state.sequences("w"), state.queuedTokens("w")]
    state.charge(charge)
    expect(load()).toEqual([3, 100])
    expect(state.hasSlot(state.workers.get("w")!, 1)).toBe(true)
    expect(state.hasSlot(state.workers.get("w")!, 2)).toBe(false)
    state.prefilled(charge)
    expect(load()).toEqual([3, 0])
    state.release({ requestId: "r", attempt: 1 })
    expect(load()).toEqual([3, 0])
    state.release(charge)
    expect(load()).toEqual([0, 0])
  })

  it("lets a charge lapse that its worker does not know of after the lease, and keeps one that it does", () => {
    const state = fresh()
    state.heartbeat(heartbeat("w"), 0)
    state.charge(charge)
    state.charge({ ...charge, requestId: "served" })
    for (const nowMs of [1000, 5000]) {
      state.heartbeat(heartbeat("w", { requests: ["served"] }), nowMs)
      state.sweep(nowMs)
      expect(state.charges.size).toBe(2)
    }
    state.heartbeat(heartbeat("w", { requests: ["served"] }), 5001)
    state.sweep(5001)
    expect([...state.charges.values()].map(({ requestId }) => requestId)).toEqual(["served"])
  })

  it("forgets a silent worker and what was placed on it", () => {
    const state = fresh()
    state.heartbeat(heartbeat("w"), 0)
    state.heartbeat(heartbeat("v"), 600)
    state.charge(charge)
    state.sweep(1000)
    expect(state.workers.size).toBe(2)
    state.sweep(1001)
    expect([...state.workers.keys()]).toEqual(["v"])
    expect(state.charges.size).toBe(0)
  })

  it("keeps the place of a sequence whose prefill worker is gone, since decode serves it still, but not its prompt's load", () => {
    const state = fresh()
    state.heartbeat(heartbeat("p", { roles: ["prefill"] }), 0)
    state.heartbeat(heartbeat("w"), 0)
    state.charge({ ...charge, prefill: "p" })
    state.leave("p", 1)
    expect([state.sequences("w"), state.queuedTokens("p")]).toEqual([3, 0])
    state.heartbeat(heartbeat("p", { roles: ["prefill"], epoch: 2 }), 1)
    expect([state.sequences("w"), state.queuedTokens("p")]).toEqual([3, 0])
    state.leave("w", 1)
    expect(state.charges.size).toBe(0)
  })

  it("takes a new epoch for a new worker: no prefixes, no charges; and ignores an old one's last words", () => {
    const state = fresh()
    state.heartbeat(heartbeat("w"), 0)
    state.kvEvents(events("w", upTo(32)))
    state.charge(charge)
    expect(state.heartbeat(heartbeat("w", { epoch: 2 }), 1)).toBe(false)
    expect([state.workers.get("w")!.prefixes.size, state.charges.size]).toEqual([0, 0])
    expect(state.heartbeat(heartbeat("w", { epoch: 1, maxBatch: 99 }), 2)).toBe(false)
    expect(state.kvEvents(events("w", upTo(32)))).toBe(false)
    expect(state.kvEvents(everything("w", upTo(32), 7))).toBe(false)
    state.leave("w", 1)
    expect(state.workers.get("w")).toMatchObject({ epoch: 2, load: { maxBatch: 4 }, nextEventId: 0 })
    expect(state.workers.get("w")!.prefixes.size).toBe(0)
  })

  it("knows a gap in the events, by the next event or the next heartbeat, and goes on from all that is there or from what it missed", () => {
    const state = fresh()
    const known = () => state.workers.get("w")!.prefixes.size
    expect(state.heartbeat(heartbeat("w", { nextEventId: 9 }), 0)).toBe(true) // it came late
    expect(state.kvEvents(everything("w", upTo(32), 9))).toBe(false)
    expect(state.heartbeat(heartbeat("w", { nextEventId: 9 }), 0)).toBe(false)
    expect(state.kvEvents(events("w", [], 9, hashesOf(upTo(16))))).toBe(false)
    expect(known()).toBe(1)
    expect(state.kvEvents(events("w", upTo(16), 8))).toBe(false) // an old one
    expect(known()).toBe(1)
    expect(state.kvEvents(events("w", upTo(16), 11))).toBe(true)
    expect(state.heartbeat(heartbeat("w", { nextEventId: 12 }), 0)).toBe(true)
    expect(state.workers.get("w")!.nextEventId).toBe(10)
    expect(state.kvEvents(events("w", upTo(32), 10))).toBe(false)
    expect(known()).toBe(2)
    // What was asked for and what was pushed meanwhile overlap.
    expect(state.kvEvents({ ...events("w", upTo(48), 10), nextId: 15 })).toBe(false)
    expect(known()).toBe(3)
    expect(state.heartbeat(heartbeat("w", { nextEventId: 15 }), 0)).toBe(false)
    expect(state.kvEvents(everything("w", upTo(16), 20))).toBe(false) // whatever was known, it is cleared
    expect(known()).toBe(1)
  })

  it("takes other roles and bounds of the same incarnation, with its prefixes and charges", () => {
    const state = fresh()
    const roles = (role: "prefill" | "decode") => state.candidates(role, request("r")).map(({ id }) => id)
    state.heartbeat(heartbeat("w"), 0)
    state.kvEvents(events("w", upTo(32)))
    state.charge(charge)
    state.heartbeat(heartbeat("w", { roles: ["prefill"], maxBatch: 9, nextEventId: 2 }), 1)
    expect([roles("prefill"), roles("decode")]).toEqual([["w"], []])
    state.heartbeat(heartbeat("w", { roles: ["decode"], maxBatch: 9, nextEventId: 2 }), 2)
    expect([roles("prefill"), roles("decode")]).toEqual([[], ["w"]])
    state.heartbeat(heartbeat("w", { roles: [], maxBatch: 9, nextEventId: 2 }), 3)
    expect([roles("prefill"), roles("decode")]).toEqual([[], []])
    expect(state.workers.get("w")).toMatchObject({ load: { maxBatch: 9 }, nextEventId: 2 })
    expect([state.prefixBlocks(state.workers.get("w")!, request("r")), state.sequences("w")]).toEqual([2, 3])
  })

  it("has a worker without a role as holder of what it knows, and the one that a request was moved from", () => {
    const state = fresh()
    state.heartbeat(heartbeat("drained", { roles: [] }), 0)
    state.kvEvents(events("drained", upTo(32)))
    state.heartbeat(heartbeat("failed"), 0)
    state.kvEvents(events("failed", upTo(40)))
    expect(state.holder(request("r", upTo(40), { movedFrom: "drained", exclude: ["failed"] }), "other", 0)).toEqual({ worker: "drained", blocks: 2 })
  })

  it("lets a prompt begin on a worker that has less than a short time's work, as measured, and always on an idle one", () => {
    const state = fresh()
    const begins = () => state.beginsSoon(state.workers.get("w")!)
    state.heartbeat(heartbeat("w"), 0)
    expect(begins()).toBe(true)
    const queue = (computeTokens: number) => state.charge({ ...charge, requestId: `${computeTokens}`, computeTokens })
    queue(limits.prefillQueueTokens - 1)
    expect(begins()).toBe(true)
    queue(1)
    expect(begins()).toBe(false)
    state.heartbeat(heartbeat("w", { prefillTokPerS: limits.prefillQueueTokens }), 1)
    expect(begins()).toBe(true)
    queue((limits.prefillQueueTokens * limits.prefillQueueMs) / 1000)
    expect(begins()).toBe(false)
    for (const { requestId, attempt } of [...state.charges.values()]) state.prefilled({ requestId, attempt })
    expect(begins()).toBe(true)
    state.heartbeat(heartbeat("w", { prefillTokPerS: 0.001 }), 2) // a step's tokens are no long wait, however slow it is
    queue(limits.stepTokens - 1)
    expect(begins()).toBe(true)
  })

  it("offers the workers that a request has failed on only where there are no others", () => {
    const state = fresh()
    state.heartbeat(heartbeat("a"), 0)
    state.heartbeat(heartbeat("b", { roles: ["decode"] }), 0)
    const names = (role: "prefill" | "decode", exclude: ReadonlyArray<string>) => state.candidates(role, request("r", [], { exclude })).map(({ id }) => id)
    expect(names("decode", [])).toEqual(["a", "b"])
    expect(names("decode", ["a"])).toEqual(["b"])
    expect(names("prefill", ["a"])).toEqual(["a"])
    expect(names("decode", ["a", "b"])).toEqual(["a", "b"])
  })

  it("offers workers whose pool can hold a request, also where it has failed on them, and others only where no pool can", () => {
    const state = fresh()
    for (const [worker, blocks] of [["small", 4], ["large", 8]] as const) state.heartbeat({ ...heartbeat(worker), load: { ...heartbeat(worker).load, blocks } }, 0)
    const names = (tokens: number, exclude: ReadonlyArray<string> = []) => state.candidates("decode", request("r", [], { tokens, maxTokens: 16, exclude })).map(({ id }) => id)
    expect(names(48)).toEqual(["small", "large"])
    expect(names(49)).toEqual(["large"])
    expect(names(49, ["large"])).toEqual(["large"])
    expect(names(113)).toEqual(["small", "large"])
  })
})

describe("the scheduler", () => {
  let bus: MemoryBus
  let link: Link
  beforeEach(() => {
    bus = new MemoryBus()
    link = new Link(bus, "test", 1)
  })
  afterEach(() => bus.close())

  const to = (verb: string) => subject("test", "scheduler", anyId, verb)
  const place = (message: PlaceMessage) => link.ask(Place, to(Place.verb), message, { hop: "scheduler", deadlineMs: 60_000 })
  const beat = (message: HeartbeatMessage) => link.tell(Heartbeat, to(Heartbeat.verb), message)
  const release = (requestId: string, attempt = 0) => link.tell(Release, to(Release.verb), { requestId, attempt })
  /** Lets everything happen that can without time going on. */
  const settle = TestClock.adjust(0)
  const fork = <A, E>(effect: Effect.Effect<A, E>) =>
    Effect.gen(function* () {
      const done = yield* Deferred.make<A, E>()
      const fiber = yield* Effect.forkChild(Effect.onExit(effect, (exit) => Deferred.done(done, exit)))
      yield* settle
      return { fiber, done, await: Deferred.await(done) }
    })

  /** Runs a test beside a scheduler on a virtual clock. */
  const beside = (test: Effect.Effect<void, unknown>, options: { readonly policy?: PolicyName; readonly queue?: number } = {}): Promise<void> =>
    Effect.runPromise(
      Effect.scoped(Effect.andThen(schedulerActor({ link: new Link(bus, "scheduler s0", 5), namespace: "test", policy: "least-loaded", queue: 2, ...options }), test)).pipe(Effect.provide(TestClock.layer())),
    )

  it("answers with the worker, what it waits for there, and its own epoch", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w"))
        expect(yield* place(request("r", upTo(40)))).toEqual({ prefill: "w", decode: "w", prefixBlocks: 0, estimates: { queuedTokens: 0, computeTokens: 40 }, epochs: { prefill: 1, decode: 1 }, epoch: 5 })
        yield* link.tell(KvEvents, to(KvEvents.verb), events("w", upTo(32)))
        expect(yield* place(request("s", upTo(40)))).toMatchObject({ prefixBlocks: 2, estimates: { queuedTokens: 40, computeTokens: 8 } })
        yield* link.tell(Prefilled, to(Prefilled.verb), { requestId: "r", attempt: 0 })
        expect(yield* place(request("t", upTo(40)))).toMatchObject({ estimates: { queuedTokens: 8, computeTokens: 8 } })
      }),
      { policy: "cache-aware" },
    ))

  it("says at once that nobody serves, and which request can never be served", () =>
    beside(
      Effect.gen(function* () {
        expect(yield* Effect.flip(place(request("r")))).toMatchObject({ code: "unavailable", retryable: true, message: expect.stringContaining("no worker prefills") })
        yield* beat(heartbeat("w", { roles: ["prefill"] }))
        expect(yield* Effect.flip(place(request("r")))).toMatchObject({ code: "unavailable", message: expect.stringContaining("no worker decodes") })
        yield* beat(heartbeat("v"))
        expect(yield* Effect.flip(place(request("r", upTo(4), { choices: 5 })))).toMatchObject({ code: "invalid_request", param: "n" })
      }),
    ))

  it("lets a decode worker compute the prompt when no prefill worker is there, or only one that is silent", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("d", { roles: ["decode"] }))
        expect(yield* place(request("1"))).toMatchObject({ prefill: "d", decode: "d" })
        yield* beat(heartbeat("p", { roles: ["prefill"] }))
        expect(yield* place(request("2"))).toMatchObject({ prefill: "p", decode: "d" })
        for (let waitedMs = 0; waitedMs <= limits.heartbeatSilenceMs; waitedMs += limits.heartbeatIntervalMs) {
          yield* TestClock.adjust(limits.heartbeatIntervalMs)
          yield* beat(heartbeat("d", { roles: ["decode"] }))
        }
        yield* TestClock.adjust(limits.heartbeatIntervalMs)
        expect(yield* place(request("3"))).toMatchObject({ prefill: "d", decode: "d" })
      }),
    ))

  it.each(["blockTokens", "maxBatch"] as const)("does not believe a worker that says it has %s of 0", (field) => {
    const shown = vi.spyOn(console, "error").mockImplementation(() => {})
    return beside(
      Effect.gen(function* () {
        const good = heartbeat("w")
        yield* beat({ ...good, load: { ...good.load, [field]: 0 } })
        expect(yield* Effect.flip(place(request("r")))).toMatchObject({ code: "unavailable" })
        expect(shown.mock.calls.join()).toContain(field)
        yield* beat(good)
        expect(yield* place(request("r"))).toMatchObject({ decode: "w" })
      }),
    ).finally(() => shown.mockRestore())
  })

  it("refuses a request whose placement breaks, and goes on placing and sweeping", () => {
    const shown = vi.spyOn(console, "error").mockImplementation(() => {})
    const broken = () => {
      throw new Error("a defect")
    }
    return beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 1 }))
        vi.spyOn(policies, "least-loaded").mockImplementationOnce(broken)
        expect(yield* Effect.flip(place(request("broken")))).toMatchObject({ code: "internal" })
        yield* place(request("a"))
        const next = yield* fork(Effect.exit(place(request("next"))))
        vi.spyOn(ClusterState.prototype, "sweep").mockImplementationOnce(broken)
        yield* TestClock.adjust(limits.heartbeatIntervalMs)
        expect(shown.mock.calls.join()).toContain("sweep: a defect")
        // The sweep after the one that broke still sees that the worker is silent.
        yield* TestClock.adjust(limits.heartbeatSilenceMs + 2 * limits.heartbeatIntervalMs)
        expect(yield* next.await).toEqual(Exit.fail(expect.objectContaining({ code: "unavailable" })))
      }),
    ).finally(() => vi.restoreAllMocks())
  })

  it("lets requests wait in order when all places are taken, and refuses beyond the queue's bound with the time to come again", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 2 }))
        for (const id of ["a", "b"]) yield* place(request(id))
        const first = yield* fork(place(request("first", upTo(4), { choices: 2 })))
        const second = yield* fork(place(request("second")))
        expect(yield* Effect.flip(place(request("third")))).toMatchObject({ code: "overloaded", retryAfterMs: limits.retryAfterMs, message: expect.stringContaining("2 requests wait") })
        yield* release("a")
        yield* settle
        expect(yield* Deferred.isDone(first.done)).toBe(false) // it needs two places, and second does not overtake it
        expect(yield* Deferred.isDone(second.done)).toBe(false)
        yield* release("b")
        yield* first.await
        expect(yield* Deferred.isDone(second.done)).toBe(false)
        yield* release("first")
        yield* second.await
      }),
    ))

  it("keeps prompts in its queue, and a prefill worker that comes takes the next of them at once", () =>
    beside(
      Effect.gen(function* () {
        const prompt = (id: string) => request(id, upTo(40), { tokens: limits.prefillQueueTokens })
        const prefiller = (id: string) => beat(heartbeat(id, { roles: ["prefill"] }))
        yield* beat(heartbeat("d", { roles: ["decode"], maxBatch: 9 }))
        yield* prefiller("p0")
        expect((yield* place(prompt("a"))).prefill).toBe("p0")
        const [b, c, d] = [yield* fork(place(prompt("b"))), yield* fork(place(prompt("c"))), yield* fork(place(prompt("d")))]
        expect(yield* Deferred.isDone(b.done)).toBe(false)
        yield* prefiller("p1")
        expect((yield* b.await).prefill).toBe("p1")
        yield* settle
        expect(yield* Deferred.isDone(c.done)).toBe(false)
        yield* prefiller("p2")
        expect((yield* c.await).prefill).toBe("p2")
        yield* settle
        expect(yield* Deferred.isDone(d.done)).toBe(false)
        yield* link.tell(Prefilled, to(Prefilled.verb), { requestId: "b", attempt: 0 })
        expect((yield* d.await).prefill).toBe("p1")
      }),
      { queue: 8 },
    ))

  it("places what has begun before what has not, in order, and never refuses it for the length of the queue", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 1 }))
        yield* place(request("a"))
        const news = [yield* fork(place(request("new 1"))), yield* fork(place(request("new 2")))]
        const begun = [yield* fork(place(request("begun 1", upTo(4), { begun: true }))), yield* fork(place(request("begun 2", upTo(4), { begun: true })))]
        expect(yield* Effect.flip(place(request("new 3")))).toMatchObject({ code: "overloaded" })
        const order = [...begun, ...news]
        for (const [i, id] of ["a", "begun 1", "begun 2", "new 1"].entries()) {
          yield* release(id)
          yield* order[i]!.await
          yield* settle
          for (const later of order.slice(i + 1)) expect(yield* Deferred.isDone(later.done), id).toBe(false)
        }
      }),
    ))

  it("has what was moved computed where it decodes, however much waits at those that prefill, and not where it was", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("p", { roles: ["prefill"] }))
        yield* beat(heartbeat("old", { roles: [] }))
        yield* beat(heartbeat("d", { roles: ["decode"] }))
        yield* place(request("busy", upTo(40), { tokens: 10 * limits.prefillQueueTokens }))
        const moved = yield* place(request("moved", upTo(40), { tokens: 500, begun: true, movedFrom: "old" }))
        expect(moved).toMatchObject({ prefill: "d", decode: "d", estimates: { computeTokens: blockTokens } })
        // Where it is the only one that decodes again, it gets it back.
        yield* link.tell(Leave, to(Leave.verb), { worker: "d", epoch: 1 })
        yield* beat(heartbeat("old", { roles: ["decode"] }))
        expect((yield* place(request("back", upTo(40), { begun: true, movedFrom: "old" }))).decode).toBe("old")
      }),
    ))

  it("takes another policy and another bound of its queue while it runs, and refuses what is not available", () =>
    beside(
      Effect.gen(function* () {
        const configure = (wanted: { readonly policy?: string; readonly queue?: number; readonly admission?: string }) => link.ask(Configure, to(Configure.verb), wanted, { hop: "scheduler" })
        for (const worker of ["a", "b"]) yield* beat(heartbeat(worker))
        yield* link.tell(KvEvents, to(KvEvents.verb), events("b", upTo(320)))
        const known = (id: string) => request(id, upTo(330))
        expect((yield* place(known("1"))).prefill).toBe("a") // the least loaded
        expect(yield* configure({ policy: "cache-aware", admission: "none" })).toEqual({ applied: ["policy"] })
        expect((yield* place(known("2"))).prefill).toBe("b")
        expect(yield* configure({ policy: "cache-aware", queue: 2 })).toEqual({ applied: [] })
        expect(yield* Effect.flip(configure({ policy: "fastest", queue: 9 }))).toMatchObject({ code: "invalid_request", param: "policy", message: expect.stringContaining("least-loaded, cache-aware") })
        expect(yield* Effect.flip(configure({ admission: "early-rejection" }))).toMatchObject({ code: "invalid_request", param: "admission" })
        for (const id of ["3", "4", "5", "6", "7", "8"]) yield* place(request(id, upTo(4)))
        for (const id of ["9", "10"]) yield* fork(place(request(id)))
        expect(yield* Effect.flip(place(request("11")))).toMatchObject({ code: "overloaded" })
        expect(yield* configure({ queue: 3 })).toEqual({ applied: ["queue"] })
        yield* fork(place(request("12")))
        expect(yield* Effect.flip(place(request("13")))).toMatchObject({ code: "overloaded", message: expect.stringContaining("3 requests wait") })
      }),
    ))

  it("gives up its queue to a later one, and hears nothing more", () =>
    beside(
      Effect.scoped(
        Effect.gen(function* () {
          const members = yield* Members.listen(bus, "test")
          const later = (epoch: number, id = "s0") => announce({ link: new Link(bus, `scheduler ${id}`, epoch), namespace: "test", kind: "scheduler", id })
          yield* schedulerActor({ link: new Link(bus, "scheduler s0", 7), namespace: "other", policy: "least-loaded", queue: 2, members })
          const other = (verb: string) => subject("other", "scheduler", anyId, verb)
          const ask = (id: string) => link.ask(Place, other(Place.verb), request(id), { hop: "scheduler", deadlineMs: 60_000 })
          yield* link.tell(Heartbeat, other(Heartbeat.verb), heartbeat("w", { maxBatch: 1 }))
          yield* ask("a")
          const waits = yield* fork(Effect.exit(ask("b")))
          for (const id of ["s0", "s1"]) yield* Effect.scoped(later(6, id))
          yield* settle
          expect(yield* Deferred.isDone(waits.done)).toBe(false)
          yield* later(8)
          expect(yield* waits.await).toEqual(Exit.fail(expect.objectContaining({ code: "stale", hop: "scheduler s0" })))
          expect(yield* Effect.flip(ask("c"))).toMatchObject({ code: "unavailable" })
        }),
      ),
    ))

  it("never refuses while it is idle, though nobody may wait", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 1 }))
        yield* place(request("a"))
        expect(yield* Effect.flip(place(request("b")))).toMatchObject({ code: "overloaded" })
        yield* release("a")
        yield* place(request("b"))
      }),
      { queue: 0 },
    ))

  it("takes a request out of its queue when it is released or its asker's time is over, and the next gets the place", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 1 }))
        yield* place(request("a"))
        const given = yield* fork(Effect.exit(place(request("given up", upTo(4), { attempt: 1 }))))
        const next = yield* fork(place(request("next")))
        yield* release("given up", 0) // an older attempt
        yield* settle
        expect(yield* Deferred.isDone(given.done)).toBe(false)
        yield* release("given up", 1)
        expect(yield* given.await).toEqual(Exit.fail(expect.objectContaining({ code: "cancelled" })))
        yield* release("a")
        yield* next.await
        const late = yield* fork(Effect.exit(link.ask(Place, to(Place.verb), request("late"), { hop: "scheduler", deadlineMs: 60_000 })))
        yield* TestClock.adjust(limits.heartbeatIntervalMs)
        yield* beat(heartbeat("w", { maxBatch: 1, requests: ["next"] }))
        expect(yield* Deferred.isDone(late.done)).toBe(false)
      }),
    ))

  it("does not choose a worker that is silent, has left, or takes no prompt since it is full", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("a"))
        yield* beat(heartbeat("b", { maxBatch: 1 }))
        expect((yield* place(request("1"))).decode).toBe("a")
        expect(yield* place(request("2"))).toMatchObject({ prefill: "b", decode: "b" })
        expect(yield* place(request("3"))).toMatchObject({ prefill: "a", decode: "a" })
        for (let waitedMs = 0; waitedMs <= limits.heartbeatSilenceMs; waitedMs += limits.heartbeatIntervalMs) {
          yield* TestClock.adjust(limits.heartbeatIntervalMs)
          yield* beat(heartbeat("b", { maxBatch: 9 }))
        }
        yield* TestClock.adjust(limits.heartbeatIntervalMs)
        for (const id of ["4", "5", "6"]) expect((yield* place(request(id))).decode).toBe("b")
        yield* link.tell(Leave, to(Leave.verb), { worker: "b", epoch: 1 })
        expect(yield* Effect.flip(place(request("7")))).toMatchObject({ code: "unavailable" })
      }),
    ))

  it("fails those who wait when the last worker is gone, so that they can say so", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 1 }))
        yield* place(request("a"))
        const waiting = yield* fork(Effect.exit(place(request("b"))))
        yield* TestClock.adjust(limits.heartbeatSilenceMs + 2 * limits.heartbeatIntervalMs)
        expect(yield* waiting.await).toEqual(Exit.fail(expect.objectContaining({ code: "unavailable" })))
      }),
    ))

  it("frees the place of a request that nobody knows of once its lease has lapsed", () =>
    beside(
      Effect.gen(function* () {
        yield* beat(heartbeat("w", { maxBatch: 1 }))
        yield* place(request("lost"))
        const waiting = yield* fork(place(request("b")))
        for (let waitedMs = 0; waitedMs <= limits.placementLeaseMs; waitedMs += limits.heartbeatIntervalMs) {
          expect(yield* Deferred.isDone(waiting.done)).toBe(false)
          yield* TestClock.adjust(limits.heartbeatIntervalMs)
          yield* beat(heartbeat("w", { maxBatch: 1 }))
          yield* settle
        }
        yield* TestClock.adjust(limits.heartbeatIntervalMs)
        expect((yield* waiting.await).decode).toBe("w")
      }),
    ))

  it("asks a worker for what it missed, once at a time, from the event on that it knows", () =>
    beside(
      Effect.scoped(
        Effect.gen(function* () {
          const asked: Array<number | undefined> = []
          const gate = yield* Deferred.make<void>()
          const missed = ({ from }: { readonly from?: number | undefined }) =>
            Effect.andThen(
              Effect.sync(() => void asked.push(from)),
              Effect.as(Deferred.await(gate), from === undefined ? everything("w", upTo(32), 30) : { ...events("w", upTo(48), from), nextId: 40 }),
            )
          yield* actor(new Link(bus, "prefill w", 1), [onAsk(KvMissed, [{ subject: subject("test", "prefill", "w", KvMissed.verb) }], missed, { concurrent: true })])
          yield* beat(heartbeat("w", { nextEventId: 20 }))
          yield* beat(heartbeat("w", { nextEventId: 25 }))
          yield* link.tell(KvEvents, to(KvEvents.verb), events("w", upTo(64), 25))
          yield* place(request("behind them in the mailbox"))
          yield* Effect.promise(() => until(() => asked.length > 0))
          expect(asked).toEqual([undefined])
          yield* Deferred.succeed(gate, undefined)
          let prefixBlocks = 0
          for (let i = 0; prefixBlocks === 0; i++) {
            ;({ prefixBlocks } = yield* place(request(`r${i}`, upTo(40))))
            yield* release(`r${i}`)
          }
          expect(prefixBlocks).toBe(2)
          yield* link.tell(KvEvents, to(KvEvents.verb), events("w", [], 30, hashesOf(upTo(32)).slice(1)))
          expect(yield* place(request("s", upTo(40)))).toMatchObject({ prefixBlocks: 1 })
          yield* release("s")
          expect(asked).toEqual([undefined])
          yield* link.tell(KvEvents, to(KvEvents.verb), events("w", [], 35, hashesOf(upTo(16))))
          for (let i = 0; prefixBlocks !== 3; i++) {
            ;({ prefixBlocks } = yield* place(request(`t${i}`, upTo(50))))
            yield* release(`t${i}`)
          }
          expect(asked).toEqual([undefined, 31])
        }),
      ),
      { policy: "cache-aware" },
    ))
})
