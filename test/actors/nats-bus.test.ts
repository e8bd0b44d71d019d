import { spawnSync } from "node:child_process"
import { createHash, randomBytes } from "node:crypto"
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { createServer, type AddressInfo } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { nkeys } from "@nats-io/transport-node"
import { Effect, Schema } from "effect"
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from "vitest"
import { bufferSink, bufferSource } from "../../actors/kv-store/block-buffers.ts"
import { kvStoreActor } from "../../actors/kv-store/kv-store.ts"
import { packHashes } from "../../actors/messages/hashes.ts"
import { Get, Put } from "../../actors/messages/kv-store.ts"
import { everyGeneration, inboxPrefix, namespaceOf, permissions, topologyBucket, processKinds, subject, type ProcessKind } from "../../actors/messages/subjects.ts"
import { header, type Bus } from "../../actors/runtime/bus.ts"
import { defineAsk } from "../../actors/runtime/codec.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { Link } from "../../actors/runtime/link.ts"
import { connectBuses, NatsBus, type NatsBusOptions } from "../../actors/runtime/nats-bus.ts"
import { NatsConnectError } from "../../actors/runtime/nats-connect.ts"
import { openStream } from "../../actors/runtime/stream-reader.ts"
import { StreamWriter } from "../../actors/runtime/stream-writer.ts"
import { TransferReceiver } from "../../actors/transfer/transfer-receiver.ts"
import { TransferSender } from "../../actors/transfer/transfer-sender.ts"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import { busConformance, Received } from "../support/bus-conformance.ts"
import { testScope } from "../support/scoped.ts"
import { natsAccount } from "../support/nats-credentials.ts"
import { natsStartTimeoutMs, startConfiguredNats, startNats, type StartedNats } from "../support/start-nats.ts"
import { tcpProxy } from "../support/tcp-proxy.ts"

let nats: StartedNats
let folder: string
const cleanUps: Array<() => Promise<unknown> | void> = []

beforeAll(async () => {
  nats = await startNats()
  folder = mkdtempSync(join(tmpdir(), "penstock-nats-bus-"))
}, natsStartTimeoutMs)
afterEach(async () => {
  for (const cleanUp of cleanUps.splice(0).reverse()) await cleanUp()
})
afterAll(async () => {
  rmSync(folder, { recursive: true, force: true })
  await nats.stop()
})

/** Connects, to the supervised server where nothing else is said, for as long as the test runs. */
const connect = async (options: Partial<NatsBusOptions> = {}): Promise<NatsBus> => {
  const address: NatsAddress = options.url === undefined ? nats.server : { url: options.url }
  const bus = await NatsBus.connect({ ...address, name: "test", inboxPrefix: inboxPrefix("test", "gateway", "g0"), ...options })
  cleanUps.push(() => bus.close())
  return bus
}

const proxied = async (options: Partial<NatsBusOptions> = {}) => {
  const proxy = await tcpProxy(nats.server.url)
  cleanUps.push(() => proxy.close())
  return { proxy, bus: await connect({ url: `nats://127.0.0.1:${proxy.port}`, token: nats.server.token, ...options }) }
}

const lossOf = (bus: Bus) => new Promise<void>((resolve) => bus.onDisconnect(resolve))
const returnOf = (bus: NatsBus) => new Promise<void>((resolve) => bus.onReconnect(resolve))
const thrown = (run: () => unknown): unknown => {
  try {
    run()
  } catch (error) {
    return error
  }
  return undefined
}
const refusalOf = async (connecting: Promise<NatsBus>): Promise<string> => {
  const error = await connecting.then(
    async (bus) => bus.close(),
    (reason: unknown) => reason,
  )
  expect(error).toBeInstanceOf(NatsConnectError)
  const { message } = error as NatsConnectError
  expect(message).not.toContain("\n")
  return message
}

const Double = defineAsk("double", Schema.Struct({ value: Schema.Int }), Schema.Struct({ value: Schema.Int }))
const ask = (bus: Bus, value: number) => new Link(bus, "asker", 1).ask(Double, "test.double", { value }, { hop: "doubler d0", deadlineMs: 60_000 })
const serveDouble = (bus: Bus) => bus.subscribe("test.double", ({ data, reply }) => new Link(bus, "doubler", 1).reply(Double, reply!, { value: Double.decode(data).value * 2 }))
const serveStream = (bus: Bus) => bus.subscribe("test.numbers", (delivery) => new StreamWriter(bus, delivery, "writer w0").write(Uint8Array.of(1)))

