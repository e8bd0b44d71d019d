import { createHash } from "node:crypto"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { get } from "node:http"
import { createConnection } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { afterAll, afterEach, describe, expect, it, vi } from "vitest"
import { startGateway, type StartedGateway } from "../support/start-gateway.ts"

const folder = mkdtempSync(join(tmpdir(), "gateway-"))
afterAll(() => rmSync(folder, { recursive: true }))

const started: Array<StartedGateway> = []
const start = async (...options: Parameters<typeof startGateway>) => {
  const server = await startGateway(...options)
  started.push(server)
  return server
}
afterEach(async () => {
  for (const server of started.splice(0)) await server.close()
})

const chat = { model: "tiny", messages: [{ role: "user", content: "x" }] }
const hash = (key: string) => createHash("sha256").update(key).digest("hex")
const keysFile = (text: string): string => {
  const file = join(folder, "keys.txt")
  writeFileSync(file, text)
  return file
}

describe("where the gateway listens", () => {
  it("a port in use is one clear sentence with host, port and remedy", async () => {
    const { port } = await start()
    await expect(start({ port })).rejects.toMatchObject({ _tag: "GatewayError", message: `cannot listen on 127.0.0.1:${port}: the port is in use; choose another (0 takes a free one), or stop what uses it` })
  })

  it("another host than this machine's is refused without keys, and taken with them", async () => {
    for (const host of ["0.0.0.0", "::", "192.168.1.5", "example.org"]) {
      await expect(start({ host })).rejects.toMatchObject({ _tag: "GatewayError", message: expect.stringMatching(new RegExp(`without API keys.*${host}.*key file`)) })
    }
    const server = await start({ host: "0.0.0.0", keysFile: keysFile(`a:${hash("k")}`) })
    expect((await fetch(`http://127.0.0.1:${server.port}/health`)).status).toBe(200)
  })

  it("an address that this machine does not have is a clear error", async () => {
    await expect(start({ host: "203.0.113.7", keysFile: keysFile(`a:${hash("k")}`) })).rejects.toMatchObject({ message: expect.stringContaining("this machine has no such address") })
  })
})

