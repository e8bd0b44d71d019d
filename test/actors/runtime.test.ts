/** What every actor relies on: the mailbox and its loop, the supervisor, links and the codec. */
import { Deferred, Effect, Exit, Fiber, Schema } from "effect"
import { TestClock } from "effect/testing"
import fc from "fast-check"
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import { actor, onAsk, onStream, onTell, type Handler } from "../../actors/runtime/actor.ts"
import { header, protocolVersion } from "../../actors/runtime/bus.ts"
import { decodeFault, defineAsk, defineStream, defineTell, encodeFault, pack } from "../../actors/runtime/codec.ts"
import { Fault, FaultCode } from "../../actors/runtime/fault.ts"
import { Link } from "../../actors/runtime/link.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import type { StreamWriter } from "../../actors/runtime/stream-writer.ts"
import { supervise } from "../../actors/runtime/supervisor.ts"
import { failureOf, started, testScope, until, type TestScope } from "../support/scoped.ts"

const Value = Schema.Struct({ value: Schema.Int })
const Note = defineTell("note", Value)
const Double = defineAsk("double", Value, Value)
const Count = defineStream("count", Value)
const at = (subject: string) => [{ subject }]
const faulty = (code: Fault["code"] = "overloaded") => new Fault({ code, message: `said ${code}`, hop: "test", retryAfterMs: 5 })

