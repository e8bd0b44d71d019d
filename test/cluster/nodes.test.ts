/** A cluster of nodes: real processes over a real nats-server with JetStream. */
import { join } from "node:path"
import { isDeepStrictEqual } from "node:util"
import { afterAll, beforeAll, expect, it } from "vitest"
import type { KvDtype } from "../../kernels/index.ts"
import { AgentCluster, type StartedAgent } from "../support/start-agent.ts"
import type { WorkerStatus } from "../../gateway/actors-route.ts"
import { natsStartTimeoutMs } from "../support/start-nats.ts"
import { startNode, streamCompletion, type Answer } from "../support/start-node.ts"

// A busy machine takes half a minute to start a process.
const timeout = 240_000

let cluster: AgentCluster
let a: StartedAgent
let b: StartedAgent
let url: string

const request = (seed: number, tokens = 400) => ({ prompt: `The ${seed}th story of the lighthouse keeper:`, max_tokens: tokens, ignore_eos: true, temperature: seed % 2, seed })
const seeds = [1, 2, 3, 4]
/** Answers to each seed where nothing happens, with KV in f16 and in int8. */
let undisturbed: ReadonlyArray<Answer>
let quantised: ReadonlyArray<Answer>

const answersOf = async (dtype: KvDtype, tokens?: number): Promise<ReadonlyArray<Answer>> => {
  const model = { path: join(cluster.folder, "tiny.gguf"), name: "tiny", sha256: "0".repeat(64) }
  const alone = await startNode({ model, change: (topology) => ({ ...topology, workers: topology.workers.map((worker) => ({ ...worker, kv: { ...worker.kv, dtype } })) }) })
  const answers = await Promise.all(seeds.map((seed) => streamCompletion(alone, request(seed, tokens))))
  await alone.stop()
  return answers
}

interface Load {
  readonly tokens?: number
  readonly before?: ReadonlyArray<Answer>
  readonly after?: ReadonlyArray<Answer>
}

/**
 * Streams one after another for each seed, until `during` has ended and each has had one more. Rejects where one differs from
 * its undisturbed run, which goes over from `before` to `after` once.
 */
const underLoad = async (during: () => Promise<void>, { tokens, before = undisturbed, after = before }: Load = {}): Promise<void> => {
  let over = false
  let begun = 0
  let all: () => void
  const allBegun = new Promise<void>((resolve) => (all = resolve))
  const keepOn = async (seed: number, i: number): Promise<void> => {
    let expected = [before[i], after[i]]
    for (let last = false; !last; ) {
      last = over
      const answer = await streamCompletion({ url, modelName: "tiny" }, request(seed, tokens), () => ++begun === seeds.length && all())
      expect(last ? expected.slice(-1) : expected).toContainEqual(answer)
      if (!isDeepStrictEqual(answer, before[i])) expected = [after[i]]
    }
  }
  const load = Promise.all(seeds.map(keepOn))
  load.catch(() => {})
  await Promise.race([allBegun, load])
  await Promise.race([during().finally(() => (over = true)), load])
  await load
}

