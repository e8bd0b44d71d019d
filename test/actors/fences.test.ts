/** Incarnations: what an earlier one asks, or is asked by mistake, is refused by name, and the client gets its answer all the same. */
import { Effect, Schema } from "effect"
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { Drain } from "../../actors/messages/worker.ts"
import { Place, Release } from "../../actors/messages/scheduler.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { announce } from "../../actors/presence/announce.ts"
import { Members } from "../../actors/presence/members.ts"
import { actor, onAsk, onStream, onTell } from "../../actors/runtime/actor.ts"
import { header } from "../../actors/runtime/bus.ts"
import { defineAsk, defineStream, defineTell } from "../../actors/runtime/codec.ts"
import { Fences } from "../../actors/runtime/fences.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { policies } from "../../actors/scheduler/policy.ts"
import { schedulerActor } from "../../actors/scheduler/scheduler.ts"
import { Cluster } from "../support/cluster.ts"
import { failureOf, testScope, type TestScope } from "../support/scoped.ts"
import { startNode, streamCompletion } from "../support/start-node.ts"

const from = (sender: string, epoch: number) => ({ [header.sender]: sender, [header.epoch]: String(epoch) })

describe("what an actor remembers of its senders", () => {
  it("is the latest incarnation of each, which fences those before it and nobody else", () => {
    const fences = new Fences()
    const stale = (sender: string, epoch: number) => fences.isStale(from(sender, epoch), 0)
    expect([stale("a", 3), stale("a", 3), stale("b", 1), stale("a", 4), stale("a", 3), stale("b", 1), stale("a", 4)]).toEqual([false, false, false, false, true, false, false])
    expect([stale("gateway", 0), fences.isStale({}, 0), fences.isStale({ [header.sender]: "a", [header.epoch]: "x" }, 0)]).toEqual([false, false, false])
  })

  it("ends when that one has been silent long enough to be over, since clocks may have gone back", () => {
    const fences = new Fences()
    fences.isStale(from("a", 9), 0)
    fences.isStale(from("a", 9), 1_000)
    expect(fences.isStale(from("a", 8), 1_000 + limits.fenceMs)).toBe(true)
    expect(fences.isStale(from("a", 8), 1_001 + limits.fenceMs)).toBe(false)
    expect(fences.isStale(from("a", 7), 1_002 + limits.fenceMs)).toBe(true)
  })

  it("is bounded: of too many, the one that was heard longest ago is forgotten", () => {
    const fences = new Fences()
    fences.isStale(from("kept", 9), 0)
    fences.isStale(from("forgotten", 9), 0)
    for (let i = 0; i < limits.fencedSenders - 1; i++) {
      if (i === 7) fences.isStale(from("kept", 9), 0)
      fences.isStale(from(`${i}`, 9), 0)
    }
    expect(fences.isStale(from("kept", 8), 0)).toBe(true)
    expect(fences.isStale(from("forgotten", 8), 0)).toBe(false)
  })
})

describe("an actor", () => {
  const Question = defineAsk("question", Schema.Struct({}), Schema.Struct({}))
  const Count = defineStream("count", Schema.Struct({}))
  const Note = defineTell("note", Schema.Struct({}))
  const at = (verb: string) => subject("test", "worker", "w0", verb)
  let scope: TestScope
  let bus: MemoryBus
  let notes = 0
  beforeEach(async () => {
    scope = testScope()
    bus = new MemoryBus()
    await scope.start(
      actor(new Link(bus, "worker w0", 5), [
        onAsk(Question, [{ subject: at("question") }], () => Effect.succeed({})),
        onStream(Count, [{ subject: at("count") }], (_, writer) => Effect.sync(() => writer.write(Uint8Array.of(1)))),
        onTell(Note, [{ subject: at("note") }], () => Effect.sync(() => void notes++)),
      ]),
    )
  })
  afterEach(() => scope.close())

  const ask = (link: Link, epoch?: number) => link.ask(Question, at("question"), {}, { hop: "worker w0", epoch, deadlineMs: 50 })
  const count = async (link: Link, epoch?: number) => (await Effect.runPromise(link.open(Count, at("count"), {}, { hop: "worker w0", epoch }))).next()

  it("answers an earlier incarnation's questions and streams `stale`, in its name, and takes what it tells", async () => {
    const [old, young] = [new Link(bus, "request r0", 1), new Link(bus, "request r0", 2)]
    await Effect.runPromise(ask(old))
    await Effect.runPromise(ask(young))
    expect(await failureOf(ask(old))).toMatchObject({ code: "stale", retryable: true, hop: "request r0", message: expect.stringContaining("epoch 1 of request r0 is over") })
    await expect(count(old)).rejects.toMatchObject({ code: "stale", hop: "request r0" })
    expect(await count(young)).toEqual(Uint8Array.of(1))
    await Effect.runPromise(old.tell(Note, at("note"), {}))
    await Effect.runPromise(ask(new Link(bus, "request r1", 1)))
    expect(notes).toBe(1)
  })

  it("answers what was meant for an earlier incarnation `stale`, in its own name, and leaves to a later one what is meant for that", async () => {
    const link = new Link(bus, "request r0", 1)
    await Effect.runPromise(ask(link, 5))
    expect(await failureOf(ask(link, 4))).toMatchObject({ code: "stale", hop: "worker w0", message: expect.stringContaining("epoch 4 is over, this is 5") })
    expect(await failureOf(ask(link, 6))).toMatchObject({ code: "deadline_exceeded" }) // nobody says a word
    await scope.start(actor(new Link(bus, "worker w0", 6), [onStream(Count, [{ subject: at("count") }], (_, writer) => Effect.sync(() => writer.write(Uint8Array.of(2))))]))
    expect(await count(link, 6)).toEqual(Uint8Array.of(2))
  })
})

