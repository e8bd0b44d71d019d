/** The bridge passes the suite of all buses, alone and joined to others; and is joined and left alone again while it is used. */
import { randomBytes } from "node:crypto"
import { Effect, Schema } from "effect"
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest"
import { bufferSink, bufferSource } from "../../actors/kv-store/block-buffers.ts"
import { everyGeneration, inboxPrefix, namespaceOf } from "../../actors/messages/subjects.ts"
import { BridgeBus } from "../../actors/runtime/bridge-bus.ts"
import { header, type Bus, type Buses } from "../../actors/runtime/bus.ts"
import { defineAsk } from "../../actors/runtime/codec.ts"
import type { Fault } from "../../actors/runtime/fault.ts"
import { Link } from "../../actors/runtime/link.ts"
import { connectBuses, NatsBus } from "../../actors/runtime/nats-bus.ts"
import { openStream } from "../../actors/runtime/stream-reader.ts"
import { StreamWriter } from "../../actors/runtime/stream-writer.ts"
import { TransferReceiver } from "../../actors/transfer/transfer-receiver.ts"
import { TransferSender } from "../../actors/transfer/transfer-sender.ts"
import { limits } from "../../config/limits.ts"
import { busConformance, Received } from "../support/bus-conformance.ts"
import { natsStartTimeoutMs, startConfiguredNats, startNats, type StartedNats } from "../support/start-nats.ts"
import { tcpProxy } from "../support/tcp-proxy.ts"

const prefix = inboxPrefix(namespaceOf("test", everyGeneration), "gateway", "g0")
let nats: StartedNats
const cleanUps: Array<() => Promise<unknown> | void> = []

beforeAll(async () => {
  nats = await startNats()
}, natsStartTimeoutMs)
afterEach(async () => {
  for (const cleanUp of cleanUps.splice(0).reverse()) await cleanUp()
})
afterAll(() => nats.stop())

const connect = async (url = nats.server.url): Promise<NatsBus> => {
  const bus = await NatsBus.connect({ url, token: nats.server.token, name: "test", inboxPrefix: prefix })
  cleanUps.push(() => bus.close())
  return bus
}
const proxied = async () => {
  const proxy = await tcpProxy(nats.server.url)
  cleanUps.push(() => proxy.close())
  return { proxy, uplink: await connect(`nats://127.0.0.1:${proxy.port}`) }
}
const makeBridge = (maxPayloadBytes?: number): BridgeBus => {
  const bridge = new BridgeBus({ inboxPrefix: prefix, maxPayloadBytes })
  cleanUps.push(() => bridge.close())
  return bridge
}
const lossOf = (bus: Bus) => new Promise<void>((resolve) => bus.onDisconnect(resolve))
const cutting = (proxy: Awaited<ReturnType<typeof tcpProxy>>, bus: Bus) => async () => {
  const lost = lossOf(bus)
  proxy.cut()
  await lost
}

busConformance("bridge, detached", async () => {
  const bridge = makeBridge()
  return { bus: bridge, peer: bridge, settled: async () => {}, disconnect: async () => bridge.disconnect(), close: () => bridge.close() }
})

busConformance("bridge, attached, to itself", async () => {
  const { proxy, uplink } = await proxied()
  const bridge = makeBridge()
  await bridge.attach(uplink)
  return { bus: bridge, peer: bridge, settled: () => uplink.flush(), disconnect: cutting(proxy, bridge), close: () => bridge.close() }
})

busConformance("bridge, attached, to another process", async () => {
  const { proxy, uplink } = await proxied()
  const [bridge, peer] = [makeBridge(), await connect()]
  await bridge.attach(uplink)
  return { bus: bridge, peer, settled: async () => void (await Promise.all([uplink.flush(), peer.flush()])), disconnect: cutting(proxy, bridge), close: async () => void (await Promise.all([bridge.close(), peer.close()])) }
})

