/** Streams that go on with other workers, on real processes: roles that change, workers that are drained, or told to end. */
import { Effect } from "effect"
import { afterAll, beforeAll, describe, expect, it } from "vitest"
import { subject } from "../../actors/messages/subjects.ts"
import { Configure, Drain } from "../../actors/messages/worker.ts"
import type { Role } from "../../actors/messages/scheduler.ts"
import { Link } from "../../actors/runtime/link.ts"
import { startNode, streamCompletion, type StartedNode } from "../support/start-node.ts"

interface WorkerSeen {
  readonly name: string
  readonly pid: number
  readonly roles: ReadonlyArray<string>
  readonly load: { readonly sequences: number }
}

describe("a prefill worker and two that decode, as processes", () => {
  const requests = [0, 1].map((temperature) => ({ prompt: "A long story about a lighthouse keeper and the sea:", max_tokens: 250, ignore_eos: true, temperature, seed: 7 }))
  let node: StartedNode
  let undisturbed: ReadonlyArray<Awaited<ReturnType<typeof streamCompletion>>>
  beforeAll(async () => {
    node = await startNode({
      preset: "disaggregated",
      change: (topology) => ({ ...topology, workers: topology.workers.flatMap((worker) => (worker.name === "d0" ? [worker, { ...worker, name: "d1" }] : [worker])) }),
    })
    undisturbed = await Promise.all(requests.map((request) => streamCompletion(node, request)))
  }, 240_000)
  afterAll(() => node.stop())

  const link = () => new Link(node.bus, "test", 1)
  const workers = async () => ((await (await fetch(`${node.url}/actors`)).json()) as { workers: ReadonlyArray<WorkerSeen> }).workers
  const setRoles = (worker: string, roles: ReadonlyArray<Role>) => Effect.runPromise(link().ask(Configure, subject(node.namespace, "worker", worker, Configure.verb), { roles }, { hop: `worker ${worker}` }))
  const drain = (worker: string) => Effect.runPromise(link().ask(Drain, subject(node.namespace, "worker", worker, Drain.verb), { deadlineMs: 20_000 }, { hop: `worker ${worker}`, deadlineMs: 30_000 }))
  /** All streams, and what is done in the middle of them, once all have begun. */
  const disturbed = async (disturb: () => Promise<unknown>) => {
    let begun = 0
    let disturbing: Promise<unknown> | undefined
    const answers = await Promise.all(requests.map((request) => streamCompletion(node, request, () => void (++begun === requests.length && (disturbing = disturb())))))
    await disturbing
    return answers
  }

  it("roles that go round while streams run: the same text, in the same processes", async () => {
    const before = await workers()
    const walk = async () => {
      for (const [gains, loses] of [["p0", "d0"], ["d0", "d1"], ["d1", "p0"]] as const) {
        await setRoles(gains, ["decode"])
        await setRoles(loses, ["prefill"])
      }
    }
    expect(await disturbed(walk)).toEqual(undisturbed)
    expect((await workers()).map(({ name, pid }) => ({ name, pid }))).toEqual(before.map(({ name, pid }) => ({ name, pid })))
    for (const [name, roles] of [["d0", ["decode"]], ["d1", ["decode"]], ["p0", ["prefill"]]] as const) await setRoles(name, roles)
  }, 120_000)

  it("a decode worker that is drained: its streams go on with the other, with the same text", async () => {
    await setRoles("d1", [])
    const answers = disturbed(async () => {
      await setRoles("d1", ["decode"])
      expect(await drain("d0")).toEqual({ moved: 2, finished: 0, left: 0 })
    })
    expect(await answers).toEqual(undisturbed)
    await setRoles("d0", ["decode"])
  }, 120_000)

  it("a decode worker that is told to end: its streams go on with the other, with the same text", async () => {
    const answers = disturbed(async () => {
      for (const { name, pid, load } of await workers()) if (name.startsWith("d") && load.sequences > 0) return process.kill(pid, "SIGTERM")
    })
    expect(await answers).toEqual(undisturbed)
  }, 120_000)
})
