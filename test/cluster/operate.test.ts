import { execFile } from "node:child_process"
import { readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import { afterAll, beforeAll, describe, expect, it } from "vitest"
import { streamCompletion } from "../support/start-node.ts"
import { startRecomposed, topologyText, workerLines, type Recomposed } from "../support/start-recomposed.ts"

interface Ran {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

const penstock = (...args: ReadonlyArray<string>): Promise<Ran> =>
  new Promise((resolve) =>
    execFile(process.execPath, ["config/bootstrap.mjs", "run", ...args], (error, stdout, stderr) => resolve({ code: error === null ? 0 : Number(error.code), stdout, stderr })),
  )

const both = topologyText(workerLines({ w0: "prefill, decode" }))
const two = topologyText(workerLines({ w0: "prefill, decode", w1: "prefill, decode" }))

describe("a topology that is changed over HTTP", () => {
  let up: Recomposed
  const file = (text: string): string => {
    const path = join(up.folder, "wanted.yaml")
    writeFileSync(path, text)
    return path
  }
  const put = (text: string, headers: Readonly<Record<string, string>> = {}, query = "") => fetch(`${up.url}/topology${query}`, { method: "PUT", body: text, headers })
  beforeAll(async () => {
    up = await startRecomposed(both)
  }, 120_000)
  afterAll(() => up.stop())

  it("GET gives it with its revision, as JSON or as it was written", async () => {
    const response = await fetch(`${up.url}/topology`)
    const state = (await response.json()) as { revision: string }
    expect(response.headers.get("etag")).toBe(`"${state.revision}"`)
    expect(state).toMatchObject({ path: up.path, text: both, state: "settled", plan: [], topology: { workers: [{ name: "w0" }] } })
    expect(await (await fetch(`${up.url}/topology`, { headers: { accept: "application/yaml" } })).text()).toBe(both)
  })

  it("a dry run says the plan and changes nothing", async () => {
    const { code, stdout } = await penstock("apply", file(two), "--dry-run", "--url", up.url)
    expect({ code, stdout }).toEqual({ code: 0, stdout: "the plan\n  1. start worker w1 (prefill, decode)\n" })
    const json = await penstock("apply", file(two), "--dry-run", "--json", "--url", up.url)
    expect(JSON.parse(json.stdout)).toEqual({ revision: expect.stringMatching(/^[0-9a-f]{16}$/), plan: ["start worker w1 (prefill, decode)"] })
    expect(await up.state()).toMatchObject({ text: both, state: "settled" })
    expect(readFileSync(up.path, "utf8")).toBe(both)
  })

  it("apply rewrites the watched file, says each step, and ends when it is so", async () => {
    const { code, stdout } = await penstock("apply", file(two), "--url", up.url)
    expect(stdout).toMatch(/^the plan\n {2}1\. start worker w1 \(prefill, decode\)\n {2}start worker w1 \(prefill, decode\): done \(\d+\.\d s\)\ndone\n$/)
    expect(code).toBe(0)
    expect(readFileSync(up.path, "utf8")).toBe(two)
    expect((await penstock("apply", file(two), "--url", up.url)).stdout).toBe("nothing to change\ndone\n")
  })

  it("status shows the wanted beside what runs", async () => {
    const { stdout } = await penstock("status", "--url", up.url)
    expect(stdout).toMatch(/^settled: revision [0-9a-f]{16} of .*tiny\.yaml\n/)
    expect(stdout).toMatch(/^w1 +prefill, decode +prefill, decode +\S+ \d+ +0 of 32 +0 +0 of \d+ \(0 %\) +[0-9a-f]{8}$/m)
    expect(stdout).toMatch(/^scheduler s0 .*serving$/m)
    expect(stdout).toMatch(/last changes\n {2}\S+ {2}done, 0 steps\n {2}\S+ {2}done, 1 step: start worker w1 \(prefill, decode\)\n/)
    const { stdout: json } = await penstock("status", "--json", "--url", up.url)
    expect(json.trim().split("\n")).toHaveLength(1)
    expect(JSON.parse(json)).toMatchObject({ state: "settled", workers: [{ name: "w0" }, { name: "w1" }] })
  })

  it("drain takes a worker's roles and keeps it, undo gives them back; the last one of its kind is refused", async () => {
    expect(await penstock("drain", "w0", "--url", up.url)).toMatchObject({ code: 0, stdout: expect.stringContaining("w0 is drained") })
    expect((await penstock("status", "--url", up.url)).stdout).toMatch(/^w0 +none +none \(drained\)/m)
    expect((await streamCompletion({ url: up.url, modelName: "tiny" }, { prompt: "Hello", max_tokens: 5, ignore_eos: true })).tokens).toHaveLength(5)
    expect(await penstock("drain", "w1", "--url", up.url)).toMatchObject({ code: 1, stderr: expect.stringContaining("w1 is the only worker that can prefill: add another to the topology first") })
    expect(await penstock("drain", "w7", "--url", up.url)).toMatchObject({ code: 1, stderr: expect.stringContaining("there is no worker w7: w0, w1 are in the topology") })
    expect(await penstock("drain", "w0", "--undo", "--url", up.url)).toMatchObject({ code: 0, stdout: "w0 has its roles again\n" })
    expect(await up.state()).toMatchObject({ state: "settled", drained: [] })
  })

  it("of two editors at once one is told", async () => {
    const etag = (await fetch(`${up.url}/topology`)).headers.get("etag")!
    const responses = [await put(both, { "if-match": etag }), await put(two.replace("w1", "w2"), { "if-match": etag })]
    expect(responses.map(({ status }) => status)).toEqual([202, 412])
    expect(await responses[1]!.json()).toMatchObject({ error: { code: "stale_revision", message: expect.stringContaining("read it again") } })
    expect(responses[1]!.headers.get("etag")).toBe(responses[0]!.headers.get("etag"))
    while ((await up.state()).state === "changing") await new Promise((resolve) => setTimeout(resolve, 20))
  })

  it("what is wrong is a 400 with file, line and what is allowed, and apply says it", async () => {
    const response = await put(both.replace("roles", "rolls"))
    expect([response.status, await response.json()]).toMatchObject([400, { error: { code: "invalid_topology", message: expect.stringMatching(/^tiny\.yaml:5: workers\[0\]\.rolls: unknown key, did you mean roles\?/) } }])
    expect(await penstock("apply", file("penstock: 2\n"), "--url", up.url)).toMatchObject({ code: 1, stderr: expect.stringMatching(/tiny\.yaml:1: penstock: expected 1/) })
    expect(readFileSync(up.path, "utf8")).toBe(both)
  })

  it("a page of another origin can neither read nor change it", async () => {
    const origin = "https://example.org"
    expect((await put(two, { origin })).status).toBe(403)
    expect((await fetch(`${up.url}/topology`, { headers: { origin } })).status).toBe(403)
    expect((await up.state()).text).toBe(both)
  })

  it("where no Penstock answers, and where the command line is wrong, it says what to do", async () => {
    expect(await penstock("status", "--url", "http://127.0.0.1:9")).toMatchObject({ code: 1, stderr: expect.stringMatching(/no Penstock answers there .*start one with npm start/) })
    expect(await penstock("status", "--dry-run")).toMatchObject({ code: 2, stderr: expect.stringContaining("--dry-run belongs to apply") })
    expect(await penstock("drain")).toMatchObject({ code: 2, stderr: expect.stringContaining("drain: expected the name of a worker") })
  })
})

it("flags win over the file also after edits, and another address is listened at without closing open streams", async () => {
  const listening = (port: number) => topologyText([`gateway: { host: 127.0.0.1, port: ${port} }`, ...workerLines({ w0: "prefill, decode" })])
  const up = await startRecomposed(listening(0), [])
  try {
    const stream = streamCompletion({ url: up.url, modelName: "tiny" }, { prompt: "A long story", max_tokens: 400, ignore_eos: true, temperature: 0 })
    const { port } = new URL(up.url)
    const free = Number(port) + 1
    up.edit(listening(free))
    const moved = `http://127.0.0.1:${free}`
    while (!(await fetch(`${moved}/ready`).then(({ ok }) => ok, () => false))) await new Promise((resolve) => setTimeout(resolve, 20))
    expect((await stream).tokens).toHaveLength(400)
    while (await fetch(`${up.url}/ready`).then(() => true, () => false)) await new Promise((resolve) => setTimeout(resolve, 20))
    expect(up.output()).toContain(`listen at 127.0.0.1:${free} (port 0 -> ${free}): done`)
  } finally {
    await up.stop()
  }
  const flagged = await startRecomposed(listening(8), ["--port", "0"])
  try {
    expect((await flagged.recompose(listening(9))).state).toBe("settled")
    expect(flagged.output()).toContain("nothing to change")
    expect((await fetch(`${flagged.url}/ready`)).status).toBe(200)
  } finally {
    await flagged.stop()
  }
})