busConformance("bridge, once attached and detached again", async () => {
  const bridge = makeBridge()
  await bridge.attach(await connect())
  await bridge.detach()
  return { bus: bridge, peer: bridge, settled: async () => {}, disconnect: async () => bridge.disconnect(), close: () => bridge.close() }
})

const Double = defineAsk("double", Schema.Struct({ value: Schema.Int }), Schema.Struct({ value: Schema.Int }))
const serveDouble = (bus: Bus, queue?: string) => bus.subscribe("test.double", ({ data, reply }) => new Link(bus, "doubler", 1).reply(Double, reply!, { value: Double.decode(data).value * 2 }), queue === undefined ? {} : { queue })
const ask = (bus: Bus, value: number) => Effect.runPromise(new Link(bus, "asker", 1).ask(Double, "test.double", { value }, { hop: "doubler", deadlineMs: 60_000 }))
const turn = () => new Promise((resolve) => setImmediate(resolve))
const number = (data: Uint8Array): number => new DataView(data.buffer, data.byteOffset).getUint32(0, true)
const numbered = (value: number): Uint8Array => new Uint8Array(Uint32Array.of(value).buffer)
const thrown = (run: () => unknown): unknown => {
  try {
    run()
  } catch (error) {
    return error
  }
  return undefined
}

