import { afterAll, beforeAll, describe, expect, it } from "vitest"
import { gapFigures, SteadyLoad, steadyRequests, watched, type Ask, type Seen } from "../support/steady-load.ts"
import { spawned, startRecomposed, topologyText, workerLines, type Recomposed } from "../support/start-recomposed.ts"

const single = topologyText(workerLines({ w0: "prefill, decode" }))
const disaggregated = topologyText([spawned, ...workerLines({ p0: "prefill", d0: "decode" })])
const twoPrefillOneDecode = topologyText([spawned, "request: { replicas: 2 }", ...workerLines({ p0: "prefill", p1: "prefill", d0: "decode" })])
const onePrefillTwoDecode = topologyText([spawned, ...workerLines({ p0: "prefill", d0: "decode", d1: "decode" })])
const flipped = topologyText([spawned, ...workerLines({ p0: "decode", d0: "prefill", d1: "prefill" })])

const undisturbed = (up: Recomposed, model: string, requests: ReadonlyArray<Ask>): Promise<ReadonlyArray<Seen>> => Promise.all(requests.map((ask, i) => watched(up.url, model, i, ask)))

const workersOf = async ({ url }: Recomposed) => {
  const { workers } = (await (await fetch(`${url}/actors`)).json()) as { workers: ReadonlyArray<{ name: string; pid: number; roles: ReadonlyArray<string> }> }
  return workers
}

const sameAs = (expected: ReadonlyArray<Seen>, seen: ReadonlyArray<Seen>) => {
  for (const { index, text, tokens } of seen) expect({ index, text, tokens }).toEqual({ index, text: expected[index]!.text, tokens: expected[index]!.tokens })
}

