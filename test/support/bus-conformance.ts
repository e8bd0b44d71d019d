/** What every bus does, and the links and streams on it: the suite that each implementation passes. */
import { Effect, Exit, Schema } from "effect"
import { afterEach, beforeEach, describe, expect, it } from "vitest"
import { limits } from "../../config/limits.ts"
import { header, type Bus, type Delivery } from "../../actors/runtime/bus.ts"
import { defineAsk, defineTell } from "../../actors/runtime/codec.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { Link } from "../../actors/runtime/link.ts"
import { openStream, type OpenStreamOptions } from "../../actors/runtime/stream-reader.ts"
import { frameKind, noBytes, streamFrame } from "../../actors/runtime/stream-frame.ts"
import { StreamWriter } from "../../actors/runtime/stream-writer.ts"
/** Two connections to one bus, or the same one twice where it has no connections. */
export interface BusUnderTest {
  readonly bus: Bus
  readonly peer: Bus
  /** Resolves once what either has subscribed to is known to both. */
  settled(): Promise<void>
  /** Cuts the connection of `bus`. */
  disconnect(): Promise<void>
  close(): Promise<void>
}

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)
const text = (data: Uint8Array): string => new TextDecoder().decode(data)

/** What a subscriber got, and a wait for the n-th. */
export class Received {
  readonly deliveries: Array<Delivery> = []
  readonly #waiting: Array<{ readonly count: number; readonly resolve: () => void }> = []

