import { describe, expect, it } from "vitest"
import { parseTopology } from "../../config/load-topology.ts"
import type { Topology } from "../../config/topology.ts"
import { describe as sentence, plan } from "../../actors/node/plan.ts"
import { fixedFor, systemOf, topologyOf } from "../../actors/node/wanted.ts"

const model = { name: "tiny", aliases: [], path: "/tiny.gguf", sha256: "0".repeat(64) }
const { topology: base } = parseTopology("penstock: 1", { path: "/tmp/base.yaml" })
const wanted = (topology: Topology, sha256 = model.sha256) => systemOf({ topology, model: { ...model, sha256 } })
const worker = base.workers[0]!
const withWorker = (change: Partial<Topology["workers"][number]>): Topology => ({ ...base, workers: [{ ...worker, ...change }] })

describe("the system that a topology wants", () => {
  it.each<readonly [key: string, Topology, plan: string]>([
    ["bus", { ...base, bus: { nats: { spawn: true } } }, "connect to NATS (a nats-server of its own)"],
    ["gateway.host", { ...base, gateway: { ...base.gateway, host: "::1" } }, "listen at ::1:8080 (host 127.0.0.1 -> ::1)"],
    ["gateway.port", { ...base, gateway: { ...base.gateway, port: 1 } }, "listen at 127.0.0.1:1 (port 8080 -> 1)"],
    ["gateway.keys", { ...base, gateway: { ...base.gateway, keys: "/keys" } }, "listen at 127.0.0.1:8080 (keys none -> /keys)"],
    ["request.replicas", { ...base, request: { replicas: 2 } }, "start request r1"],
    ["scheduler.policy", { ...base, scheduler: { ...base.scheduler, policy: "least-loaded" } }, "change scheduler s0: policy cache-aware -> least-loaded"],
    ["scheduler.queue", { ...base, scheduler: { ...base.scheduler, queue: 7 } }, "change scheduler s0: queue 256 -> 7"],
    ["workers", { ...base, workers: [worker, { ...worker, name: "w1" }] }, "start worker w1 (prefill, decode)"],
    ["workers[].threads", withWorker({ threads: 3 }), "restart worker w0: threads auto -> 3"],
    ["workers[].maxBatch", withWorker({ maxBatch: 3 }), "change worker w0: maxBatch 32 -> 3"],
    ["workers[].kv.dtype", withWorker({ kv: { ...worker.kv, dtype: "int8" } }), "send new requests to tiny (KV in int8, blocks of 16 tokens)"],
    ["workers[].kv.blockTokens", withWorker({ kv: { ...worker.kv, blockTokens: 32 } }), "send new requests to tiny (KV in f16, blocks of 32 tokens)"],
    ["kvStore.replicas", { ...base, kvStore: { ...base.kvStore, replicas: 2 } }, "start kv-store k1"],
    ["kvStore.memory", { ...base, kvStore: { ...base.kvStore, memory: 1 } }, "restart kv-store k0: memory 268435456 -> 1"],
    ["kvStore.disk", { ...base, kvStore: { ...base.kvStore, disk: { path: "/kv", size: 1 } } }, "restart kv-store k0: disk 2147483648 -> 1, path auto -> /kv"],
    ["kvStore.eviction", { ...base, kvStore: { ...base.kvStore, eviction: "lfu" } }, "restart kv-store k0: eviction lru -> lfu"],
    ["kvStore.shared", { ...base, kvStore: { ...base.kvStore, shared: true } }, "restart request r0: prefixes of each tenant -> shared"],
  ])("differs where %s does", (_, changed, step) => {
    expect(plan(wanted(base), wanted(changed)).map(sentence)).toContain(step)
    expect(plan(wanted(changed), wanted(changed))).toEqual([])
  })

  it("differs where the model's file does", () => {
    expect(plan(wanted(base), wanted(base, "1".repeat(64))).map(({ type }) => type)).toContain("switch-generation")
  })

  it("cannot have another cluster or collector than the process that runs it", () => {
    expect(fixedFor(base, { ...base, cluster: "other", telemetry: { otlp: "http://127.0.0.1:4318" } })).toEqual([
      expect.stringMatching(/^cluster: is main .* start it with other$/),
      expect.stringMatching(/^telemetry\.otlp: is null /),
    ])
    expect(fixedFor(base, { ...base, model: "other" })).toEqual([])
  })

  it("tells a worker that starts again what it was changed to meanwhile", () => {
    const [planned] = wanted(base).components.filter(({ kind }) => kind === "worker")
    expect(topologyOf(base, { ...planned!, roles: [], live: { maxBatch: 4, blocks: 9 } }).workers).toEqual([{ ...worker, roles: [], maxBatch: 4, kv: { ...worker.kv, blocks: 9 } }])
  })
})
