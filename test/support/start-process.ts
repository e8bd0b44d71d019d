/** Penstock as a process of its own, as `npm start` runs it, on a free port; ended by its process group. */
import { spawn, type ChildProcess } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { writeTinyModel } from "./tiny-model.ts"

export interface StartedProcess {
  readonly url: string
  readonly folder: string
  readonly modelName: string
  readonly output: () => string
  /** Sends a signal to the whole group, as a terminal does, and waits for the exit code. */
  signal(name: "SIGINT" | "SIGTERM"): Promise<number | null>
}

/** Runs `config/bootstrap.mjs start` with these arguments; resolves with exit code and output once it has ended. */
export const runStart = (args: ReadonlyArray<string>): { readonly child: ChildProcess; readonly output: () => string; readonly ended: Promise<number | null> } => {
  const child = spawn(process.execPath, ["config/bootstrap.mjs", "start", ...args], { stdio: ["ignore", "pipe", "pipe"], detached: true })
  let output = ""
  child.stdout.on("data", (chunk: Buffer) => (output += chunk.toString()))
  child.stderr.on("data", (chunk: Buffer) => (output += chunk.toString()))
  const ended = new Promise<number | null>((resolve) => child.on("close", (code) => resolve(code)))
  return { child, output: () => output, ended }
}

/** A folder with a topology file, `extra` lines added, that serves a tiny model, or where it is `real` the one that is served where none is named. */
export const writeTopology = async (extra: ReadonlyArray<string> = [], real = false): Promise<{ readonly folder: string; readonly path: string }> => {
  const folder = mkdtempSync(join(tmpdir(), "penstock-up-"))
  if (!real) await writeTinyModel(join(folder, "tiny.gguf"))
  const path = join(folder, "tiny.yaml")
  writeFileSync(path, ["penstock: 1", ...(real ? [] : [`model: file:${join(folder, "tiny.gguf")}`]), ...extra, "kvStore: { disk: { path: kv } }", ""].join("\n"))
  return { folder, path }
}

/** Starts a topology of a tiny model, or of the real one, and waits until it is ready. Rejects with what it printed where it ends before. */
export const startProcess = async ({ real = false } = {}): Promise<StartedProcess> => {
  const { folder, path } = await writeTopology([], real)
  const { child, output, ended } = runStart(["--topology", path, "--port", "0"])
  const gone = ended.then((code) => {
    throw new Error(`it ended with ${code}: ${output()}`)
  })
  gone.catch(() => {})
  const ready = new Promise<string>((resolve) => {
    child.stdout!.on("data", () => {
      const address = /http:\/\/127\.0\.0\.1:\d+/.exec(output())
      if (address !== null && output().includes("ready")) resolve(address[0])
    })
  })
  const url = await Promise.race([ready, gone])
  const signal = async (name: "SIGINT" | "SIGTERM") => {
    if (child.exitCode === null) process.kill(-child.pid!, name)
    const code = await ended
    rmSync(folder, { recursive: true, force: true })
    return code
  }
  return { url, folder, modelName: real ? "smollm2-135m" : "tiny", output, signal }
}
