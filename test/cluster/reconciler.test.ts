import { createServer, type AddressInfo } from "node:net"
import { afterEach, beforeEach, describe, expect, it, onTestFinished, vi } from "vitest"
import { presenceSubject } from "../../actors/messages/subjects.ts"
import type { Topology } from "../../config/topology.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"

describe("a reconciler", () => {
  let node: StartedNode
  beforeEach(async () => {
    node = await startNode({ change: (topology) => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, threads: 1, kv: { ...worker.kv, blocks: 256 } })) }) })
  })
  afterEach(() => node.stop())

  const want = (topology: Topology) => node.reconciler.want({ topology, model: node.reconciler.wanted!.model })
  const settled = async () => {
    while (node.reconciler.state === "changing") await new Promise((resolve) => setTimeout(resolve, 5))
    return node.reconciler.changes[0]!
  }
  const change = (worker: Partial<Topology["workers"][number]>): Topology => ({ ...node.topology, workers: [{ ...node.topology.workers[0]!, ...worker }] })
  const answers = async () => expect((await streamCompletion(node, { prompt: "Hello", max_tokens: 5, ignore_eos: true })).tokens).toHaveLength(5)

  it("changes batch, pool and policy of what runs, and restarts a worker only for a larger pool", async () => {
    const { worker } = node.workers.get("w0")!
    const { kv } = node.topology.workers[0]!
    want({ ...change({ maxBatch: 4, kv: { ...kv, blocks: 100 } }), scheduler: { ...node.topology.scheduler, policy: "least-loaded", queue: 9 } })
    expect(await settled()).toMatchObject({ outcome: "done", steps: [{ step: "restart request r0: largest pool 256 -> 100" }, { step: "change scheduler s0: policy cache-aware -> least-loaded, queue 256 -> 9" }, { step: "change worker w0: maxBatch 32 -> 4, blocks 256 -> 100" }] })
    expect([worker.engine.maxBatch, worker.engine.blocks.limit]).toEqual([4, 100])
    expect(node.workers.get("w0")!.worker).toBe(worker)
    await answers()
    want(change({ kv: { ...kv, blocks: 300 } }))
    expect(await settled()).toMatchObject({ outcome: "done" })
    expect(node.workers.get("w0")!.kernels.info.blocks).toBe(300)
    await answers()
  })

  it("is done when the gateway has heard of what serves, and not before", async () => {
    const publish = node.bus.publish.bind(node.bus)
    const late: Array<NodeJS.Timeout> = []
    onTestFinished(() => {
      vi.restoreAllMocks()
      late.forEach(clearTimeout)
    })
    vi.spyOn(node.bus, "publish").mockImplementation((subject, ...message) => {
      if (subject === presenceSubject(node.namespace)) late.push(setTimeout(() => publish(subject, ...message), 200))
      else publish(subject, ...message)
    })
    want({ ...node.topology, workers: [...node.topology.workers, { ...node.topology.workers[0]!, name: "w1" }] })
    expect(await settled()).toMatchObject({ outcome: "done" })
    expect(await (await fetch(`${node.url}/ready`)).json()).toEqual({ ready: true })
  })

  it("does what it can where a step fails, says what is left, and tries again", async () => {
    const blocker = createServer().listen(0, "127.0.0.1")
    await new Promise((resolve) => blocker.once("listening", resolve))
    const { port } = blocker.address() as AddressInfo
    const before = node.url
    want({ ...node.topology, gateway: { ...node.topology.gateway, port }, workers: [...node.topology.workers, { ...node.topology.workers[0]!, name: "w1" }] })
    expect(await settled()).toMatchObject({ outcome: "failed", error: expect.stringMatching(new RegExp(`cannot listen on 127.0.0.1:${port}: the port is in use`)), steps: [{ step: "start worker w1 (prefill, decode)", state: "done" }, { state: "failed" }] })
    expect([...node.workers.keys()]).toEqual(["w0", "w1"])
    expect(node.url).toBe(before)
    await answers()
    await new Promise((resolve) => blocker.close(resolve))
    while ((await settled()).outcome !== "done") await new Promise((resolve) => setTimeout(resolve, 50))
    expect(node.port).toBe(port)
    await answers()
  })

  it("gives up an older topology for the newest, and ends as that says", async () => {
    for (let blocks = 300; blocks < 306; blocks++) {
      want({ ...change({ kv: { ...node.topology.workers[0]!.kv, blocks } }), scheduler: { ...node.topology.scheduler, queue: blocks } })
      await new Promise((resolve) => setTimeout(resolve, 3))
    }
    await settled()
    expect(node.workers.get("w0")!.kernels.info.blocks).toBe(305)
    expect(node.reconciler.planFor(node.reconciler.wanted!)).toEqual([])
    await answers()
  })

  it("lets a drained worker serve again where a new topology leaves nobody else", async () => {
    const worker = node.topology.workers[0]!
    want({ ...node.topology, workers: [worker, { ...worker, name: "w1" }] })
    await settled()
    node.reconciler.drain("w0")
    await settled()
    expect(node.workers.get("w0")!.worker.roles).toEqual([])
    want(node.topology)
    await settled()
    expect(node.workers.get("w0")!.worker.roles).toEqual(["prefill", "decode"])
    await answers()
  })
})
