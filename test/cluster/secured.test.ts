/**
 * A nats-server that others set up: TLS with an authority of its own, certificates of clients, and a user for each kind of
 * process with what `penstock nats-permissions` prints.
 */
import { execFileSync } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { connect, nkeyAuthenticator } from "@nats-io/transport-node"
import { Deferred, Effect } from "effect"
import { afterAll, beforeAll, expect, test, vi } from "vitest"
import { everyGeneration, inboxPrefix, namespaceOf, topologyBucket } from "../../actors/messages/subjects.ts"
import { joinNats, openBuses, type BridgeBuses } from "../../actors/node/buses.ts"
import { componentsOf, runComponent } from "../../actors/node/component.ts"
import type { RunningWorker } from "../../actors/node/worker.ts"
import { readEnv } from "../../config/env.ts"
import { loadTopology } from "../../config/load-topology.ts"
import { programArguments } from "../../config/programs.mjs"
import type { NatsAddress } from "../../config/topology.ts"
import { natsConfiguration } from "../../gateway/nats-permissions.ts"
import { Cluster } from "../support/cluster.ts"
import { AgentCluster } from "../support/start-agent.ts"
import { testScope } from "../support/scoped.ts"
import { natsStartTimeoutMs, startConfiguredNats, type ConfiguredNats } from "../support/start-nats.ts"
import { startNode, streamCompletion } from "../support/start-node.ts"
import { writeTinyModel } from "../support/tiny-model.ts"

let folder: string
let server: ConfiguredNats
let address: NatsAddress
const at = (name: string) => join(folder, name)