describe("a cluster with somebody in it who is over", () => {
  let scope: TestScope
  let stop: () => Promise<void> = async () => {}
  beforeEach(() => void (scope = testScope()))
  afterEach(async () => {
    await scope.close()
    await stop()
    vi.restoreAllMocks()
  })
  const asked = { prompt: "The water comes down", max_tokens: 30, ignore_eos: true, temperature: 1, seed: 5 }

  it("a request actor that is over gives its requests back, and the client gets its answer from another", async () => {
    const node = await startNode({ change: (topology) => ({ ...topology, request: { replicas: 2 } }) })
    stop = node.stop
    const undisturbed = await streamCompletion(node, asked)
    const later = new Link(node.bus, "request r0", Date.now() + 1_000_000)
    const to = (verb: string) => subject(node.namespace, "scheduler", anyId, verb)
    const key = { requestId: "of a later one", attempt: 0 }
    await Effect.runPromise(later.ask(Place, to(Place.verb), { ...key, tokens: 1, hashes: new Uint8Array(0), choices: 1, maxTokens: 1, exclude: [] }, { hop: "scheduler" }))
    await Effect.runPromise(later.tell(Release, to(Release.verb), key))
    for (let i = 0; i < 4; i++) expect(await streamCompletion(node, asked)).toEqual(undisturbed)
    // Both have been asked: the one that is over stands in the way of nobody.
    expect(await failureOf(new Link(node.bus, "request r0", 1).ask(Place, to(Place.verb), { ...key, tokens: 1, hashes: new Uint8Array(0), choices: 1, maxTokens: 1, exclude: [] }, { hop: "scheduler" }))).toMatchObject({ code: "stale" })
  })

  it("a scheduler that is over is not believed, and the later one is asked", async () => {
    const cluster = await Cluster.start()
    stop = () => cluster.stop()
    const { bus, namespace } = cluster.node
    const message = { prompt: asked.prompt, maxTokens: 30 }
    const { tokens } = await cluster.generate(message)
    const running = cluster.generate({ ...message, maxTokens: 200 })
    // One of long ago that answers, too, until it hears of the other.
    await scope.start(schedulerActor({ link: new Link(bus, "scheduler s9", 1), namespace, policy: "least-loaded", queue: 8, members: await scope.start(Members.listen(bus, namespace)) }))
    for (let i = 0; i < 4; i++) expect((await cluster.generate({ ...message, cacheSalt: `${i}` })).tokens).toEqual(tokens)
    // One that speaks first, more often than a request may fail, and sends everybody where nobody is.
    let lies = 0
    const lying = bus.subscribe(subject(namespace, "scheduler", anyId, Place.verb), ({ reply }) => {
      if (++lies > limits.placementAttempts + 2) return
      bus.publish(reply!, Place.encodeReply({ prefill: "nowhere", decode: "nowhere", prefixBlocks: 0, estimates: { queuedTokens: 0, computeTokens: 0 }, epochs: { prefill: 1, decode: 1 }, epoch: 2 }))
    })
    expect((await cluster.generate({ ...message, cacheSalt: "lies" })).tokens).toEqual(tokens)
    expect(lies).toBeGreaterThan(limits.placementAttempts)
    lying.unsubscribe()
    // And one that takes over.
    const epoch = Date.now() + 1_000_000
    await scope.start(schedulerActor({ link: new Link(bus, "scheduler s0", epoch), namespace, policy: "least-loaded", queue: 8, members: await scope.start(Members.listen(bus, namespace)) }))
    await scope.start(announce({ link: new Link(bus, "scheduler s0", epoch), namespace, kind: "scheduler", id: "s0" }))
    for (let i = 4; i < 8; i++) expect((await cluster.generate({ ...message, cacheSalt: `${i}` })).tokens).toEqual(tokens)
    expect((await running).tokens[0]).toHaveLength(200)
  })

  it("a placement on a worker that is over is asked for again at once", async () => {
    const cluster = await Cluster.start()
    stop = () => cluster.stop()
    const { tokens } = await cluster.generate({ prompt: asked.prompt })
    const real = policies["cache-aware"]
    const spied = vi.spyOn(policies, "cache-aware").mockImplementationOnce((...given) => {
      const { prefill, decode, prefixBlocks } = real(...given)
      return { prefill, prefixBlocks, decode: { ...decode, epoch: decode.epoch - 1 } }
    })
    expect((await cluster.generate({ prompt: asked.prompt })).tokens).toEqual(tokens)
    expect(spied).toHaveBeenCalledTimes(2)
    const { namespace } = cluster.node
    const { epoch } = cluster.node.workers.get("w0")!.worker
    const drain = (meant: number) => cluster.link.ask(Drain, subject(namespace, "worker", "w0", Drain.verb), { deadlineMs: 0 }, { hop: "worker w0", epoch: meant })
    expect(await failureOf(drain(epoch - 1))).toMatchObject({ code: "stale" })
    expect(cluster.node.workers.get("w0")!.worker.roles).toEqual(["prefill", "decode"])
  })
})