describe("a bridge that is attached and detached while it is used", () => {
  /** Traffic between actors of this process, until it is stopped; then all of it is checked. */
  const traffic = async (bridge: BridgeBus) => {
    let going = true
    const losses: Array<unknown> = []
    bridge.onDisconnect(() => losses.push("lost"))

    const inOrder: Array<number> = []
    bridge.subscribe("test.tell", ({ data }) => void inOrder.push(number(data)))
    const ofGroup = [0, 1, 2].map((): Array<number> => [])
    for (const member of ofGroup) bridge.subscribe("test.group", ({ data }) => void member.push(number(data)), { queue: "q" })
    let told = 0
    const telling = (async () => {
      for (; going; await turn()) {
        for (let i = 0; i < 5; i++) {
          bridge.publish("test.tell", numbered(told))
          bridge.publish("test.group", numbered(told++))
        }
      }
    })()

    serveDouble(bridge, "doublers")
    let asked = 0
    const asking = [1, 2, 3].map(async (asker) => {
      for (; going; asked++) {
        const value = asker * 1_000_000 + asked
        expect(await ask(bridge, value)).toEqual({ value: value * 2 })
        await turn()
      }
    })

    bridge.subscribe("test.count", (delivery) => {
      const writer = new StreamWriter(bridge, delivery, "counter")
      let next = 0
      const write = async () => {
        for (; going && !writer.closed; await turn()) if (writer.writable) writer.write(numbered(next++))
        writer.end()
      }
      void write()
    })
    let frames = 0
    const streaming = [1, 2, 3].map(async () => {
      let expected = 0
      for await (const frame of openStream(bridge, "test.count", new Uint8Array(0), { hop: "counter", windowFrames: 8 })) {
        expect(number(frame)).toBe(expected++)
        frames++
      }
    })

    return async () => {
      going = false
      await Promise.all([telling, ...asking, ...streaming])
      while (inOrder.length < told || ofGroup.flat().length < told) await turn()
      const all = Array.from({ length: told }, (_, i) => i)
      expect(inOrder).toEqual(all)
      expect(ofGroup.flat().sort((a, b) => a - b)).toEqual(all)
      for (const member of ofGroup) expect(member.length).toBeGreaterThan(0)
      expect(losses).toEqual([])
      return { told, asked, frames }
    }
  }
  const awhile = async (turns: number) => {
    for (let i = 0; i < turns; i++) await turn()
  }

  test("open streams go on, asks are answered, every message comes once and in order, and nobody hears of it", async () => {
    const bridge = makeBridge()
    const stop = await traffic(bridge)
    for (let round = 0; round < 12; round++) {
      await awhile(1 + round * 3)
      await bridge.attach(await connect())
      expect(bridge).toMatchObject({ name: "nats", attached: true })
      await awhile(1 + round * 5)
      await bridge.detach()
      expect(bridge).toMatchObject({ name: "memory", attached: false })
    }
    const { told, asked, frames } = await stop()
    expect(Math.min(told, asked, frames)).toBeGreaterThan(50)
  })

  test("changes that are asked for at once are made one after the other", async () => {
    const bridge = makeBridge()
    const stop = await traffic(bridge)
    const [first, second] = [await connect(), await connect()]
    await awhile(5)
    const changes = [bridge.attach(first), bridge.detach(), bridge.detach(), bridge.attach(second), bridge.attach(first).catch((fault: Fault) => fault.message)]
    expect((await Promise.all(changes)).at(-1)).toMatch(/there is an uplink already/)
    await awhile(20)
    await stop()
    await bridge.close()
    expect(thrown(() => bridge.publish("test.tell", numbered(0)))).toMatchObject({ code: "unavailable" })
  })

  test("a queue group spans the processes while it is attached, and each message is one member's", async () => {
    const [bridge, peer] = [makeBridge(), await connect()]
    const [here, there] = [new Received(), new Received()]
    bridge.subscribe("test.shared", here.handler, { queue: "q" })
    peer.subscribe("test.shared", there.handler, { queue: "q" })
    await peer.flush()
    await bridge.attach(await connect())
    let sent = 0
    while (here.deliveries.length === 0 || there.deliveries.length === 0) {
      for (const bus of [bridge, peer]) bus.publish("test.shared", numbered(sent++))
      await peer.flush()
    }
    const all = () => [...here.deliveries, ...there.deliveries].map(({ data }) => number(data)).sort((a, b) => a - b)
    while (all().length < sent) await turn()
    expect(all()).toEqual(Array.from({ length: sent }, (_, i) => i))
    await bridge.detach()
    const before = there.deliveries.length
    for (let i = 0; i < 20; i++) bridge.publish("test.shared", numbered(sent++))
    while (all().length < sent) await turn()
    expect(there.deliveries.length).toBe(before)
  })

  test("other processes are asked and ask, and streams go both ways", async () => {
    const [bridge, peer] = [makeBridge(), await connect()]
    serveDouble(bridge)
    peer.subscribe("test.elsewhere", ({ reply }) => new Link(peer, "peer", 1).reply(Double, reply!, { value: 7 }))
    peer.subscribe("test.stream", (delivery) => new StreamWriter(peer, delivery, "peer").write(Uint8Array.of(9)))
    await peer.flush()
    const elsewhere = () => Effect.runPromise(new Link(bridge, "asker", 1).ask(Double, "test.elsewhere", { value: 1 }, { hop: "peer" }))
    await expect(elsewhere()).rejects.toMatchObject({ code: "unavailable" })
    await bridge.attach(await connect())
    expect(await elsewhere()).toEqual({ value: 7 })
    expect(await ask(peer, 4)).toEqual({ value: 8 })
    expect(await openStream(bridge, "test.stream", new Uint8Array(0), { hop: "peer" }).next()).toEqual(Uint8Array.of(9))
    // What asks for an answer of an inbox that is gone is told so.
    const [gone, inbox, told] = [bridge.inbox(), peer.inbox(), new Received()]
    peer.subscribe(inbox, told.handler)
    peer.publish(gone, new Uint8Array(0), { reply: inbox })
    await told.until(1)
    expect(told.deliveries[0]!.headers).toEqual({ [header.noResponders]: gone })
    await bridge.detach()
    await expect(elsewhere()).rejects.toMatchObject({ code: "unavailable" })
    await expect(ask(peer, 4)).rejects.toMatchObject({ code: "unavailable" })
  })

  test("what other processes send while it is detached is delivered or refused, and never lost", async () => {
    const [bridge, peer] = [makeBridge(), await connect()]
    serveDouble(bridge)
    for (let round = 0; round < 8; round++) {
      const uplink = await connect()
      await bridge.attach(uplink)
      expect(await ask(peer, 1)).toEqual({ value: 2 })
      const tells = new Received()
      const subscription = bridge.subscribe("test.tells", tells.handler)
      await uplink.flush()
      for (let i = 0; i < 50; i++) peer.publish("test.tells", numbered(i))
      await peer.flush() // the server has them all: they are on their way here
      await bridge.detach()
      expect(tells.deliveries.map(({ data }) => number(data))).toEqual(Array.from({ length: 50 }, (_, i) => i))
      subscription.unsubscribe()
      await expect(ask(peer, 1)).rejects.toMatchObject({ code: "unavailable" })
    }
  })

  test("an actor that leaves while it is attached still gets what is on its way", async () => {
    const [bridge, peer, uplink] = [makeBridge(), await connect(), await connect()]
    await bridge.attach(uplink)
    const tells = new Received()
    const subscription = bridge.subscribe("test.leaving", tells.handler)
    await uplink.flush()
    for (let i = 0; i < 50; i++) peer.publish("test.leaving", numbered(i))
    await peer.flush()
    subscription.drain!()
    await uplink.flush()
    expect(tells.deliveries).toHaveLength(50)
    peer.publish("test.leaving", numbered(0))
    await peer.flush()
    await uplink.flush()
    expect(tells.deliveries).toHaveLength(50)
  })

  test("KV that is on its way arrives whole, with connections of its own or none", async () => {
    const buses = { control: makeBridge(), bulk: makeBridge() }
    const layout = { dtype: "f16", blockTokens: 16, layers: 8, layerBlockBytes: 6_000 } as const
    const blocks = Array.from({ length: 60 }, () => randomBytes(layout.layers * layout.layerBlockBytes))
    const move = async (each: (layer: number) => Promise<unknown>) => {
      const came = blocks.map(({ byteLength }) => new Uint8Array(byteLength))
      const ends = { ...(buses satisfies Buses), namespace: "test", transferId: randomBytes(16).toString("hex"), creditBytes: limits.kvWindowBytes }
      const receiver = new TransferReceiver({ ...ends, sink: bufferSink(layout, came), firstBlock: 0, blocks: blocks.length, hop: "sender" })
      const sender = new TransferSender({ ...ends, source: bufferSource(layout, blocks, 0), hop: "receiver" })
      for (let layer = 0; layer < layout.layers; layer++) {
        sender.send({ firstLayer: layer, layers: 1, firstBlock: 0, blocks: blocks.length })
        await each(layer)
      }
      sender.finish([])
      await Promise.all([sender.done, receiver.done])
      receiver.close()
      expect(Buffer.concat(came).equals(Buffer.concat(blocks))).toBe(true)
    }
    const uplinks = await connectBuses({ ...nats.server, name: "test", inboxPrefix: prefix })
    cleanUps.push(() => uplinks.control.close(), () => uplinks.bulk.close())
    const attach = () => Promise.all([buses.control.attach(uplinks.control), buses.bulk.attach(uplinks.bulk)])
    const detach = () => Promise.all([buses.control.detach(), buses.bulk.detach()])
    await move(turn)
    await move(async (layer) => (layer === 3 ? attach() : turn()))
    await move(turn)
    await move(async (layer) => (layer === 3 ? detach() : turn()))
  })
})