/** An authority, and a certificate of its for each name. */
const makeCertificates = (...names: ReadonlyArray<string>): void => {
  const openssl = (...args: ReadonlyArray<string>) => execFileSync("openssl", args, { stdio: "pipe" })
  const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
  openssl("req", "-x509", ...key, "-days", "2", "-subj", "/CN=authority", "-keyout", at("ca.key"), "-out", at("ca.pem"))
  writeFileSync(at("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n")
  for (const name of names) {
    openssl("req", ...key, "-subj", `/CN=${name}`, "-keyout", at(`${name}.key`), "-out", at(`${name}.csr`))
    openssl("x509", "-req", "-in", at(`${name}.csr`), "-CA", at("ca.pem"), "-CAkey", at("ca.key"), "-CAcreateserial", "-days", "2", "-extfile", at("names"), "-out", at(`${name}.pem`))
  }
}

beforeAll(async () => {
  folder = mkdtempSync(join(tmpdir(), "penstock-secured-"))
  makeCertificates("server", "client")
  const printed = execFileSync(process.execPath, [...programArguments("gateway/main.ts"), "nats-permissions", "--keys", at("keys")], { encoding: "utf8" })
  server = await startConfiguredNats([
    printed,
    `tls: { cert_file: ${JSON.stringify(at("server.pem"))}, key_file: ${JSON.stringify(at("server.key"))}, ca_file: ${JSON.stringify(at("ca.pem"))}, verify: true, timeout: 30 }`, // a handshake on a busy machine takes longer than the 2 s that it gets by itself
    `jetstream: { store_dir: ${JSON.stringify(at("jetstream"))} }`,
  ])
  address = { url: server.url.replace("nats:", "tls:"), nkey: at("keys/{role}.nk"), tls: { ca: at("ca.pem"), cert: at("client.pem"), key: at("client.key") } }
}, natsStartTimeoutMs)

afterAll(async () => {
  await server.stop()
  rmSync(folder, { recursive: true, force: true })
})

const violations = () => server.log().match(/Violation[^\n]*/g) ?? []
const request = { prompt: "A long story about a lighthouse keeper and the sea:", max_tokens: 60, ignore_eos: true, temperature: 1, seed: 7 }

test("the command makes a seed for each kind of process, for this user's eyes only, and prints the same the next time", () => {
  const files = readdirSync(at("keys"))
  expect(files.sort()).toEqual(["gateway.nk", "kv-store.nk", "node.nk", "request.nk", "scheduler.nk", "worker.nk"])
  for (const file of files) expect(statSync(at(`keys/${file}`)).mode & 0o777).toBe(0o600)
  const [first, second] = [natsConfiguration({ cluster: "main", keys: at("keys") }), natsConfiguration({ cluster: "main", keys: at("keys") })]
  expect(first).toBe(second)
  expect(natsConfiguration({ cluster: "main" })).toContain("{ nkey: PUBLIC_KEY_OF_KV_STORE")
  for (const file of files) expect(first).not.toContain(readFileSync(at(`keys/${file}`), "utf8"))
  writeFileSync(at("other.nk"), "nothing")
  writeFileSync(at("worker.nk"), "nothing")
  expect(() => natsConfiguration({ cluster: "main", keys: folder })).toThrow(/worker\.nk: is no seed of an nkey/)
})

test("the disaggregated topology answers a chat over TLS, each process by its own key, and nothing that it does is refused", async () => {
  const single = await startNode()
  const expected = await streamCompletion(single, request)
  await single.stop()
  const node = await startNode({ preset: "disaggregated", change: (topology) => ({ ...topology, bus: { nats: address } }) })
  try {
    const actors = async () => (await (await fetch(`${node.url}/actors`)).json()) as { transfers: { completed: number; fallbacks: number }; stores?: unknown }
    for (let turn = 0; turn < 2; turn++) expect(await streamCompletion(node, request)).toEqual(expected)
    const chat = await fetch(`${node.url}/v1/chat/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", messages: [{ role: "user", content: "What is a lighthouse?" }], max_tokens: 20, ignore_eos: true }) })
    expect(await chat.json()).toMatchObject({ choices: [{ message: { role: "assistant", content: expect.stringMatching(/./s) } }], usage: { completion_tokens: 20 } })
    await vi.waitFor(async () => expect((await actors()).transfers.completed).toBeGreaterThan(0), { timeout: 20_000 })
    expect((await actors()).transfers.fallbacks).toBe(0)
  } finally {
    await node.stop()
  }
  expect(violations()).toEqual([])
})

test("actors that are embedded when their process joins the server go on there, by the gateway's key", async () => {
  const scope = testScope()
  const model = { name: "tiny", aliases: [], path: at("tiny.gguf"), sha256: "0".repeat(64) }
  await writeTinyModel(model.path)
  const { topology: preset } = loadTopology("config/topologies/single.yaml")
  const topology = { ...preset, kvStore: { ...preset.kvStore, disk: { path: at("kv"), size: 2 ** 30 } } }
  const namespace = namespaceOf("main", "embedded")
  const buses: BridgeBuses = await scope.start(openBuses("main"))
  const workers = new Map<string, RunningWorker>()
  for (const component of componentsOf(topology).flat()) {
    const ready = Deferred.makeUnsafe<void>()
    const run = runComponent(component, 1, { topology, model, namespace, env: readEnv(), buses, onWorker: (running) => workers.set(component.id, running) }, Effect.asVoid(Deferred.succeed(ready, undefined)))
    await scope.start(Effect.andThen(Effect.forkScoped(run), Deferred.await(ready)))
  }
  const cluster = new Cluster({ bus: buses.control, namespace, workers, stop: scope.close })
  const asked = { prompt: "The sea", maxTokens: 200, ignoreEos: true }
  const alone = await cluster.generate(asked)
  const joining = testScope()
  let joined: Promise<void> | undefined
  const across = await cluster.generate(asked, (tokens) => void (joined ??= tokens < 20 ? undefined : joining.start(joinNats(buses, "main", address))))
  await joined
  expect(buses.control.attached).toBe(true)
  expect(across.tokens).toEqual(alone.tokens)
  expect((await cluster.generate(asked)).tokens).toEqual(alone.tokens)
  await joining.close()
  expect(buses.control.attached).toBe(false)
  expect((await cluster.generate(asked)).tokens).toEqual(alone.tokens)
  await cluster.untilIdle()
  await cluster.stop()
  expect(violations()).toEqual([])
})

test("a node keeps the wanted topology in JetStream, and a worker can neither read nor write it", async () => {
  const as = async (role: "node" | "worker") => {
    const tls = { ca: readFileSync(at("ca.pem"), "utf8"), cert: readFileSync(at("client.pem"), "utf8"), key: readFileSync(at("client.key"), "utf8") }
    const prefix = `${inboxPrefix(namespaceOf("main", everyGeneration), role, "n0")}.0`
    return connect({ servers: address.url, authenticator: nkeyAuthenticator(readFileSync(at(`keys/${role}.nk`))), tls, inboxPrefix: prefix })
  }
  const [node, worker] = [await as("node"), await as("worker")]
  const bucket = topologyBucket("main")
  const [stream, key] = [`KV_${bucket}`, `$KV.${bucket}.wanted`]
  const created = await node.request(`$JS.API.STREAM.CREATE.${stream}`, JSON.stringify({ name: stream, subjects: [`$KV.${bucket}.>`], max_msgs_per_subject: 5, allow_direct: true, discard: "new", storage: "file" }))
  expect(created.json()).toMatchObject({ config: { name: stream } })
  expect((await node.request(key, "penstock: 1")).json()).toMatchObject({ stream, seq: 1 })
  expect((await node.request(`$JS.API.DIRECT.GET.${stream}.${key}`)).string()).toBe("penstock: 1")
  await expect(worker.request(key, "penstock: 2")).rejects.toThrow()
  await expect(worker.request(`$JS.API.DIRECT.GET.${stream}.${key}`)).rejects.toThrow()
  expect((await node.request(`$JS.API.DIRECT.GET.${stream}.${key}`)).string()).toBe("penstock: 1")
  await Promise.all([node.close(), worker.close()])
  expect(violations().length).toBeGreaterThan(0) // so that there were none before says something
})

test("a node joins with the keys of its processes, and an operator with a node's: nothing that they do is refused", { timeout: 240_000 }, async () => {
  const before = violations().length
  const cluster = await AgentCluster.start(address)
  try {
    const node = await cluster.agent("a", "--gateway", "--port", "0")
    const applied = await cluster.run("apply", cluster.file("two.yaml", "workers: [{ name: p0, roles: [prefill] }, { name: d0, roles: [decode] }]"))
    expect([applied.code, applied.err]).toEqual([0, ""])
    const { nodes } = await cluster.until(({ nodes: [one] }) => one?.gateway !== undefined)
    expect((await streamCompletion({ url: nodes[0]!.gateway!, modelName: "tiny" }, request)).tokens).toHaveLength(60)
    expect((await cluster.run("status")).code).toBe(0)
    expect(node.output()).not.toMatch(/the server says/)
  } finally {
    await cluster.stop()
  }
  expect(violations().slice(before)).toEqual([])
})
