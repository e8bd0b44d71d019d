/** The memory bus passes the suite of all buses; and streams over a bus that loses and repeats messages. */
import { afterEach, beforeEach, describe, expect, it, vi } from "vitest"
import { limits } from "../../config/limits.ts"
import type { Bus, PublishOptions } from "../../actors/runtime/bus.ts"
import type { Fault } from "../../actors/runtime/fault.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { openStream, type StreamReader } from "../../actors/runtime/stream-reader.ts"
import { StreamWriter } from "../../actors/runtime/stream-writer.ts"
import { busConformance } from "../support/bus-conformance.ts"

busConformance("memory", async () => {
  const bus = new MemoryBus()
  return { bus, peer: bus, settled: async () => {}, disconnect: async () => bus.disconnect(), close: () => bus.close() }
})

describe("the bus memory, alone", () => {
  it("delivers to the others when a handler throws", async () => {
    const bus = new MemoryBus()
    const shown = vi.spyOn(console, "error").mockImplementation(() => {})
    bus.subscribe("a", () => {
      throw new Error("a defect")
    })
    const got = new Promise((resolve) => bus.subscribe("a", ({ data }) => resolve([...data])))
    bus.publish("a", Uint8Array.of(1, 2))
    expect(await got).toEqual([1, 2])
    expect(shown).toHaveBeenCalledOnce()
    shown.mockRestore()
  })
})

/** Passes on each message as often as `copies` says. */
class UnreliableBus extends MemoryBus {
  copies: (data: Uint8Array) => number = () => 1

  override publish(subject: string, data: Uint8Array, options?: PublishOptions): void {
    for (let copy = this.copies(data); copy > 0; copy--) super.publish(subject, data, options)
  }
}

const frameKind = { data: 1, end: 2, alive: 4, credit: 5 } as const

describe("a stream over a bus that loses messages", () => {
  let bus: UnreliableBus
  let reader: StreamReader
  let writer: StreamWriter
  let closed: Promise<Fault | undefined>

  const open = async (windowFrames = 64): Promise<void> => {
    writer = await new Promise<StreamWriter>((resolve) => {
      const subscription = bus.subscribe("stream", (delivery) => {
        subscription.unsubscribe()
        resolve(new StreamWriter(bus, delivery, "writer w0"))
      })
      reader = openStream(bus as Bus, "stream", new Uint8Array(0), { hop: "writer w0", windowFrames })
    })
    closed = new Promise((resolve) => writer.onClose(resolve))
  }
  /** Loses the n-th message (from 0) of a kind from now on. */
  const lose = (kind: number, nth = 0): void => {
    let seen = 0
    bus.copies = (data) => (data[0] === kind && seen++ === nth ? 0 : 1)
  }

  beforeEach(async () => {
    vi.useFakeTimers({ toFake: ["setInterval", "clearInterval", "performance"] })
    bus = new UnreliableBus()
    await open()
  })
  afterEach(() => {
    vi.useRealTimers()
    return bus.close()
  })

  it("fails at the frame after one that was lost, and the writer hears it", async () => {
    lose(frameKind.data, 1)
    for (const byte of [0, 1, 2]) writer.write(Uint8Array.of(byte))
    expect(await reader.next()).toEqual(Uint8Array.of(0))
    await expect(reader.next()).rejects.toMatchObject({ code: "disconnected", message: "writer w0: frame 1 was lost" })
    expect(await closed).toMatchObject({ code: "cancelled" })
  })

  it("fails at the next sign of life where the last frame was lost, and at the end where that is the next", async () => {
    lose(frameKind.data)
    writer.write(Uint8Array.of(0))
    const next = expect(reader.next()).rejects.toMatchObject({ code: "disconnected", message: "writer w0: frame 0 was lost" })
    await vi.advanceTimersByTimeAsync(limits.streamKeepAliveMs)
    await next

    await open()
    lose(frameKind.data)
    writer.write(Uint8Array.of(0))
    writer.end()
    await expect(reader.next()).rejects.toMatchObject({ code: "disconnected" })
  })

  it("fails where a frame comes twice, rather than giving it twice", async () => {
    bus.copies = (data) => (data[0] === frameKind.data ? 2 : 1)
    writer.write(Uint8Array.of(0))
    expect(await reader.next()).toEqual(Uint8Array.of(0))
    await expect(reader.next()).rejects.toMatchObject({ code: "disconnected" })
  })

  it("goes on after a credit that was lost, and is not granted more by one that comes twice", async () => {
    await open(4)
    lose(frameKind.credit)
    for (let i = 0; i < 6; i++) writer.write(Uint8Array.of(i))
    for (let i = 0; i < 2; i++) await reader.next()
    expect(writer.writable).toBe(false)
    await vi.advanceTimersByTimeAsync(limits.streamKeepAliveMs)
    bus.copies = (data) => (data[0] === frameKind.credit ? 3 : 1)
    for (let i = 2; i < 6; i++) expect(await reader.next()).toEqual(Uint8Array.of(i))
    await vi.advanceTimersByTimeAsync(0)
    let more = 0
    for (; writer.writable; more++) writer.write(Uint8Array.of(6))
    expect(more).toBe(4)
  })

  it("fails at the reader when it hears nothing any more, and at the writer too", async () => {
    bus.copies = () => 0
    const next = expect(reader.next()).rejects.toMatchObject({ code: "deadline_exceeded", hop: "writer w0" })
    await vi.advanceTimersByTimeAsync(limits.streamSilenceMs + 2 * limits.streamKeepAliveMs)
    await next
    expect(await closed).toMatchObject({ code: "disconnected", message: "writer w0: no sign of life from the reader" })
  })

  it("stays open while both sides are alive, however long nothing is said", async () => {
    await vi.advanceTimersByTimeAsync(10 * limits.streamSilenceMs)
    writer.write(Uint8Array.of(9))
    expect(await reader.next()).toEqual(Uint8Array.of(9))
    expect(writer.closed).toBe(false)
  })

  it("fails on hostile frames, and throws nothing at the bus", async () => {
    const shown = vi.spyOn(console, "error")
    const inboxes: Array<string> = []
    const { publish } = MemoryBus.prototype
    for (const hostile of [[], [frameKind.data], [3, 0, 0, 0, 0, 0, 0, 0, 0xc1], [frameKind.end, 0, 0, 0, 9, 0, 0, 0]]) {
      const spy = vi.spyOn(bus, "publish").mockImplementation((subject, data, options) => {
        if (options?.reply !== undefined) inboxes.push(options.reply)
        publish.call(bus, subject, data, options)
      })
      await open()
      spy.mockRestore()
      bus.publish(inboxes.at(-1)!, Uint8Array.from(hostile))
      await expect(reader.next()).rejects.toMatchObject({ _tag: "Fault" })
    }
    expect(shown).not.toHaveBeenCalled()
    shown.mockRestore()
  })
})
