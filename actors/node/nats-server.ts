/**
 * A nats-server of this process's own, on loopback: for topologies on one machine that ask for `nats: { spawn: true }`.
 * It is restarted on the same port when it dies, and never outlives this process.
 */
import { spawn, type ChildProcess } from "node:child_process"
import { randomBytes } from "node:crypto"
import { closeSync, mkdtempSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import type { Socket } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { Effect, type Scope } from "effect"
import { readEnv } from "../../config/env.ts"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import { supervise } from "../runtime/supervisor.ts"
import { findNatsServer, type FindNatsServerOptions } from "./find-nats-server.ts"

/** No nats-server could be had, or it does not run. The message says what to do. */
export class NatsServerError extends Error {
  readonly _tag = "NatsServerError"
  override readonly name = "NatsServerError"
}

export interface RunningNatsServer extends NatsAddress {
  readonly url: string
  /** A file, readable by this user only, that holds what clients must say. It goes with the server. */
  readonly token: string
  /** Of the server that runs now, or ran last. */
  readonly pid: number
}

/**
 * Watches over the server from outside: a shell that waits for a line on a pipe whose other end only this process has. A
 * line comes when the server has ended; the end of the pipe comes first only when this process was killed, and then the
 * server goes too, with its folder. `$$` is the server's own process id, since exec keeps it. Needs nothing but a POSIX shell.
 *
 * GOGC: each chunk of KV is garbage of the server's once it has passed, and its heap is small. At Go's own 100 % it spends more on
 * collecting chunks than on moving them: 0.9 ms of a core for each MB of KV, against 0.4.
 */
const untilParentDies = `folder=$1; shift
(read -r line <&3 || { kill -KILL $$; rm -rf "$folder"; }) >/dev/null 2>&1 &
GOGC=\${GOGC:-400} && export GOGC && exec "$@" 3<&-`

/**
 * Runs a nats-server on a free port of loopback until the Scope closes. Who wants to connect needs the token, which no
 * command line and no log shows. It has a session of its own, so that Ctrl-C in a terminal leaves it to the Scope.
 * @param options what is left out is the environment's
 */
export const superviseNatsServer = (options: Partial<FindNatsServerOptions> = {}): Effect.Effect<RunningNatsServer, NatsServerError, Scope.Scope> =>
  Effect.gen(function* () {
    if (process.platform === "win32") return yield* Effect.fail(new NatsServerError("bus: { nats: { spawn: true } } needs a POSIX system: start a nats-server and give its bus.nats.url in the topology"))
    const binary = yield* Effect.tryPromise({
      try: (signal) => findNatsServer({ ...readEnv(), ...options, signal }),
      catch: (error) => new NatsServerError(error instanceof Error ? error.message : String(error)),
    })
    const folder = yield* Effect.acquireRelease(
      Effect.sync(() => mkdtempSync(join(tmpdir(), "penstock-nats-"))),
      (made) => Effect.sync(() => rmSync(made, { recursive: true, force: true })),
    )
    const token = join(folder, "token")
    writeFileSync(token, randomBytes(24).toString("hex"), { mode: 0o600 })
    let port = -1 // any free one, the first time
    let pid = 0
    yield* supervise("nats-server", (ready) =>
      Effect.gen(function* () {
        const config = writeConfig(folder, port)
        const server = yield* Effect.acquireRelease(
          Effect.sync(() => startServer(binary, config, folder)),
          (started) => Effect.promise(() => stopServer(started)),
        )
        const ended = untilEnded(server, folder)
        port = yield* Effect.raceFirst(listening(server, folder), ended)
        pid = server.pid!
        yield* ready
        return yield* ended
      }),
    )
    return {
      url: `nats://127.0.0.1:${port}`,
      token,
      get pid() {
        return pid
      },
    }
  })

const writeConfig = (folder: string, port: number): string => {
  const path = join(folder, "nats-server.conf")
  const text = (value: string) => JSON.stringify(value)
  const lines = [
    `listen: ${text(`127.0.0.1:${port}`)}`,
    `ports_file_dir: ${text(folder)}`,
    `authorization: { token: ${text(readFileSync(join(folder, "token"), "utf8"))} }`,
    `max_payload: ${limits.maxPayloadBytes}`,
    `max_pending: ${limits.natsServerPendingBytes}`,
    `log_file: ${text(join(folder, "log"))}`,
    `logfile_size_limit: ${1024 * 1024}`,
    `logfile_max_num: 2`,
  ]
  writeFileSync(path, `${lines.join("\n")}\n`, { mode: 0o600 })
  return path
}

const startServer = (binary: string, config: string, folder: string): ChildProcess => {
  // What it says before it has read its configuration, and so before it has a log.
  const output = openSync(join(folder, "output"), "w", 0o600)
  try {
    const child = spawn("/bin/sh", ["-c", untilParentDies, "sh", folder, binary, "-c", config], { stdio: ["ignore", output, output, "pipe"], detached: true })
    // Not stdin, which Node closes by itself before it says that a child has ended.
    const watched = child.stdio[3] as Socket
    watched.on("error", () => {}) // the watcher may have gone already
    child.once("exit", () => watched.end("\n", () => watched.destroy()))
    return child
  } finally {
    closeSync(output)
  }
}

const lastLine = (path: string): string => {
  try {
    return readFileSync(path, "utf8").trim().split("\n").at(-1) ?? ""
  } catch {
    return ""
  }
}

/** Fails once the server is gone, with its last words. */
const untilEnded = (server: ChildProcess, folder: string): Effect.Effect<never, NatsServerError> =>
  Effect.callback((resume) => {
    const end = (why: string) => resume(Effect.fail(new NatsServerError(`nats-server ${why}`)))
    const lastWords = () => lastLine(join(folder, "output")) || lastLine(join(folder, "log")) || "it said nothing"
    const onExit = (code: number | null, signal: NodeJS.Signals | null) => end(signal === null ? `ended with ${code}: ${lastWords()}` : `was ended by ${signal}`)
    const onError = (error: Error) => end(`cannot be started: ${error.message}`)
    if (server.exitCode !== null || server.signalCode !== null) return onExit(server.exitCode, server.signalCode)
    server.once("exit", onExit)
    server.once("error", onError)
    return Effect.sync(() => {
      server.removeListener("exit", onExit)
      server.removeListener("error", onError)
    })
  })

const pollMs = 10

/** Waits for the file that a nats-server writes when it listens, and reads its port there. */
const listening = (server: ChildProcess, folder: string): Effect.Effect<number, NatsServerError> => {
  const port = (): number | undefined => {
    const name = readdirSync(folder).find((found) => found.endsWith(`_${server.pid}.ports`))
    try {
      const { nats } = JSON.parse(readFileSync(join(folder, name!), "utf8")) as { readonly nats: ReadonlyArray<string> }
      return Number(new URL(nats[0]!).port)
    } catch {
      return undefined // not there, or not whole yet
    }
  }
  const poll: Effect.Effect<number> = Effect.suspend(() => {
    const found = port()
    return found === undefined ? Effect.andThen(Effect.sleep(pollMs), poll) : Effect.succeed(found)
  })
  const late = new NatsServerError(`nats-server does not listen within ${limits.natsServerStartDeadlineMs / 1000} s`)
  return Effect.timeoutOrElse(poll, { duration: limits.natsServerStartDeadlineMs, orElse: () => Effect.fail(late) })
}

/** Asks it to end, then makes it. */
const stopServer = (server: ChildProcess): Promise<void> =>
  new Promise((resolve) => {
    if (server.pid === undefined || server.exitCode !== null || server.signalCode !== null) return resolve()
    const kill = setTimeout(() => server.kill("SIGKILL"), limits.natsServerStopDeadlineMs)
    server.once("exit", () => {
      clearTimeout(kill)
      resolve()
    })
    server.kill("SIGTERM")
  })