describe("an actor", () => {
  let bus: MemoryBus
  let scope: TestScope
  let link: Link
  let shown: ReturnType<typeof vi.spyOn>
  beforeEach(() => {
    bus = new MemoryBus()
    scope = testScope()
    link = new Link(bus, "asker", 1)
    shown = vi.spyOn(console, "error").mockImplementation(() => {})
  })
  afterEach(async () => {
    await scope.close()
    await bus.close()
    shown.mockRestore()
  })

  const run = (handlers: ReadonlyArray<Handler>) => scope.start(actor(new Link(bus, "actor a0", 1), handlers))
  const tell = (value: number) => Effect.runPromise(link.tell(Note, "note", { value }))
  const ask = (value: number, deadlineMs?: number) => link.ask(Double, "double", { value }, { hop: "actor a0", deadlineMs })
  const double = onAsk(Double, at("double"), ({ value }) => Effect.succeed({ value: 2 * value }))

  it("handles messages in order, one at a time, whatever the handler waits for", async () => {
    const log: Array<string> = []
    await run([
      onTell(Note, at("note"), ({ value }) =>
        Effect.gen(function* () {
          log.push(`begin ${value}`)
          yield* Effect.yieldNow
          yield* Effect.promise(() => new Promise((resolve) => setImmediate(resolve)))
          log.push(`end ${value}`)
        }),
      ),
      double,
    ])
    for (const value of [1, 2, 3]) await tell(value)
    await Effect.runPromise(ask(0))
    expect(log).toEqual([1, 2, 3].flatMap((value) => [`begin ${value}`, `end ${value}`]))
  })

  it("goes on after bad messages, faults and defects, and answers each with a fault", async () => {
    await run([
      onTell(Note, at("note"), ({ value }) => (value < 0 ? Effect.die(new Error("a secret")) : Effect.fail(faulty()))),
      onAsk(Double, at("double"), ({ value }) => {
        if (value === 1) return Effect.fail(faulty())
        if (value === 2) return Effect.die(new Error("a secret"))
        if (value === 3) throw new Error("a secret")
        return Effect.succeed({ value })
      }),
    ])
    await tell(1)
    await tell(-1)
    bus.publish("note", Uint8Array.of(0xc1), { headers: { [header.version]: protocolVersion } })
    expect(await failureOf(ask(1))).toEqual(faulty())
    expect(await failureOf(ask(2))).toMatchObject({ code: "internal", hop: "actor a0", message: expect.not.stringContaining("secret") })
    expect(await failureOf(ask(3))).toMatchObject({ code: "internal" })
    expect(await failureOf(link.ask(Double, "double", { value: 0.5 }, { hop: "actor a0" }))).toMatchObject({ code: "invalid_request", message: expect.stringMatching(/double: .*value/s) })
    expect(await Effect.runPromise(ask(7))).toEqual({ value: 7 })
    expect(shown.mock.calls.join()).toContain("a secret")
  })

  it("refuses another version of the protocol by name", async () => {
    await run([double])
    const answer = new Promise<Fault>((resolve) => bus.subscribe("answer", ({ data }) => resolve(decodeFault(data, "?"))))
    bus.publish("double", Double.encode({ value: 1 }), { reply: "answer", headers: { [header.version]: "0" } })
    expect(await answer).toMatchObject({ code: "invalid_request", message: `actor a0: speaks protocol version ${protocolVersion}, not 0` })
  })

  it("refuses what does not fit its mailbox as overloaded, and serves what does", async () => {
    const gate = Deferred.makeUnsafe<void>()
    let handled = 0
    await run([onAsk(Double, at("double"), ({ value }) => Effect.as(Effect.andThen(Effect.sync(() => handled++), Deferred.await(gate)), { value }))])
    const first = started(ask(-1, 30_000))
    await until(() => handled === 1)
    const asked = Array.from({ length: limits.mailboxMessages + 5 }, (_, value) => started(ask(value, 30_000)))
    for (const { exit } of asked.slice(limits.mailboxMessages)) expect(await exit).toEqual(Exit.fail(expect.objectContaining({ code: "overloaded", retryAfterMs: limits.retryAfterMs })))
    Effect.runSync(Deferred.succeed(gate, undefined))
    expect(await first.exit).toEqual(Exit.succeed({ value: -1 }))
    for (const [value, { exit }] of asked.slice(0, limits.mailboxMessages).entries()) expect(await exit).toEqual(Exit.succeed({ value }))
  })

  it("lets concurrent asks wait beside each other, up to a bound", async () => {
    const gate = Deferred.makeUnsafe<void>()
    await run([onAsk(Double, at("double"), ({ value }) => (value < 0 ? Effect.succeed({ value }) : Effect.as(Deferred.await(gate), { value })), { concurrent: true })])
    const waiting = [1, 2, 3].map((value) => started(ask(value, 30_000)))
    expect(await Effect.runPromise(ask(-1))).toEqual({ value: -1 })
    const crowd = Array.from({ length: limits.actorStreams }, (_, i) => started(ask(i, 30_000)))
    const last = await Promise.all(crowd.slice(-3).map(({ exit }) => exit))
    for (const exit of last) expect(exit).toEqual(Exit.fail(expect.objectContaining({ code: "overloaded" })))
    Effect.runSync(Deferred.succeed(gate, undefined))
    expect(await Promise.all(waiting.map(({ exit }) => exit))).toEqual([1, 2, 3].map((value) => Exit.succeed({ value })))
  })

  it("interrupts a handler whose asker has no time left", async () => {
    let interrupted = false
    await run([onAsk(Double, at("double"), () => Effect.onInterrupt(Effect.never, () => Effect.sync(() => void (interrupted = true))))])
    expect(await failureOf(ask(1, 10))).toMatchObject({ code: "deadline_exceeded", hop: "actor a0" })
    await until(() => interrupted)
  })

  describe("that streams", () => {
    const open = () => Effect.runPromise(link.open(Count, "count", { value: 3 }, { hop: "actor a0" }))
    const counted = (message: { readonly value: number }, writer: StreamWriter) => Effect.sync(() => Array.from({ length: message.value }, (_, i) => writer.write(Uint8Array.of(i))))

    it("ends the stream with its handler, after what was written", async () => {
      await run([onStream(Count, at("count"), (message, writer) => Effect.asVoid(counted(message, writer)))])
      const frames: Array<number> = []
      for await (const [byte] of await open()) frames.push(byte!)
      expect(frames).toEqual([0, 1, 2])
    })

    it("fails the stream with the handler's fault, its defect, or what is wrong with the message", async () => {
      const outcomes: ReadonlyArray<readonly [Effect.Effect<void, Fault>, Partial<Fault>]> = [
        [Effect.fail(faulty()), faulty()],
        [Effect.die(new Error("a secret")), { code: "internal", hop: "actor a0" }],
        [Effect.interrupt, { code: "shutting_down" }],
      ]
      let outcome: Effect.Effect<void, Fault> = Effect.void
      await run([onStream(Count, at("count"), () => outcome)])
      for (const [effect, fault] of outcomes) {
        outcome = effect
        await expect((await open()).next()).rejects.toMatchObject({ ...fault })
      }
      const bad = await Effect.runPromise(link.open(Count, "count", { value: 0.5 }, { hop: "actor a0" }))
      await expect(bad.next()).rejects.toMatchObject({ code: "invalid_request" })
    })

    it("interrupts the handler when the reader cancels, and serves others meanwhile", async () => {
      let interrupted = 0
      await run([onStream(Count, at("count"), (message, writer) => Effect.andThen(counted(message, writer), Effect.onInterrupt(Effect.never, () => Effect.sync(() => void interrupted++))))])
      const [first, second] = [await open(), await open()]
      await first.next()
      first.cancel("enough")
      await until(() => interrupted === 1)
      expect([await second.next(), await second.next()]).toEqual([Uint8Array.of(0), Uint8Array.of(1)])
      second.cancel("enough")
      await until(() => interrupted === 2)
    })
  })

  it("answers everybody when it leaves: who is served, who waits beside, who is queued, who streams; then nobody", async () => {
    let begun = 0
    let freed = 0
    const never = Effect.andThen(Effect.sync(() => begun++), Effect.onInterrupt(Effect.never, () => Effect.sync(() => void freed++)))
    await run([
      onAsk(Double, at("double"), () => never),
      onAsk(Double, at("beside"), () => never, { concurrent: true }),
      onStream(Count, at("count"), (_, writer) => Effect.andThen(Effect.sync(() => writer.write(Uint8Array.of(1))), never)),
    ])
    const stream = await Effect.runPromise(link.open(Count, "count", { value: 1 }, { hop: "actor a0" }))
    await stream.next()
    const asked = ["beside", "double", "double", "beside"].map((subject) => started(link.ask(Double, subject, { value: 1 }, { hop: "actor a0", deadlineMs: 30_000 })))
    await until(() => begun === 3)
    await scope.close()
    for (const { exit } of asked) expect(await exit).toEqual(Exit.fail(expect.objectContaining({ code: "shutting_down", retryable: true })))
    await expect(stream.next()).rejects.toMatchObject({ code: "shutting_down" })
    expect({ begun, freed }).toEqual({ begun: 3, freed: 3 }) // what was queued had not begun
    expect(await failureOf(ask(1))).toMatchObject({ code: "unavailable" })
  })

  it("works under the trace of whoever sent the message", async () => {
    const traces: Array<string> = []
    const note = Effect.flatMap(Effect.currentSpan, (span) => Effect.sync(() => void traces.push(span.traceId))).pipe(Effect.orDie, Effect.withSpan("inside"))
    await run([
      onTell(Note, at("note"), () => note),
      onAsk(Double, at("double"), (message) => Effect.as(note, message)),
      onStream(Count, at("count"), () => note),
    ])
    const asked = Effect.gen(function* () {
      yield* link.tell(Note, "note", { value: 1 })
      yield* ask(1)
      const stream = yield* link.open(Count, "count", { value: 1 }, { hop: "actor a0" })
      yield* Effect.promise(() => stream.next())
      return (yield* Effect.currentSpan).traceId
    }).pipe(Effect.withSpan("outside"))
    const trace = await Effect.runPromise(asked)
    expect(trace).toMatch(/^[0-9a-f]{32}$/)
    expect(traces).toEqual([trace, trace, trace])
    await tell(1)
    await until(() => traces.length === 4)
    expect(traces[3]).not.toBe(trace)
  })
})