const running = (name: string) => cluster.processes().get(name)
/** As the gateway hears them. */
const workers = async () => ((await (await fetch(`${url}/actors`)).json()) as { readonly workers: ReadonlyArray<WorkerStatus> }).workers
/** Waits until a worker has these roles, and decodes something or nothing. */
const worker = async (name: string, roles: ReadonlyArray<string>, decodes: boolean): Promise<void> => {
  const holds = (found: WorkerStatus | undefined) => isDeepStrictEqual(found?.roles, roles) && found!.load.sequences > 0 === decodes
  while (!holds((await workers()).find((one) => one.name === name))) await new Promise((resolve) => setTimeout(resolve, 20))
}
/** Everything goes to node b, but for the gateway. */
const moveToB = async (): Promise<void> => {
  await cluster.control.drain("a", false)
  await cluster.until(({ settled, components }) => settled && components.every(({ node }) => node === "b"))
  await cluster.control.drain("a", true)
  await cluster.until(({ settled, nodes }) => settled && nodes.every(({ drained }) => !drained))
}
const gone = async (pid: number) => {
  for (;;) {
    try {
      process.kill(pid, 0)
    } catch {
      return
    }
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

beforeAll(async () => {
  cluster = await AgentCluster.start()
  undisturbed = await answersOf("f16")
  quantised = await answersOf("int8")
}, natsStartTimeoutMs)
afterAll(() => cluster.stop(), timeout)

it("a node joins, gets what is wanted, and answers at its gateway", { timeout }, async () => {
  a = await cluster.agent("a", "--gateway", "--port", "0")
  const applied = await cluster.run("apply", cluster.file("one.yaml", "workers: [{ name: w0 }]"))
  expect([applied.code, applied.err]).toEqual([0, ""])
  expect(applied.out).toMatch(/worker w0: on a[^]*\n {2}a: settled\ndone\n$/)
  const { nodes, leader } = await cluster.until(({ settled, nodes: [node] }) => settled && node?.gateway !== undefined)
  url = nodes[0]!.gateway!
  expect(leader).toBe("a")
  expect(await (await fetch(`${url}/ready`)).json()).toEqual({ ready: true })
  expect(await streamCompletion({ url, modelName: "tiny" }, request(1))).toEqual(undisturbed[0])
})

it("a worker goes to the node that has its labels; what no node has is reported, and the rest runs", { timeout }, async () => {
  b = await cluster.agent("b", "--labels", "gpu=h100,zone=b")
  const path = cluster.file("two.yaml", "workers:", "  - { name: w0 }", "  - { name: w1, labels: { gpu: h100 } }", "  - { name: w2, labels: { gpu: a100 } }")
  const applied = await cluster.run("apply", path)
  expect(applied.code).toBe(1)
  expect(applied.err).toBe("unplaceable: worker w2: no node fits: a lacks gpu=a100; b lacks gpu=a100\n")
  const { components } = await cluster.until(({ settled }) => settled)
  expect(components.filter(({ kind }) => kind === "worker").map(({ id, node }) => [id, node])).toEqual([["w0", "a"], ["w1", "b"]])
  const { code, out } = await cluster.run("status")
  expect(code).toBe(1)
  expect(out).toMatch(/^cluster main: revision \d+ of .*two\.yaml is wanted; settled, but 1 without a place; a leads$/m)
  expect(out).toMatch(/^node b \(.*gpu=h100,zone=b\): settled\n {2}runs worker w1$/m)
  expect(out).toMatch(/^worker w2 cannot be placed: no node fits: /m)
  expect(out).toMatch(/^w1 +prefill, decode +prefill, decode +b \d+ +0 of 32 +0 +0 of \d+ \(0 %\) +[0-9a-f]{8}$/m)
  expect(out).toMatch(/^w2 +does not run +prefill, decode$/m)
  expect(out).toMatch(/^last changes\n {2}\S+Z {2}b: done, 1 step: start worker w1 \(prefill, decode\) in a process of its own$/m)
  expect(await (await fetch(`${url}/ready`)).json()).toMatchObject({ reason: "what does not serve now: worker w2" })
})

it("a dry run prints what would move, and changes nothing", { timeout }, async () => {
  const before = await cluster.control.status()
  const path = cluster.file("dry.yaml", "workers: [{ name: w0 }, { name: w9, labels: { gpu: h100 } }]")
  const { code, out, err } = await cluster.run("apply", path, "--dry-run")
  expect([code, out, err]).toEqual([0, "the plan\n  worker w9: on b\n  worker w1: no more on b\n", ""])
  expect(await cluster.control.status()).toEqual(before)
})

it("of two editors of one revision the second is told, and a file of another cluster or with a mistake changes nothing", { timeout }, async () => {
  const { wanted } = await cluster.control.status()
  const path = cluster.file("three.yaml", "workers: [{ name: w0 }, { name: w1 }]")
  const revision = String(wanted!.revision)
  const put = (text: string, of = revision) => fetch(`${url}/topology`, { method: "PUT", body: text, headers: { "if-match": `"${of}"` } })
  const first = await put(wanted!.text.replace("a100", "h100"))
  expect(first.status).toBe(202)
  const second = await cluster.run("apply", path, "--revision", revision)
  expect([second.code, second.err]).toEqual([1, expect.stringMatching(/has changed since it was read: its revision is \d+ now/)])
  const third = await put(wanted!.text)
  expect(third.status).toBe(412)
  const current = /\d+/.exec(third.headers.get("etag")!)![0]
  expect(first.headers.get("etag")).toBe(`"${current}"`)
  expect((await put("penstock: 1\nworkers: [{ name: w0, rolls: [decode] }]", current)).status).toBe(400)
  const other = await cluster.run("apply", cluster.file("other.yaml", "cluster: other"), "--cluster", "main")
  expect([other.code, other.err]).toEqual([1, "other.yaml: cluster: expected main, as this cluster is called, found other\n"])
  expect(String((await cluster.control.status()).wanted!.revision)).toBe(current)
  const applied = await cluster.run("apply", path, "--revision", current)
  expect([applied.code, applied.err]).toEqual([0, ""])
})

it("kill -9 of a node's agent under load: what it ran goes on, its successor adopts it, and no stream notices", { timeout }, async () => {
  await cluster.until(({ settled }) => settled)
  const before = running("b worker w1")
  expect(before).toBeDefined()
  await underLoad(async () => {
    await b.end("SIGKILL")
    b = await cluster.agent("b", "--labels", "gpu=h100,zone=b")
    await cluster.until(({ settled, nodes }) => settled && nodes.length === 2)
  })
  await b.said(/goes on with what an earlier agent has left: worker w1/)
  const { components } = await cluster.until(({ settled }) => settled)
  expect(components.find(({ id }) => id === "w1")?.node).toBe("b")
  expect(running("b worker w1")).toBe(before)
  // It is supervised: what dies is started again.
  process.kill(before!, "SIGKILL")
  await b.said(/worker w1 failed and is restarted/)
  await cluster.until(() => running("b worker w1") !== undefined && running("b worker w1") !== before)
})

it("a worker is drained under load: its streams go on elsewhere, it keeps its process, and undo gives its roles back", { timeout }, async () => {
  const pid = running("b worker w1")
  await underLoad(async () => {
    const drained = await cluster.run("drain", "w0")
    expect([drained.code, drained.out]).toEqual([0, "worker w0 has no roles from now on; drain w0 --undo gives them back\n"])
    await worker("w0", [], false)
    await worker("w1", ["prefill", "decode"], true) // all of them
    await cluster.control.drain("w0", true)
    await cluster.control.drain("w1", false)
    await worker("w1", [], false)
    await worker("w0", ["prefill", "decode"], true)
  })
  await cluster.until(({ settled }) => settled)
  expect((await cluster.run("status")).out).toMatch(/^w1 +none +none \(drained\) +b \d+ +0 of 32 /m)
  expect((await cluster.run("drain", "w0")).err).toMatch(/w0 is the only worker that can prefill: add another to the topology first/)
  const undone = await cluster.run("drain", "w1", "--undo")
  expect([undone.code, undone.out]).toEqual([0, "worker w1 is used again\n"])
  await worker("w1", ["prefill", "decode"], false)
  expect(running("b worker w1")).toBe(pid)
})

it("a node is drained under load: what it runs is placed elsewhere, no stream ends early, and it is taken back", { timeout }, async () => {
  await cluster.until(({ settled }) => settled)
  await underLoad(async () => {
    const drained = await cluster.run("drain", "b")
    expect([drained.code, drained.out]).toEqual([0, "what runs on node b goes elsewhere; drain b --undo takes it back\n"])
    await cluster.until(({ settled, components, nodes }) => settled && components.every(({ node }) => node === "a") && nodes.find(({ name }) => name === "b")?.components.length === 0)
  })
  expect(running("b worker w1")).toBeUndefined()
  expect((await cluster.run("drain", "a")).err).toMatch(/a is the only node that can run anything: start another first/)
  expect((await cluster.run("drain", "nobody")).err).toMatch(/there is no node and no worker nobody/)
  expect((await cluster.run("drain", "b", "--undo")).code).toBe(0)
  const path = cluster.file("four.yaml", "workers: [{ name: w0 }, { name: w3, labels: { zone: b } }]")
  expect((await cluster.run("apply", path)).code).toBe(0)
  expect(running("b worker w3")).toBeDefined()
})

it("another type of KV is another generation on every node: what runs ends on the old one, what comes goes to the new one", { timeout }, async () => {
  const tokens = 1200 // streams that are not at their end when it changes
  const [before, after] = [await answersOf("f16", tokens), await answersOf("int8", tokens)]
  expect(after).not.toEqual(before)
  await moveToB() // whose agent has no gateway to ask what still runs
  const pid = running("b worker w0")
  await underLoad(async () => {
    const applied = await cluster.run("apply", cluster.file("five.yaml", "workers:", "  - { name: w0, kv: { dtype: int8 } }", "  - { name: w3, kv: { dtype: int8 } }"))
    expect([applied.code, applied.err]).toEqual([0, ""])
  }, { tokens, before, after })
  expect([pid, undefined]).not.toContain(running("b worker w0"))
})

it("SIGTERM of a node's agent under load: others take over what it runs before it ends, and no stream notices", { timeout }, async () => {
  const pids = [...cluster.processes()].flatMap(([name, pid]) => (name.startsWith("b ") ? [pid] : []))
  await underLoad(async () => {
    await b.end("SIGTERM")
    expect(b.child.exitCode).toBe(0)
    expect(b.output()).toMatch(/SIGTERM: leaving; a second signal stops it at once\n[^]*drain worker w0: .*: done[^]*stop request r0: done[^]*SIGTERM: stopping\n$/)
    await Promise.all(pids.map(gone))
    const { components } = await cluster.until(({ settled, nodes }) => settled && nodes.length === 1)
    expect(components.every(({ node }) => node === "a")).toBe(true)
  }, { before: quantised })
  b = await cluster.agent("b", "--labels", "zone=b")
})

it("a node is lost with all that there is, the only request actor too, but for the gateway: every stream goes on", { timeout }, async () => {
  await cluster.until(({ nodes }) => nodes.length === 2)
  await moveToB()
  const pids = [...cluster.processes()].flatMap(([name, pid]) => (name.startsWith("b ") ? [pid] : []))
  let begun = 0
  const lose = () => void (++begun === seeds.length && [b.child.pid!, ...pids].forEach((pid) => process.kill(pid, "SIGKILL")))
  expect(await Promise.all(seeds.map((seed) => streamCompletion({ url, modelName: "tiny" }, request(seed), lose)))).toEqual(quantised)
  await Promise.all([b.end("SIGKILL"), ...pids.map(gone)])
  const { components } = await cluster.until(({ settled, nodes }) => settled && nodes.length === 1)
  expect(components.every(({ node }) => node === "a")).toBe(true)
  // One that comes back runs what is placed on it: nothing, since all that there is has a place.
  b = await cluster.agent("b", "--labels", "zone=b")
  await cluster.until(({ settled, nodes }) => settled && nodes.length === 2)
  expect(running("b worker w3")).toBeUndefined()
})

it("a second agent of a node's name is refused", { timeout }, async () => {
  await expect(cluster.agent("b")).rejects.toThrow(/held by process|has a node b already/)
})

it("the leader is told to end while its gateway streams: the stream ends first, another node leads, and what it ran is placed there", { timeout }, async () => {
  let ended: Promise<void> | undefined
  const { tokens } = await streamCompletion({ url, modelName: "tiny" }, request(1, 2000), () => (ended = a.end()))
  expect(tokens).toHaveLength(2000)
  expect(tokens.slice(0, 400)).toEqual(quantised[0]!.tokens)
  await ended
  expect(a.child.exitCode).toBe(0)
  const { leader, components } = await cluster.until(({ settled, nodes, leader: now }) => settled && nodes.length === 1 && now === "b")
  expect(leader).toBe("b")
  expect(components.map(({ node }) => node)).toEqual(components.map(() => "b"))
  for (const { kind, id } of components) expect(running(`b ${kind} ${id}`)).toBeDefined()
})