busConformance("nats", async () => {
  const { proxy, bus } = await proxied()
  const peer = await connect()
  return {
    bus,
    peer,
    settled: async () => void (await Promise.all([bus.flush(), peer.flush()])),
    disconnect: async () => {
      const lost = lossOf(bus)
      proxy.cut()
      await lost
    },
    close: async () => void (await Promise.all([bus.close(), peer.close()])),
  }
})

describe("a connection that is lost", () => {
  test("a server that is killed: what waits fails and names the hop, and all works again when it is back", async () => {
    const { control, bulk } = await connectBuses({ ...nats.server, name: "test", inboxPrefix: inboxPrefix("test", "gateway", "g0") })
    cleanUps.push(() => control.close(), () => bulk.close())
    const peer = await connect()
    serveDouble(peer)
    serveStream(peer)
    peer.subscribe("test.silent", () => {})
    await peer.flush()
    const reader = openStream(control, "test.numbers", new Uint8Array(0), { hop: "writer w0" })
    expect(await reader.next()).toEqual(Uint8Array.of(1))
    const pending = [
      reader.next(),
      Effect.runPromise(new Link(control, "asker", 1).ask(Double, "test.silent", { value: 1 }, { hop: "silent s0", deadlineMs: 60_000 })),
      openStream(bulk, "test.silent", new Uint8Array(0), { hop: "silent s0" }).next(),
    ].map((waiting) => waiting.then(() => undefined, (fault: unknown) => fault))
    const refused = lossOf(control).then(() => thrown(() => control.publish("test.double", new Uint8Array(1))))
    const back = [control, bulk, peer].map(returnOf)
    const { pid } = nats.server
    process.kill(pid, "SIGKILL")
    expect(await Promise.all(pending)).toMatchObject([
      { code: "disconnected", hop: "writer w0" },
      { code: "disconnected", hop: "silent s0" },
      { code: "disconnected", hop: "silent s0" },
    ])
    expect(await refused).toMatchObject({ code: "disconnected", retryable: true, message: expect.stringContaining("test.double") })
    await Promise.all(back)
    await peer.flush()
    expect(nats.server.pid).not.toBe(pid)
    expect(await Effect.runPromise(ask(control, 4))).toEqual({ value: 8 })
    expect(await openStream(bulk, "test.numbers", new Uint8Array(0), { hop: "writer w0" }).next()).toEqual(Uint8Array.of(1))
  })

  test("it is told once for each loss, however many attempts fail, and subscriptions made meanwhile count", async () => {
    const { proxy, bus } = await proxied()
    const peer = await connect()
    let losses = 0
    bus.onDisconnect(() => losses++)
    for (let round = 1; round <= 2; round++) {
      const lost = lossOf(bus)
      proxy.refuse(true)
      proxy.cut()
      await lost
      expect(bus.connected).toBe(false)
      const received = new Received()
      bus.subscribe(`test.meanwhile.${round}`, received.handler)
      await new Promise((resolve) => setTimeout(resolve, 300))
      const back = returnOf(bus)
      proxy.refuse(false)
      await back
      expect(bus.connected).toBe(true)
      await bus.flush()
      peer.publish(`test.meanwhile.${round}`, new Uint8Array(1))
      await received.until(1)
      expect(losses).toBe(round)
    }
  })

  test("it can be closed while there is no server, and twice", async () => {
    const { proxy, bus } = await proxied()
    const lost = lossOf(bus)
    proxy.refuse(true)
    proxy.cut()
    await lost
    await Promise.all([bus.close(), bus.close()])
    expect(thrown(() => bus.publish("test.x", new Uint8Array(1)))).toMatchObject({ code: "unavailable" })
  })
})

