/** NATS servers for tests: the one that Penstock itself supervises, and ones with a configuration of the test's. */
import { spawn } from "node:child_process"
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { setTimeout as sleep } from "node:timers/promises"
import { Effect, Exit, Scope } from "effect"
import { findNatsServer } from "../../actors/node/find-nats-server.ts"
import { superviseNatsServer, type RunningNatsServer } from "../../actors/node/nats-server.ts"
import { readEnv } from "../../config/env.ts"

/** The first test on a machine may have to build a nats-server. */
export const natsStartTimeoutMs = 400_000

export interface StartedNats {
  readonly server: RunningNatsServer
  stop(): Promise<void>
}

export const startNats = async (): Promise<StartedNats> => {
  const scope = Effect.runSync(Scope.make())
  const stop = () => Effect.runPromise(Scope.close(scope, Exit.void))
  try {
    return { server: await Effect.runPromise(Scope.provide(superviseNatsServer(), scope)), stop }
  } catch (error) {
    await stop()
    throw error
  }
}

export interface ConfiguredNats {
  readonly url: string
  /** What it has logged. */
  log(): string
  stop(): Promise<void>
}

/** A nats-server on a free port of loopback with more lines of configuration. */
export const startConfiguredNats = async (lines: ReadonlyArray<string>): Promise<ConfiguredNats> => {
  const folder = mkdtempSync(join(tmpdir(), "penstock-test-nats-"))
  const config = join(folder, "conf")
  writeFileSync(config, ['listen: "127.0.0.1:-1"', `ports_file_dir: ${JSON.stringify(folder)}`, ...lines, ""].join("\n"))
  const child = spawn(await findNatsServer(readEnv()), ["-c", config], { stdio: ["ignore", "ignore", "pipe"] })
  let said = ""
  child.stderr.on("data", (chunk: Buffer) => (said += chunk.toString()))
  const ended = new Promise<void>((resolve) => child.once("exit", () => resolve()))
  const stop = async () => {
    child.kill("SIGKILL")
    await ended
    rmSync(folder, { recursive: true, force: true })
  }
  for (;;) {
    if (child.exitCode !== null) throw new Error(said)
    const file = readdirSync(folder).find((name) => name.endsWith(".ports"))
    const text = file === undefined ? "" : readFileSync(join(folder, file), "utf8")
    const url = /nats:\/\/[^"]+|tls:\/\/[^"]+/.exec(text)?.[0]
    if (url !== undefined) return { url, log: () => said, stop }
    await sleep(10)
  }
}