describe("a topology that is edited under a steady load of 24 streams, greedy and sampled", { timeout: 300_000 }, () => {
  const requests = steadyRequests(24, 400)
  let up: Recomposed
  let expected: ReadonlyArray<Seen>
  beforeAll(async () => {
    up = await startRecomposed(single)
    expected = await undisturbed(up, "tiny", requests)
  }, 120_000)
  afterAll(() => up.stop())

  it("walks through every shape twice, and every stream gets the text of its undisturbed run", async () => {
    const load = new SteadyLoad(() => up.url, () => "tiny", requests)
    const shapes = { disaggregated, twoPrefillOneDecode, onePrefillTwoDecode, flipped, single }
    const took: Array<string> = []
    for (const round of [1, 2]) {
      for (const [name, text] of Object.entries(shapes)) {
        const startedAtMs = performance.now()
        const state = await up.recompose(text)
        took.push(`${name} ${Math.round(performance.now() - startedAtMs)} ms`)
        expect({ name, round, state: state.state, left: state.plan, failures: load.failures }).toEqual({ name, round, state: "settled", left: [], failures: [] })
        expect({ name, round, ready: await (await fetch(`${up.url}/ready`)).json() }).toEqual({ name, round, ready: { ready: true } })
      }
    }
    const seen = await load.stop()
    console.log(`recomposed: ${took.join(", ")}`)
    console.log(`longest time without a token: undisturbed ${JSON.stringify(gapFigures(expected))}, recomposed ${JSON.stringify(gapFigures(seen))}`)
    expect(load.failures).toEqual([])
    expect(seen.length).toBeGreaterThanOrEqual(requests.length)
    sameAs(expected, seen)
  })

  it("a worker that only changes its roles keeps its process, and its roles when it is killed", async () => {
    await up.recompose(onePrefillTwoDecode)
    const before = await workersOf(up)
    await up.recompose(flipped)
    const after = await workersOf(up)
    expect(after.map(({ name, pid }) => [name, pid])).toEqual(before.map(({ name, pid }) => [name, pid]))
    const roles = { p0: ["decode"], d0: ["prefill"], d1: ["prefill"] }
    expect(Object.fromEntries(after.map((worker) => [worker.name, worker.roles]))).toEqual(roles)
    const { pid } = after.find(({ name }) => name === "d1")!
    process.kill(pid, "SIGKILL")
    const back = async () => (await workersOf(up)).find((worker) => worker.name === "d1" && worker.pid !== pid)
    while ((await back()) === undefined) await new Promise((resolve) => setTimeout(resolve, 50))
    expect((await back())!.roles).toEqual(roles.d1)
    expect((await up.state()).plan).toEqual([])
    await up.recompose(single)
  })

  it("files that are empty, half written or refused change nothing, and are said once", async () => {
    const load = new SteadyLoad(() => up.url, () => "tiny", requests)
    const [before, workers] = [await up.state(), await workersOf(up)]
    for (const [text, says] of [
      ["", /tiny\.yaml.*empty/],
      [disaggregated.slice(0, -30), /tiny\.yaml:\d+/],
      [disaggregated.replace("roles", "rolls"), /tiny\.yaml:6: workers\[0\]\.rolls: unknown key, did you mean roles/],
      [single.replace("penstock: 1", "penstock: 1\ncluster: other"), /cluster: is main for as long as this process runs/],
      [single.replace("tiny.gguf", "none.gguf"), /none\.gguf: no such file/],
    ] as const) {
      const printed = up.output().length
      up.edit(text)
      while (!up.output().slice(printed).includes("nothing is changed")) await new Promise((resolve) => setTimeout(resolve, 20))
      await new Promise((resolve) => setTimeout(resolve, 300))
      const said = up.output().slice(printed)
      expect(said).toMatch(says)
      expect(said.match(/nothing is changed/g)).toHaveLength(1)
      const state = await up.state()
      expect({ ...state, refused: undefined }).toEqual({ ...before, refused: undefined })
      expect(state.refused).toMatch(says)
    }
    expect(await workersOf(up)).toMatchObject(workers.map(({ name, pid, roles }) => ({ name, pid, roles })))
    sameAs(expected, await load.stop())
    expect(load.failures).toEqual([])
  })

  it("a step that fails leaves a working pipeline, says what is not done, and the next file goes on from there", async () => {
    const load = new SteadyLoad(() => up.url, () => "tiny", requests)
    const failing = topologyText(["bus: { nats: { url: nats://127.0.0.1:9 } }", ...workerLines({ p0: "prefill", d0: "decode" })])
    const state = await up.recompose(failing)
    expect(state.state).toBe("failed")
    expect(state.changes[0]).toMatchObject({ outcome: "failed", error: expect.stringMatching(/connect to NATS \(nats:\/\/127\.0\.0\.1:9\): .*no NATS server answers there/) })
    expect(state.plan.length).toBeGreaterThan(0)
    expect(up.output()).toMatch(/failed: connect to NATS/)
    expect((await fetch(`${up.url}/ready`)).status).toBe(200)
    const mended = await up.recompose(disaggregated)
    expect(mended.state).toBe("settled")
    expect((await up.recompose(single)).state).toBe("settled")
    sameAs(expected, await load.stop())
    expect(load.failures).toEqual([])
  })

  it("another model, or another type of KV, is a new generation: running requests end on the old one, new ones go to the new", async () => {
    const running = undisturbed(up, "tiny", requests)
    // Those that are under way when it changes have said at least one token by then.
    await new Promise((resolve) => setTimeout(resolve, 300))
    const changed = up.recompose(topologyText(workerLines({ w0: "prefill, decode" }), "other"))
    const models = async () => ((await (await fetch(`${up.url}/v1/models`)).json()) as { data: ReadonlyArray<{ id: string }> }).data.map(({ id }) => id)
    while ((await models())[0] !== "other") await new Promise((resolve) => setTimeout(resolve, 20))
    expect((await fetch(`${up.url}/v1/completions`, { method: "POST", body: JSON.stringify({ model: "tiny", prompt: "x" }) })).status).toBe(404)
    const other = await watched(up.url, "other", 0, requests[0]!)
    expect(other.text).not.toBe(expected[0]!.text)
    sameAs(expected, await running)
    expect((await changed).state).toBe("settled")
    const quantised = up.recompose(topologyText(workerLines({ w0: "prefill, decode" }, ", dtype: int8"), "other"))
    expect(await watched(up.url, "other", 0, requests[0]!)).toMatchObject({ text: other.text })
    expect((await quantised).state).toBe("settled")
    expect((await up.recompose(single)).state).toBe("settled")
    sameAs(expected, await undisturbed(up, "tiny", requests.slice(0, 4)))
  })
})