describe("what a connection carries", () => {
  test("asks and streams make no subscription at the server", async () => {
    const { proxy, bus } = await proxied()
    const peer = await connect()
    serveDouble(peer)
    await peer.flush()
    for (let i = 0; i < 20; i++) await Effect.runPromise(ask(bus, i))
    await bus.flush()
    expect(proxy.sent().match(/^SUB /gm)).toHaveLength(1)
    expect(proxy.sent().match(/^UNSUB /gm)).toBeNull()
    expect(proxy.sent()).not.toContain("_INBOX")
  })

  test("a request to an inbox that is gone is answered as nobody's", async () => {
    const [bus, peer] = [await connect(), await connect()]
    const inbox = bus.inbox()
    const received = new Received()
    bus.subscribe(inbox, received.handler)
    const gone = peer.inbox()
    bus.publish(gone, new Uint8Array(0), { reply: inbox })
    await received.until(1)
    expect(received.deliveries[0]!.headers).toEqual({ [header.noResponders]: gone })
  })

  test("a view of a message that is kept stays as it was, whatever comes after it", async () => {
    const [bus, peer] = [await connect(), await connect()]
    const kept: Array<Uint8Array> = []
    const last = new Received()
    peer.subscribe("test.keep", ({ data }) => void kept.push(data))
    peer.subscribe("test.last", last.handler)
    await peer.flush()
    const sent: Array<string> = []
    const digest = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest("hex")
    for (const size of [0, 1, 100, 5_000, 65_536, 300_000, 1_000_000]) {
      for (let i = 0; i < 20; i++) {
        const bytes = randomBytes(size)
        sent.push(digest(bytes))
        bus.publish("test.keep", bytes)
      }
      await bus.flush()
    }
    bus.publish("test.last", new Uint8Array(0))
    await last.until(1)
    expect(kept.map(digest)).toEqual(sent)
  })

  test("the server's own limit counts, with headers", async () => {
    const small = await startConfiguredNats(["max_payload: 4096"])
    cleanUps.push(() => small.stop())
    const bus = await connect({ url: small.url })
    expect(bus.maxPayloadBytes).toBe(4096)
    // NATS/1.0 and two line ends, then the header's name, colon, space, value and line end.
    const room = 4096 - 12 - "name: value\r\n".length
    bus.publish("test.fits", new Uint8Array(room), { headers: { name: "value" } })
    await bus.flush()
    expect(thrown(() => bus.publish("test.fits", new Uint8Array(room + 1), { headers: { name: "value" } }))).toMatchObject({
      code: "invalid_request",
      message: "publish to test.fits: 4097 bytes are over the bus's limit of 4096",
    })
  })

  test.each([["two words", "x"], ["colon:", "x"], ["", "x"], ["name", "two\r\nlines"], ["name", " outer"], ["name", "outer "]])("a header %j: %j would not arrive as it is, so it is refused", async (name, value) => {
    const bus = await connect()
    expect(thrown(() => bus.publish("test.headers", new Uint8Array(0), { headers: { [name]: value } }))).toMatchObject({ code: "invalid_request", message: expect.stringContaining("header") })
  })

  test.each(["", "a b", "a..b", ".a", "a.", "a.*", "a.>", "a\r\nPUB b 0"])("%j is no subject", async (wrong) => {
    const bus = await connect()
    expect(thrown(() => bus.publish(wrong, new Uint8Array(0)))).toBeInstanceOf(Fault)
    expect(thrown(() => bus.publish("test.x", new Uint8Array(0), { reply: wrong === "" ? " " : wrong }))).toBeInstanceOf(Fault)
    expect(thrown(() => bus.subscribe(wrong, () => {}))).toBeInstanceOf(Fault)
  })

  test("a subscriber that throws harms nobody else", async () => {
    const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
    cleanUps.push(() => complaint.mockRestore())
    const bus = await connect()
    const received = new Received()
    const inbox = bus.inbox()
    for (const at of [inbox, "test.throws"]) {
      bus.subscribe(at, () => {
        throw new Error("a defect")
      })
      bus.subscribe(at, received.handler)
    }
    bus.publish(inbox, new Uint8Array(0))
    bus.publish("test.throws", new Uint8Array(0))
    await received.until(2)
    expect(complaint).toHaveBeenCalledTimes(2)
  })
})