describe("a supervisor", () => {
  let shown: ReturnType<typeof vi.spyOn>
  beforeEach(() => void (shown = vi.spyOn(console, "error").mockImplementation(() => {})))
  afterEach(() => shown.mockRestore())

  /** A body whose incarnations are told to fail one by one. */
  const incarnations = () => {
    const log: Array<string> = []
    const fail: Array<(cause: Effect.Effect<never, string>) => void> = []
    const body = (ready: Effect.Effect<void>) =>
      Effect.gen(function* () {
        const number = log.filter((line) => line.startsWith("start")).length
        log.push(`start ${number}`)
        yield* Effect.addFinalizer(() => Effect.sync(() => void log.push(`freed ${number}`)))
        yield* ready
        return yield* Effect.callback<never, string>((resume) => void fail.push(resume))
      })
    return { log, fail, body }
  }

  it("frees what failed before it starts it again, after a delay, and stops it with the Scope", async () => {
    const { log, fail, body } = incarnations()
    const program = Effect.scoped(
      Effect.gen(function* () {
        yield* supervise("w0", body)
        yield* TestClock.adjust(0)
        expect(log).toEqual(["start 0"])
        fail[0]!(Effect.fail("broken"))
        yield* TestClock.adjust(limits.restartDelayMs - 1)
        expect(log).toEqual(["start 0", "freed 0"])
        yield* TestClock.adjust(1)
        expect(log).toEqual(["start 0", "freed 0", "start 1"])
        fail[1]!(Effect.die(new Error("a defect")))
        yield* TestClock.adjust(limits.restartDelayMs)
        fail[2]!(Effect.interrupt)
        yield* TestClock.adjust(limits.restartDelayMs)
        expect(log.at(-1)).toBe("start 3")
      }),
    )
    await Effect.runPromise(Effect.provide(program, TestClock.layer()))
    expect(log.slice(-2)).toEqual(["start 3", "freed 3"])
    expect(shown.mock.calls.join()).toContain("w0 failed and is restarted in")
  })

  it("says in one line why something failed that was to be expected, and shows where a defect is", async () => {
    const fail: Array<(exit: Effect.Effect<never, Error>) => void> = []
    const body = (ready: Effect.Effect<void>) => Effect.andThen(ready, Effect.callback<never, Error>((resume) => void fail.push(resume)))
    const program = Effect.scoped(
      Effect.gen(function* () {
        yield* supervise("w0", body)
        yield* TestClock.adjust(0)
        fail[0]!(Effect.fail(new Error("its process ended")))
        yield* TestClock.adjust(limits.restartDelayMs)
        fail[1]!(Effect.die(new Error("a defect")))
        yield* TestClock.adjust(limits.restartDelayMs)
      }),
    )
    await Effect.runPromise(Effect.provide(program, TestClock.layer()))
    const [expected, defect] = shown.mock.calls.map(String)
    expect(expected).toBe(`w0 failed and is restarted in ${limits.restartDelayMs} ms: its process ended`)
    expect(defect).toMatch(/a defect\n\s+at /)
  })

  it("waits longer each time that it fails before it serves, up to a bound", async () => {
    let starts = 0
    const body = (ready: Effect.Effect<void>) => Effect.gen(function* () {
      if (starts++ === 0) yield* ready
      return yield* Effect.fail("broken")
    })
    const program = Effect.scoped(
      Effect.gen(function* () {
        yield* supervise("w0", body)
        for (let delayMs: number = limits.restartDelayMs, expected = 1; delayMs <= 4 * limits.restartDelayMaxMs; delayMs *= 2) {
          const boundedMs = Math.min(delayMs, limits.restartDelayMaxMs)
          yield* TestClock.adjust(boundedMs - 1)
          expect(starts).toBe(expected)
          yield* TestClock.adjust(1)
          expect(starts).toBe(++expected)
        }
      }),
    )
    await Effect.runPromise(Effect.provide(program, TestClock.layer()))
  })

  it("gives a failure before it serves to its caller, and does not start again", async () => {
    let starts = 0
    const outcome = Effect.scoped(
      supervise("w0", () =>
        Effect.suspend(() => {
          starts++
          return Effect.fail("no such model")
        }),
      ),
    )
    expect(await failureOf(outcome)).toBe("no such model")
    expect(starts).toBe(1)
  })
})