describe("what stays in the process", () => {
  test("streams and answers between its own actors never reach the server", async () => {
    const { proxy, uplink } = await proxied()
    const bridge = makeBridge()
    serveDouble(bridge)
    bridge.subscribe("test.stream", (delivery) => new StreamWriter(bridge, delivery, "w0").write(Uint8Array.of(1)))
    await bridge.attach(uplink)
    expect(await openStream(bridge, "test.stream", new Uint8Array(0), { hop: "w0" }).next()).toEqual(Uint8Array.of(1))
    for (let i = 0; i < 10; i++) await ask(bridge, i)
    await uplink.flush()
    const published = proxy.sent().match(/^H?PUB \S+/gm)
    expect(new Set(published)).toEqual(new Set(["HPUB test.stream", "HPUB test.double"]))
    // One subscription for the answers of the uplink itself, one for those of the bridge, and one for each subscriber.
    expect(proxy.sent().match(/^SUB /gm)).toHaveLength(4)
  })

  test("no inbox of a process is another's, and none comes twice, whatever it is attached to", async () => {
    const bridges = [makeBridge(), makeBridge()]
    const inboxes = [...bridges.map((bridge) => bridge.inbox())]
    await bridges[0]!.attach(await connect())
    inboxes.push(...bridges.map((bridge) => bridge.inbox()))
    await bridges[0]!.detach()
    inboxes.push(...bridges.map((bridge) => bridge.inbox()))
    expect(new Set(inboxes).size).toBe(6)
    for (const inbox of inboxes) expect(inbox.startsWith(`${prefix}.`)).toBe(true)
  })
})