test("megabytes that wait on bulk hold up nothing on control, and are bounded", async () => {
  const { proxy, bus: bulk } = await proxied()
  const [control, peer] = [await connect(), await connect()]
  serveDouble(peer)
  let bytes = 0
  const all = new Received()
  peer.subscribe("test.bulk", ({ data }) => void (bytes += data.byteLength))
  peer.subscribe("test.bulk-end", all.handler)
  await peer.flush()
  proxy.hold(true)
  const chunk = new Uint8Array(512 * 1024)
  let sent = 0
  let refused: unknown
  while (refused === undefined) {
    refused = thrown(() => bulk.publish("test.bulk", chunk))
    if (refused === undefined) sent++
  }
  expect(refused).toMatchObject({ code: "overloaded", retryable: true, message: expect.stringContaining("test.bulk") })
  expect(sent * chunk.byteLength).toBeLessThanOrEqual(limits.busPendingBytes)
  expect(await Effect.runPromise(ask(control, 21))).toEqual({ value: 42 })
  expect(bytes).toBeLessThan(sent * chunk.byteLength)
  proxy.hold(false)
  await bulk.flush()
  bulk.publish("test.bulk-end", new Uint8Array(0))
  await all.until(1)
  expect(bytes).toBe(sent * chunk.byteLength)
})

describe("a connection that cannot be made is one sentence that says what to do", () => {
  const file = (name: string, text: string): string => {
    const path = join(folder, name)
    writeFileSync(path, text)
    return path
  }

  test("a wrong token, and none, without showing any", async () => {
    const secret = readFileSync(nats.server.token, "utf8")
    const wrong = await refusalOf(connect({ url: nats.server.url, token: file("wrong-token", "guessed-secret") }))
    expect(wrong).toMatch(/^nats:\/\/127\.0\.0\.1:\d+: the server refuses what \S+wrong-token says: put what it expects there$/)
    expect(wrong).not.toContain("guessed-secret")
    const none = await refusalOf(connect({ url: nats.server.url }))
    expect(none).toContain("give bus.nats.credentials, nkey or token in the topology")
    expect(none).not.toContain(secret)
  })

  test("no server, another server, a file that is not there or is something else", async () => {
    const other = createServer((socket) => void socket.on("error", () => {}).end("HTTP/1.1 400 Bad Request\r\n\r\n"))
    await new Promise<void>((resolve) => other.listen(0, "127.0.0.1", resolve))
    const url = `nats://127.0.0.1:${(other.address() as AddressInfo).port}`
    expect(await refusalOf(connect({ url }))).toContain("what answers there is no NATS server")
    await new Promise((resolve) => other.close(resolve))
    expect(await refusalOf(connect({ url }))).toBe(`${url}: no NATS server answers there: start one, correct bus.nats.url in the topology, or write bus: { nats: { spawn: true } }`)
    expect(await refusalOf(connect({ credentials: "/nowhere/user.creds" }))).toBe("/nowhere/user.creds: no such file; bus.nats.credentials in the topology names it")
    expect(await refusalOf(connect({ url, credentials: file("x.creds", "nothing") }))).toContain("is no NATS credentials file")
    expect(await refusalOf(connect({ url, nkey: file("x.nk", "nothing") }))).toContain("is no seed of an nkey")
    expect(await refusalOf(connect({ tls: {} }))).toContain("the server speaks no TLS")
  })

  test.skipIf(spawnSync("openssl", ["version"]).status !== 0)("a certificate that nobody vouches for, until it is named", async () => {
    const [cert, key] = [join(folder, "cert.pem"), join(folder, "key.pem")]
    spawnSync("openssl", ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert])
    const secure = await startConfiguredNats([`tls: { cert_file: "${cert}", key_file: "${key}" }`])
    cleanUps.push(() => secure.stop())
    const url = secure.url.replace("nats:", "tls:")
    expect(await refusalOf(connect({ url }))).toMatch(/certificate is not trusted \(\w+\): name its authority in bus\.nats\.tls\.ca$/)
    expect((await connect({ url, tls: { ca: cert } })).connected).toBe(true)
  })
})