describe("keys", () => {
  const text = `# who may\n\nalice:${hash("alice-key")} # a comment\nbob:sha256-${hash("bob-key").toUpperCase()}\r\n`

  it("a request without a key or with another is a 401, on every route but health and readiness", async () => {
    const server = await start({ keysFile: keysFile(text) })
    for (const authorization of [undefined, "Bearer wrong", "Basic YWxpY2U6a2V5", "Bearer "]) {
      const response = await server.post("/v1/chat/completions", chat, authorization === undefined ? {} : { authorization })
      expect(response.status).toBe(401)
      expect(await response.json()).toMatchObject({ error: { type: "invalid_request_error", code: "invalid_api_key", param: null } })
    }
    for (const path of ["/v1/models", "/v1/models/tiny"]) expect((await fetch(server.url + path)).status).toBe(401)
    for (const path of ["/health", "/ready"]) expect((await fetch(server.url + path)).status).toBe(200)
    expect(server.actor.generations).toHaveLength(0)
  })

  it("a key gives its tenant to the request actor", async () => {
    const server = await start({ keysFile: keysFile(text) }, "alice-key")
    await server.client.chat.completions.create({ model: "tiny", messages: [{ role: "user", content: "x" }] })
    expect(server.actor.last.message.tenant).toBe("alice")
    await server.post("/v1/chat/completions", chat, { authorization: "bearer bob-key" })
    expect(server.actor.last.message.tenant).toBe("bob")
  })

  it("mistakes in the file name file and line, and never the line's text", async () => {
    const file = keysFile(`alice:${hash("x")}\nbob:secret-in-clear\n`)
    const error = await start({ keysFile: file }).catch((error: Error) => error.message)
    expect(error).toContain(`${file}:2: expected "tenant:hash"`)
    expect(error).not.toContain("secret-in-clear")
    await expect(start({ keysFile: keysFile(`alice:${hash("x")}\nbob:${hash("x")}\n`) })).rejects.toMatchObject({ message: expect.stringMatching(/keys\.txt:2: this key is alice's already/) })
    await expect(start({ keysFile: keysFile("# none\n") })).rejects.toMatchObject({ message: expect.stringContaining("has no key") })
    await expect(start({ keysFile: join(folder, "absent") })).rejects.toMatchObject({ message: expect.stringMatching(/absent: the key file cannot be read \(ENOENT\)/) })
  })
})

describe("routes", () => {
  it("health is alive while readiness says why it is not", async () => {
    let state: { ready: boolean; reason?: string } = { ready: false, reason: "the model is loading" }
    const server = await start({ ready: () => state })
    expect((await fetch(`${server.url}/health`)).status).toBe(200)
    const response = await fetch(`${server.url}/ready`)
    expect(response.status).toBe(503)
    expect(await response.json()).toEqual(state)
    state = { ready: true }
    expect((await fetch(`${server.url}/ready/`)).status).toBe(200)
  })

  it("unknown paths and wrong methods are OpenAI error objects", async () => {
    const server = await start()
    const missing = await fetch(`${server.url}/v1/nothing?x=1`)
    expect(missing.status).toBe(404)
    expect(await missing.json()).toEqual({ error: { message: "there is nothing at /v1/nothing", type: "invalid_request_error", param: null, code: "not_found" } })
    const wrong = await fetch(`${server.url}/v1/chat/completions`)
    expect(wrong.status).toBe(405)
    expect(wrong.headers.get("allow")).toBe("POST, OPTIONS")
    expect(await wrong.json()).toMatchObject({ error: { code: "method_not_allowed" } })
  })

  it("HEAD answers as GET without a body, OPTIONS names the methods, and nothing is allowed to pages of other origins", async () => {
    const server = await start()
    const head = await fetch(`${server.url}/v1/models`, { method: "HEAD" })
    expect([head.status, await head.text()]).toEqual([200, ""])
    const options = await fetch(`${server.url}/v1/models`, { method: "OPTIONS", headers: { origin: "http://evil.example" } })
    expect([options.status, options.headers.get("allow")]).toEqual([204, "GET, HEAD, OPTIONS"])
    expect([...options.headers.keys()].filter((name) => name.startsWith("access-control"))).toEqual([])
  })

  it("every response has a request id: the client's where it is sane", async () => {
    const server = await start()
    const idOf = async (id: string | undefined, path = "/v1/models") => (await fetch(server.url + path, { headers: id === undefined ? {} : { "x-request-id": id } })).headers.get("x-request-id")
    expect(await idOf("mine-1.2:3")).toBe("mine-1.2:3")
    expect(await idOf("not sane!")).toMatch(/^req_[0-9a-f]{32}$/)
    expect(await idOf(undefined, "/nowhere")).toMatch(/^req_/)
    const stream = await server.post("/v1/chat/completions", { ...chat, stream: true }, { "x-request-id": "s1" })
    expect(stream.headers.get("x-request-id")).toBe("s1")
    await stream.text()
    expect(server.actor.last.message.requestId).not.toBe("s1") // two requests may carry the same
  })

  it("a traceparent of the client's goes on to the request actor", async () => {
    const server = await start()
    await server.post("/v1/chat/completions", chat, { traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01" })
    expect(server.actor.last.headers["traceparent"]).toMatch(/^00-0af7651916cd43dd8448eb211c80319c-(?!b7ad6b7169203331)[0-9a-f]{16}-01$/)
  })

  it("without keys a web page of another origin is refused, pages of this machine and other programs are not", async () => {
    const server = await start()
    const statusFrom = async (origin: string) => (await server.post("/v1/chat/completions", chat, { origin, "content-type": "text/plain" })).status
    for (const origin of ["http://evil.example", "https://127.0.0.1.evil.example", "null"]) expect(await statusFrom(origin)).toBe(403)
    for (const origin of ["http://localhost:3000", "http://127.0.0.1:8080", "http://[::1]:1", "vscode-webview://x"]) expect(await statusFrom(origin)).toBe(200)
  })

  it("without keys a page whose own name is rebound to this machine is refused, whatever it asks for", async () => {
    const server = await start()
    const statusBy = (host: string) =>
      new Promise<number | undefined>((resolve, reject) => {
        get(`${server.url}/actors`, { headers: { host } }, (response) => resolve(response.resume().statusCode)).on("error", reject)
      })
    for (const host of ["evil.example", "127.0.0.1.evil.example:8080", "localhost.evil.example", "@"]) expect(await statusBy(host)).toBe(403)
    for (const host of ["localhost", "localhost:1", "127.0.0.1:8080", "[::1]:8080"]) expect(await statusBy(host)).toBe(200)
  })

  it("pages of this machine, and with keys pages of any origin, may read answers and streams", async () => {
    const allowed = (response: Response) => response.headers.get("access-control-allow-origin")
    const open = await start()
    expect(allowed(await open.post("/v1/chat/completions", chat, { origin: "http://localhost:5173" }))).toBe("http://localhost:5173")
    expect(allowed(await open.post("/v1/chat/completions", { ...chat, stream: true }, { origin: "http://localhost:5173" }))).toBe("http://localhost:5173")
    expect(allowed(await open.post("/v1/chat/completions", chat, { origin: "http://evil.example" }))).toBe(null)
    const keyed = await start({ keysFile: keysFile(`alice:${hash("k")}\n`) })
    const preflight = await fetch(`${keyed.url}/v1/chat/completions`, { method: "OPTIONS", headers: { origin: "https://app.example", "access-control-request-headers": "authorization,content-type" } })
    expect([allowed(preflight), preflight.headers.get("access-control-allow-methods"), preflight.headers.get("access-control-allow-headers")]).toEqual(["https://app.example", "POST, OPTIONS", "authorization,content-type"])
    expect(allowed(await keyed.post("/v1/chat/completions", chat, { origin: "https://app.example", authorization: "Bearer k" }))).toBe("https://app.example")
  })

  it("a client that offers HTTP/2 on a plain request is answered in HTTP/1.1, body and all", async () => {
    const server = await start()
    const body = JSON.stringify(chat)
    const socket = createConnection({ port: server.port, host: "127.0.0.1" })
    const request = `POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAAAAIAAAAA\r\ncontent-length: ${body.length}\r\n\r\n`
    socket.write(request + body.slice(0, 20))
    setTimeout(() => socket.write(body.slice(20)), 20)
    let text = ""
    for await (const chunk of socket) if ((text += String(chunk)).includes("Hello world")) break
    expect(text).toMatch(/^HTTP\/1.1 200 OK\r\n/)
  })

  it("a defect is a 500 that tells nothing, and one line in the log without the client's text", async () => {
    const log = vi.spyOn(console, "error").mockImplementation(() => {})
    const server = await start({ ready: () => { throw new Error("secret") } })
    const response = await fetch(`${server.url}/ready`, { headers: { "x-request-id": "r1" } })
    expect(response.status).toBe(500)
    expect(await response.text()).not.toContain("secret")
    expect(log).toHaveBeenCalledTimes(1)
    const line = String(log.mock.calls[0]![0])
    expect(JSON.parse(line)).toMatchObject({ level: "error", requestId: "r1", error: "Error" })
    expect(line).not.toContain("secret")
    log.mockRestore()
  })

  it("a closed bus is a 503 and not a crash", async () => {
    const server = await start()
    await server.bus.close()
    expect((await server.post("/v1/chat/completions", chat)).status).toBe(503)
    expect((await server.post("/tokenize", { content: "x" })).status).toBe(503)
  })
})