test("a message is as large as the smaller of the process and the uplink allows", async () => {
  const small = await startConfiguredNats(["max_payload: 4096"])
  cleanUps.push(() => small.stop())
  const uplink = await NatsBus.connect({ url: small.url, name: "test", inboxPrefix: prefix })
  cleanUps.push(() => uplink.close())
  for (const [own, attached] of [[1_000_000, 4_096], [1_000, 1_000]] as const) {
    const bridge = makeBridge(own)
    expect(bridge.maxPayloadBytes).toBe(own)
    await bridge.attach(uplink)
    expect(bridge.maxPayloadBytes).toBe(attached)
    for (const to of ["test.large", bridge.inbox()]) {
      expect(thrown(() => bridge.publish(to, new Uint8Array(attached + 1)))).toMatchObject({ code: "invalid_request", message: expect.stringContaining(`limit of ${attached}`) })
    }
    await bridge.detach()
    expect(bridge.maxPayloadBytes).toBe(own)
  }
})

describe("an uplink that is lost", () => {
  test("is told to who waits, each time; a detach is not, and then it works alone", async () => {
    const { proxy, uplink } = await proxied()
    const bridge = makeBridge()
    let losses = 0
    bridge.onDisconnect(() => losses++)
    serveDouble(bridge)
    await bridge.attach(uplink)
    for (let round = 1; round <= 2; round++) {
      const back = new Promise<void>((resolve) => uplink.onReconnect(resolve))
      const waiting = openStream(bridge, "test.nowhere", new Uint8Array(0), { hop: "nobody" })
      await cutting(proxy, bridge)()
      await expect(waiting.next()).rejects.toMatchObject({ retryable: true })
      expect(losses).toBe(round)
      await back
      await uplink.flush()
      expect(await ask(bridge, round)).toEqual({ value: 2 * round })
    }
    proxy.refuse(true)
    await cutting(proxy, bridge)()
    expect(thrown(() => bridge.publish("test.double", new Uint8Array(1)))).toMatchObject({ code: "disconnected" })
    await bridge.detach()
    expect(losses).toBe(3)
    expect(await ask(bridge, 21)).toEqual({ value: 42 })
    await uplink.close()
    expect(losses).toBe(3)
  })

  test("cannot be attached, and one that falls silent meanwhile is not either: it goes on alone", async () => {
    const { proxy, uplink } = await proxied()
    const bridge = makeBridge()
    serveDouble(bridge)
    const waiting = ask(bridge, 1)
    proxy.hold(true)
    await expect(bridge.attach(uplink)).rejects.toMatchObject({ code: "deadline_exceeded" })
    proxy.hold(false)
    proxy.refuse(true)
    const lost = lossOf(uplink)
    proxy.cut()
    await lost
    await expect(bridge.attach(uplink)).rejects.toMatchObject({ code: "disconnected" })
    expect(bridge.attached).toBe(false)
    expect(await waiting).toEqual({ value: 2 })
    expect(await ask(bridge, 2)).toEqual({ value: 4 })
  })
})