describe("permissions by role", () => {
  const generation = "0a"
  const namespace = namespaceOf("test", generation)

  /** A server with one user for each kind of process, known by a key. */
  const startWithRoles = async () => {
    const keys = new Map(processKinds.map((kind) => [kind, nkeys.createUser()]))
    const list = (subjects: ReadonlyArray<string>) => JSON.stringify(subjects)
    const users = [...keys].map(([kind, key]) => {
      const { publish, subscribe } = permissions("test", kind)
      return `{ nkey: ${key.getPublicKey()}, permissions: { publish: ${list(publish)}, subscribe: ${list(subscribe)} } }`
    })
    const server = await startConfiguredNats([`authorization: { users: [${users.join(", ")}] }`])
    cleanUps.push(() => server.stop())
    return (kind: ProcessKind, prefixOf: ProcessKind = kind, at = generation) => {
      const nkey = join(folder, `${kind}.nk`)
      writeFileSync(nkey, keys.get(kind)!.getSeed(), { mode: 0o600 })
      return connect({ url: server.url, nkey, inboxPrefix: inboxPrefix(namespaceOf("test", at), prefixOf, "x0") })
    }
  }

  test("every conversation of today gets through, and no process hears another role's answers", async () => {
    const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
    cleanUps.push(() => complaint.mockRestore())
    const as = await startWithRoles()
    const [gateway, request, store] = [await as("gateway"), await as("request"), await as("kv-store")]
    const generate = subject(namespace, "request", "any", "generate")
    request.subscribe(generate, (delivery) => new StreamWriter(request, delivery, "request r0").write(Uint8Array.of(7)), { queue: "request" })
    await request.flush()
    const reader = openStream(gateway, generate, new Uint8Array(0), { hop: "request r0" })
    expect(await reader.next()).toEqual(Uint8Array.of(7))

    // The store listens where the gateway's answers come in.
    const inbox = gateway.inbox()
    const [own, spied] = [new Received(), new Received()]
    gateway.subscribe(inbox, own.handler)
    store.subscribe(inbox, spied.handler)
    await store.flush()
    request.publish(inbox, new Uint8Array(0))
    await own.until(1)
    await store.flush()
    expect(spied.deliveries).toEqual([])
    await vi.waitFor(() => expect(complaint).toHaveBeenCalledWith(expect.stringContaining(`may not subscribe to ${inbox}`)))

    expect(await refusalOf(as("kv-store", "gateway"))).toContain("let its user subscribe to ps.test.0a.inbox.gateway.x0.>")
  })

  test("a worker asks for no placement, changes no topology and reads nobody's answers: it is told so, and is refused at once from then on", async () => {
    const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
    cleanUps.push(() => complaint.mockRestore())
    const as = await startWithRoles()
    const [worker, request] = [await as("worker"), await as("request")]
    for (const forbidden of [subject(namespace, "scheduler", "any", "place"), subject(namespace, "scheduler", "any", "configure"), subject(namespace, "worker", "d0", "drain"), `$KV.${topologyBucket("test")}.wanted`, "$JS.API.INFO"]) {
      worker.publish(forbidden, new Uint8Array(0))
      await vi.waitFor(() => expect(complaint).toHaveBeenCalledWith(expect.stringMatching(/may not publish to .*nats-permissions/)))
      expect(String(complaint.mock.calls.at(-1))).toContain(forbidden)
      expect(thrown(() => worker.publish(forbidden, new Uint8Array(0)))).toMatchObject({ code: "unavailable", message: expect.stringMatching(/the NATS server does not allow this process to; .*nats-permissions/) })
      complaint.mockClear()
    }
    const [inbox, spied] = [request.inbox(), new Received()]
    worker.subscribe(inbox, spied.handler)
    await vi.waitFor(() => expect(complaint).toHaveBeenCalledWith(expect.stringContaining(`may not subscribe to ${inbox}`)))
    worker.publish(inbox, new Uint8Array(0)) // it answers requests, so this is its right
    await worker.flush()
    expect(spied.deliveries).toEqual([])
    expect(await refusalOf(as("worker", "request"))).toContain("let its user subscribe to ps.test.0a.inbox.request.x0.>")
  })

  test("a gateway asks the actors of two generations, and each answers it", async () => {
    const as = await startWithRoles()
    const gateway = await as("gateway", "gateway", everyGeneration)
    for (const at of ["0a", "0b"]) {
      const request = await as("request", "request", at)
      request.subscribe(subject(namespaceOf("test", at), "request", "any", "tokenize"), ({ reply }) => new Link(request, `request ${at}`, 1).reply(Double, reply!, { value: Number.parseInt(at, 16) }), { queue: "request" })
      await request.flush()
    }
    const ask = (at: string) => Effect.runPromise(new Link(gateway, "gateway", 1).ask(Double, subject(namespaceOf("test", at), "request", "any", "tokenize"), { value: 0 }, { hop: "request" }))
    expect(await Promise.all([ask("0a"), ask("0b")])).toEqual([{ value: 10 }, { value: 11 }])
  })

  test("a worker puts a block into the store and gets it back", async () => {
    const as = await startWithRoles()
    const [store, storeBulk, worker, workerBulk] = [await as("kv-store"), await as("kv-store"), await as("worker"), await as("worker")]
    const scope = testScope()
    cleanUps.push(() => scope.close())
    await scope.start(kvStoreActor({ link: new Link(store, "kv-store k0", 1), buses: { control: store, bulk: storeBulk }, namespace, id: "k0", memoryBytes: 10_000 }))
    await store.flush()
    const link = new Link(worker, "worker w0", 1)
    const to = (verb: string) => subject(namespace, "kv-store", "any", verb)
    const layout = { dtype: "f16", blockTokens: 4, layers: 1, layerBlockBytes: 1000 } as const
    const named = { formatId: "f", hashes: packHashes(["h".repeat(16)]), layout }
    const ends = { control: worker, bulk: workerBulk, namespace, creditBytes: limits.kvWindowBytes, hop: "kv-store" }
    const block = randomBytes(1000)

    const { wanted, transferId } = await Effect.runPromise(link.ask(Put, to(Put.verb), named, { hop: "kv-store" }))
    expect(wanted).toEqual([true])
    const sender = new TransferSender({ ...ends, transferId, source: bufferSource(layout, [block], 0) })
    sender.send({ firstLayer: 0, layers: 1, firstBlock: 0, blocks: 1 })
    sender.finish([])
    await sender.done

    const back = "0123456789abcdef".repeat(2)
    const got = new Uint8Array(1000)
    const receiver = new TransferReceiver({ ...ends, transferId: back, sink: bufferSink(layout, [got]), firstBlock: 0, blocks: 1 })
    await workerBulk.flush()
    expect(await Effect.runPromise(link.ask(Get, to(Get.verb), { ...named, transferId: back, firstBlock: 0, creditBytes: 10_000 }, { hop: "kv-store" }))).toEqual({ sent: true })
    await receiver.done
    receiver.close()
    expect(Buffer.from(got).equals(block)).toBe(true)
  })

  test("a .creds file says who a process is and what it may", async () => {
    const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
    cleanUps.push(() => complaint.mockRestore())
    const account = natsAccount()
    const server = await startConfiguredNats(account.configuration)
    cleanUps.push(() => server.stop())
    const as = (kind: ProcessKind) => {
      const credentials = join(folder, `${kind}.creds`)
      writeFileSync(credentials, account.credentials(permissions("test", kind)), { mode: 0o600 })
      return connect({ url: server.url, credentials, inboxPrefix: inboxPrefix(namespace, kind, "x0") })
    }
    const [gateway, request] = [await as("gateway"), await as("request")]
    const tokenize = subject(namespace, "request", "any", "tokenize")
    request.subscribe(tokenize, ({ reply }) => new Link(request, "request r0", 1).reply(Double, reply!, { value: 7 }), { queue: "request" })
    await request.flush()
    expect(await Effect.runPromise(new Link(gateway, "gateway", 1).ask(Double, tokenize, { value: 0 }, { hop: "request" }))).toEqual({ value: 7 })
    request.publish(tokenize, new Uint8Array(0))
    await vi.waitFor(() => expect(complaint).toHaveBeenCalledWith(expect.stringContaining(`may not publish to ${tokenize}`)))
    const stranger = join(folder, "stranger.creds")
    writeFileSync(stranger, natsAccount().credentials(permissions("test", "gateway")))
    expect(await refusalOf(connect({ url: server.url, credentials: stranger }))).toContain("the server refuses what")
  })

  test("a process by its own name gets its own subjects only", () => {
    const { subscribe } = permissions("main", "kv-store", "k0")
    expect(subscribe).toContain("ps.main.*.kv-store.k0.*")
    expect(subscribe).toContain("ps.main.*.kv-store.any.*")
    expect(subscribe).toContain("ps.main.*.inbox.kv-store.k0.>")
    expect(subscribe.filter((allowed) => !/^ps\.main\.\*\.((kv-store\.(k0|any)|inbox\.kv-store\.k0|kv\.\*)\.|presence$)/.test(allowed))).toEqual([])
  })
})