describe("a link", () => {
  it("leaves nothing behind when whoever asks gives up", async () => {
    const bus = new MemoryBus()
    const link = new Link(bus, "asker", 3)
    let inbox = ""
    const asked = new Promise<void>((resolve) =>
      bus.subscribe("double", ({ reply, headers }) => {
        inbox = reply!
        expect(headers).toMatchObject({ [header.version]: protocolVersion, [header.sender]: "asker", [header.epoch]: "3", [header.budgetMs]: "1234" })
        resolve()
      }),
    )
    const fiber = Effect.runFork(link.ask(Double, "double", { value: 1 }, { hop: "a0", deadlineMs: 1234 }))
    await asked
    await Effect.runPromise(Fiber.interrupt(fiber))
    const unheard = new Promise<string | undefined>((resolve) => bus.subscribe("unheard", ({ headers }) => resolve(headers[header.noResponders])))
    bus.publish(inbox, new Uint8Array(0), { reply: "unheard" })
    expect(await unheard).toBe(inbox)
    await bus.close()
  })

  it("fails where the answer is not what was promised", async () => {
    const bus = new MemoryBus()
    bus.subscribe("double", ({ reply }) => bus.publish(reply!, pack({ value: "two" })))
    expect(await failureOf(new Link(bus, "asker", 1).ask(Double, "double", { value: 1 }, { hop: "a0" }))).toMatchObject({ code: "invalid_request", message: expect.stringContaining("the answer to double") })
    await bus.close()
  })
})