  readonly handler = (delivery: Delivery): void => {
    this.deliveries.push({ ...delivery, data: new Uint8Array(delivery.data) })
    for (const { count, resolve } of this.#waiting) if (this.deliveries.length >= count) resolve()
  }

  get texts(): Array<string> {
    return this.deliveries.map(({ data }) => text(data))
  }

  until(count: number): Promise<void> {
    return new Promise((resolve) => (this.deliveries.length >= count ? resolve() : this.#waiting.push({ count, resolve })))
  }
}

const faultOf = async (promise: Promise<unknown>): Promise<Fault> => {
  const error = await promise.then(
    () => new Error("it did not fail"),
    (reason: unknown) => reason,
  )
  if (!(error instanceof Fault)) throw error
  return error
}

const thrown = (run: () => unknown): unknown => {
  try {
    run()
  } catch (error) {
    return error
  }
  return undefined
}

const Double = defineAsk("double", Schema.Struct({ value: Schema.Int }), Schema.Struct({ value: Schema.Int }))
const Note = defineTell("note", Schema.Struct({ value: Schema.Int }))

export const busConformance = (name: string, makeBus: () => Promise<BusUnderTest>): void => {
  describe(`the bus ${name}`, () => {
    let tested: BusUnderTest
    let bus: Bus
    let peer: Bus
    beforeEach(async () => {
      tested = await makeBus()
      ;({ bus, peer } = tested)
    })
    afterEach(() => tested.close())

    const subscribe = async (subject: string, options: { readonly queue?: string } = {}, on: Bus = peer) => {
      const received = new Received()
      const subscription = on.subscribe(subject, received.handler, options)
      await tested.settled()
      return { received, subscription }
    }

    it("delivers one publisher's messages in order, after publish has returned", async () => {
      const { received } = await subscribe("test.order")
      const sent = Array.from({ length: 500 }, (_, i) => String(i))
      for (const message of sent) bus.publish("test.order", bytes(message))
      expect(received.texts).toEqual([])
      await received.until(500)
      expect(received.texts).toEqual(sent)
    })

    it("carries the subject, the headers and where to answer", async () => {
      const { received } = await subscribe("test.envelope")
      bus.publish("test.envelope", bytes("hello"), { reply: "test.answer", headers: { "ps-sender": "a", traceparent: "00-é" } })
      await received.until(1)
      const [{ subject, headers, reply, data }] = received.deliveries as [Delivery]
      expect({ subject, reply, text: text(data) }).toEqual({ subject: "test.envelope", reply: "test.answer", text: "hello" })
      expect(headers["ps-sender"]).toBe("a")
    })

    it("gives a message to every subscriber without a queue, and to one of a queue group", async () => {
      const all = [await subscribe("test.groups"), await subscribe("test.groups", {}, bus)]
      const group = [await subscribe("test.groups", { queue: "q" }), await subscribe("test.groups", { queue: "q" }, bus), await subscribe("test.groups", { queue: "q" })]
      const other = await subscribe("test.groups", { queue: "other" })
      const sent = Array.from({ length: 300 }, (_, i) => String(i))
      for (const message of sent) bus.publish("test.groups", bytes(message))
      for (const { received } of [...all, other]) await received.until(300)
      for (const { received } of [...all, other]) expect(received.texts).toEqual(sent)
      while (group.reduce((sum, { received }) => sum + received.deliveries.length, 0) < 300) await new Promise((resolve) => setImmediate(resolve))
      expect(group.flatMap(({ received }) => received.texts).sort((a, b) => Number(a) - Number(b))).toEqual(sent)
      for (const { received } of group) expect(received.deliveries.length).toBeGreaterThan(0)
    })

    it("delivers nothing after unsubscribe, and an unsubscribe that is repeated is harmless", async () => {
      const { received, subscription } = await subscribe("test.leave")
      const { received: stays } = await subscribe("test.leave")
      bus.publish("test.leave", bytes("1"))
      await Promise.all([received.until(1), stays.until(1)])
      subscription.unsubscribe()
      subscription.unsubscribe()
      await tested.settled()
      bus.publish("test.leave", bytes("2"))
      await stays.until(2)
      expect(received.texts).toEqual(["1"])
    })

    it("answers at once where nobody serves a subject that expects an answer, and drops what expects none", async () => {
      const inbox = bus.inbox()
      const { received } = await subscribe(inbox, {}, bus)
      bus.publish("test.nobody", bytes("lost"))
      bus.publish("test.nobody", bytes("asked"), { reply: inbox })
      await received.until(1)
      expect(received.deliveries).toHaveLength(1)
      expect(received.deliveries[0]!.headers[header.noResponders]).toBeDefined()
      expect(received.deliveries[0]!.data.byteLength).toBe(0)
    })

    it("has inboxes of its own, each different", () => {
      expect(new Set([bus.inbox(), bus.inbox(), bus.inbox()]).size).toBe(3)
    })

    it("carries a message of the greatest size, and refuses a larger one by naming subject, size and limit", async () => {
      const { received } = await subscribe("test.size")
      const most = bus.maxPayloadBytes - 256 // room for headers, which count too
      bus.publish("test.size", new Uint8Array(most).fill(7))
      await received.until(1)
      expect(received.deliveries[0]!.data.byteLength).toBe(most)
      const refused = thrown(() => bus.publish("test.size", new Uint8Array(bus.maxPayloadBytes + 1)))
      expect(refused).toBeInstanceOf(Fault)
      expect((refused as Fault).message).toContain("test.size")
      expect((refused as Fault).message).toContain(String(bus.maxPayloadBytes))
      expect(thrown(() => bus.publish("test.size", new Uint8Array(most), { headers: { long: "x".repeat(512) } }))).toBeInstanceOf(Fault)
    })

    it("delivers what is on its way when it is closed, then refuses everything", async () => {
      const { received } = await subscribe("test.close")
      bus.publish("test.close", bytes("last"))
      await bus.close()
      await received.until(1)
      expect(thrown(() => bus.publish("test.close", bytes("late")))).toMatchObject({ code: "unavailable" })
      expect(thrown(() => bus.subscribe("test.close", () => {}))).toMatchObject({ code: "unavailable" })
      const link = new Link(bus, "test", 1)
      expect(await Effect.runPromise(Effect.flip(link.ask(Double, "test.double", { value: 1 }, { hop: "doubler" })))).toMatchObject({ code: "unavailable" })
      expect(await Effect.runPromise(Effect.flip(link.tell(Note, "test.note", { value: 1 })))).toMatchObject({ code: "unavailable" })
      expect(await faultOf(openStream(bus, "test.stream", bytes(""), { hop: "streamer" }).next())).toMatchObject({ code: "unavailable" })
    })

    describe("asked over a link", () => {
      const ask = (value: number, deadlineMs?: number) => Effect.runPromiseExit(new Link(bus, "asker", 7).ask(Double, "test.double", { value }, { hop: "doubler d0", deadlineMs }))
      const failure = async (outcome: Promise<Exit.Exit<unknown, Fault>>): Promise<Fault> => Effect.runPromise(Effect.flip(Effect.flatten(Effect.promise(() => outcome))))

      it("answers each asker", async () => {
        const link = new Link(peer, "doubler", 1)
        peer.subscribe("test.double", ({ data, reply }) => link.reply(Double, reply!, { value: Double.decode(data).value * 2 }))
        await tested.settled()
        const answers = await Promise.all([1, 2, 3].map((value) => ask(value)))
        expect(answers).toEqual([2, 4, 6].map((value) => Exit.succeed({ value })))
      })

      it("fails with the hop's name where nobody serves it, at once", async () => {
        expect(await failure(ask(1, 60_000))).toMatchObject({ code: "unavailable", hop: "doubler d0", retryable: true })
      })

      it("fails with the hop's name at its deadline", async () => {
        await subscribe("test.double")
        expect(await failure(ask(1, 10))).toMatchObject({ code: "deadline_exceeded", hop: "doubler d0", message: expect.stringContaining("doubler d0: double: no answer within 10 ms") })
      })

      it("fails when the connection is lost", async () => {
        const { received } = await subscribe("test.double")
        const asked = failure(ask(1, 60_000))
        await received.until(1)
        await tested.disconnect()
        expect(await asked).toMatchObject({ code: "disconnected", retryable: true })
      })
    })

    describe("with streams", () => {
      /** Opens a stream from `bus` to a writer on `peer`. */
      const open = async (options: Partial<OpenStreamOptions> = {}) => {
        const subject = `test.stream.${Math.random().toString(36).slice(2)}`
        const accepted = new Promise<StreamWriter>((resolve) => {
          const subscription = peer.subscribe(subject, (delivery) => {
            subscription.unsubscribe()
            resolve(new StreamWriter(peer, delivery, "writer w0"))
          })
        })
        await tested.settled()
        const reader = openStream(bus, subject, bytes("open"), { hop: "writer w0", ...options })
        return { reader, accepted }
      }
      const opened = async (options: Partial<OpenStreamOptions> = {}) => {
        const { reader, accepted } = await open(options)
        const writer = await accepted
        return { reader, writer, closed: new Promise<Fault | undefined>((resolve) => writer.onClose(resolve)) }
      }

      it("gives the reader every frame in order and then the end, whatever the window", async () => {
        for (const windowFrames of [1, 2, 3, 64]) {
          const { reader, writer, closed } = await opened({ windowFrames })
          const sent = Array.from({ length: 200 }, (_, i) => String(i))
          for (const frame of sent) writer.write(bytes(frame))
          writer.end()
          const got: Array<string> = []
          for await (const frame of reader) got.push(text(frame))
          expect(got).toEqual(sent)
          expect(await closed).toBeUndefined()
          expect(await reader.next()).toBeUndefined()
        }
      })

      it("sends no more frames than the reader has granted, tells when it may go on, and keeps what was written beyond", async () => {
        const { reader, writer } = await opened({ windowFrames: 8 })
        let sent = 0
        const fill = () => {
          while (writer.writable) writer.write(bytes(String(sent++)))
        }
        writer.onWritable(fill)
        fill()
        expect(sent).toBe(8)
        for (let i = 0; i < 100; i++) {
          expect(text((await reader.next())!)).toBe(String(i))
          expect(sent).toBeLessThanOrEqual(i + 1 + 8)
        }
        writer.onWritable(() => {})
        const waited = writer.untilWritable()
        // How many frames are on their way depends on the bus, so it reads until there is credit.
        const read = (async () => {
          for await (const frame of reader) void frame
        })().catch(() => {})
        await waited
        reader.cancel("enough")
        await read
      })

      it("fails at the writer when a reader takes nothing and it writes on all the same", async () => {
        const { reader, writer, closed } = await opened({ windowFrames: 1 })
        for (let i = 0; i < limits.streamBacklogFrames + 2; i++) writer.write(bytes("x"))
        expect(await closed).toMatchObject({ code: "overloaded" })
        expect(text((await reader.next())!)).toBe("x")
        expect(await faultOf(reader.next())).toMatchObject({ code: "overloaded" })
      })

      it("ends for the reader with the writer's fault, after the frames before it", async () => {
        const { reader, writer, closed } = await opened()
        writer.write(bytes("one"))
        const fault = new Fault({ code: "overloaded", message: "no more", hop: "writer w0", param: "n", retryAfterMs: 5 })
        writer.fail(fault)
        expect(text((await reader.next())!)).toBe("one")
        expect(await faultOf(reader.next())).toEqual(fault)
        expect(await closed).toEqual(fault)
        writer.write(bytes("late"))
        writer.end()
        expect(writer.closed).toBe(true)
      })

      it("tells the writer that its reader has cancelled, and releases who waits for credit", async () => {
        const { reader, writer, closed } = await opened({ windowFrames: 1 })
        writer.write(bytes("one"))
        const waited = writer.untilWritable()
        await reader.next()
        reader.cancel("the client is gone")
        expect(await closed).toMatchObject({ code: "cancelled", message: expect.stringContaining("the client is gone") })
        await waited
        expect(await faultOf(reader.next())).toMatchObject({ code: "cancelled" })
        expect(writer.writable).toBe(false)
        const late = new Promise((resolve) => writer.onClose(resolve))
        expect(await late).toMatchObject({ code: "cancelled" })
      })

      it("cancels when the reader's loop is left", async () => {
        const { reader, writer, closed } = await opened()
        writer.write(bytes("one"))
        writer.write(bytes("two"))
        for await (const frame of reader) {
          expect(text(frame)).toBe("one")
          break
        }
        expect(await closed).toMatchObject({ code: "cancelled" })
      })

      it("cancels a stream that was not accepted yet as soon as it is", async () => {
        const { reader, accepted } = await open()
        reader.cancel("changed my mind")
        const writer = await accepted
        expect(await new Promise((resolve) => writer.onClose(resolve))).toMatchObject({ code: "cancelled", message: expect.stringContaining("changed my mind") })
      })

      it("fails at once where nobody serves it, and with the fault of who refuses it", async () => {
        expect(await faultOf(openStream(bus, "test.nobody", bytes(""), { hop: "writer w9" }).next())).toMatchObject({ code: "unavailable", hop: "writer w9" })
        peer.subscribe("test.refused", ({ reply }) => peer.publish(reply!, bytes("nonsense"), { headers: { [header.fault]: "overloaded" } }))
        await tested.settled()
        expect(await faultOf(openStream(bus, "test.refused", bytes(""), { hop: "writer w0" }).next())).toMatchObject({ code: "internal", hop: "writer w0" })
      })

      it("fails when nobody accepts it in time", async () => {
        await subscribe("test.silent")
        const reader = openStream(bus, "test.silent", bytes(""), { hop: "writer w0", openDeadlineMs: 10 })
        expect(await faultOf(reader.next())).toMatchObject({ code: "deadline_exceeded", hop: "writer w0", retryable: true })
      })

      it("is broken off where the writer minds no credits: what was granted is there, and the writer hears why", async () => {
        const control = peer.inbox()
        const { received: heard } = await subscribe(control)
        peer.subscribe("test.flood", ({ reply }) => {
          peer.publish(reply!, streamFrame(frameKind.open, 0, bytes(control)))
          for (let i = 0; i < 20; i++) peer.publish(reply!, streamFrame(frameKind.data, i, bytes(String(i))))
          peer.publish(reply!, streamFrame(frameKind.end, 20, noBytes))
        })
        await tested.settled()
        const reader = openStream(bus, "test.flood", bytes(""), { hop: "writer w0", windowFrames: 4 })
        // The reader takes nothing before the writer has been told; turns are counted, so that a flood that goes through fails here.
        for (let turn = 0; turn < 200 && heard.deliveries.length === 0; turn++) await tested.settled()
        expect(heard.deliveries.map(({ data }) => data[0])).toEqual([frameKind.cancel])
        expect(heard.texts[0]).toContain("more frames than were granted")
        for (let i = 0; i < 4; i++) expect(text((await reader.next())!)).toBe(String(i))
        expect(await faultOf(reader.next())).toMatchObject({ code: "disconnected", hop: "writer w0", message: expect.stringContaining("more frames than were granted") })
      })

      it("fails on both sides with a frame that is larger than the bus carries", async () => {
        const { reader, writer, closed } = await opened()
        writer.write(new Uint8Array(bus.maxPayloadBytes + 1))
        expect(await closed).toMatchObject({ code: "invalid_request" })
        expect(await faultOf(reader.next())).toMatchObject({ code: "invalid_request", message: expect.stringContaining(String(bus.maxPayloadBytes)) })
      })

      it("fails on both sides when the connection is lost", async () => {
        const { reader, writer, closed } = await opened()
        writer.write(bytes("one"))
        await reader.next()
        const next = faultOf(reader.next())
        await tested.disconnect()
        expect(await next).toMatchObject({ code: "disconnected", retryable: true })
        if (bus === peer) expect(await closed).toMatchObject({ code: "disconnected" })
      })

      it("fails when its bus is closed", async () => {
        const { reader } = await opened()
        const next = faultOf(reader.next())
        await bus.close()
        expect(await next).toMatchObject({ code: "disconnected" })
      })
    })
  })
}