describe("the codec", () => {
  const All = defineAsk(
    "all",
    Schema.Struct({
      text: Schema.String,
      number: Schema.Finite,
      flag: Schema.Boolean,
      bytes: Schema.Uint8Array,
      list: Schema.Array(Schema.Struct({ id: Schema.Int, name: Schema.optional(Schema.String) })),
    }),
    Schema.Void as Schema.Codec<void, void, never, never>,
  )
  const message = fc.record({
    text: fc.string({ unit: "binary" }),
    number: fc.double({ noNaN: true, noDefaultInfinity: true }),
    flag: fc.boolean(),
    bytes: fc.uint8Array({ maxLength: 300 }),
    list: fc.array(fc.record({ id: fc.maxSafeInteger(), name: fc.string() }, { requiredKeys: ["id"] })),
  })
  const fault = fc
    .record({ code: fc.constantFrom(...FaultCode.literals), message: fc.string(), hop: fc.string(), param: fc.string(), retryAfterMs: fc.nat() }, { requiredKeys: ["code", "message", "hop"] })
    .map((fields) => new Fault(fields))

  it("gives back what was sent, and bytes that are the receiver's own", () => {
    fc.assert(
      fc.property(message, (sent) => {
        const packed = new Uint8Array(All.encode(sent))
        const got = All.decode(packed)
        packed.fill(0)
        expect(got.text).toBe(sent.text)
        expect(Object.is(got.number, sent.number) || got.number === sent.number).toBe(true)
        expect([...got.bytes]).toEqual([...sent.bytes])
        expect({ ...got, number: 0, bytes: 0 }).toEqual({ ...sent, number: 0, bytes: 0 })
      }),
    )
  })

  it("gives back every fault with its code, its place and whether to try again", () => {
    fc.assert(
      fc.property(fault, (sent) => {
        const got = decodeFault(encodeFault(sent), "elsewhere")
        expect(got).toEqual(sent)
        expect(got.retryable).toBe(sent.retryable)
      }),
    )
  })

  it("throws a Fault that names the message on bytes that are not one, cut short or hostile, and nothing else", () => {
    const attempt = (bytes: Uint8Array): void => {
      try {
        All.decode(bytes)
      } catch (error) {
        expect(error).toBeInstanceOf(Fault)
        expect(error).toMatchObject({ code: "invalid_request", hop: "all" })
      }
      expect(decodeFault(bytes, "elsewhere")).toBeInstanceOf(Fault)
    }
    fc.assert(fc.property(fc.uint8Array({ maxLength: 64 }), attempt), { numRuns: 2000 })
    fc.assert(
      fc.property(message, fc.nat(), fc.nat(255), (sent, place, byte) => {
        const packed = new Uint8Array(All.encode(sent))
        attempt(packed.subarray(0, place % packed.length))
        packed[place % packed.length] = byte
        attempt(packed)
      }),
    )
    // What came before does no harm to the next.
    expect(All.decode(All.encode({ text: "a", number: 1, flag: true, bytes: Uint8Array.of(1), list: [] }))).toMatchObject({ text: "a" })
  })

  it("makes a Fault of anything that was thrown, without its details", () => {
    expect(Fault.from(new Error("a secret"), "here")).toMatchObject({ code: "internal", hop: "here", message: expect.not.stringContaining("secret") })
    expect(Fault.from(faulty(), "here")).toEqual(faulty())
  })
})
