import { createHash, type Hash } from "node:crypto"
import { createReadStream } from "node:fs"
import { open, rm, stat } from "node:fs/promises"
import { dirname } from "node:path"
import type { FetchLimits } from "../../config/fetch-limits.ts"
import { diskFull, FetchError } from "./fetch-error.ts"
import { Progress, type ProgressSink } from "./progress.ts"

export interface Download {
  readonly url: string
  /** Where the bytes gather; an earlier attempt's bytes in it are gone on from. */
  readonly part: string
  readonly label: string
  readonly bytes: number | undefined
  readonly sha256: string
  readonly limits: FetchLimits
  readonly sink: ProgressSink
}

const sizeOf = async (path: string): Promise<number> => {
  try {
    return (await stat(path)).size
  } catch {
    return 0
  }
}

const reason = (error: unknown): string => {
  if (!(error instanceof Error)) return String(error)
  const cause = error.cause
  const code = cause instanceof Error && "code" in cause ? ` (${String(cause.code)})` : ""
  // fetch's own words for every failure to connect are "fetch failed".
  return `${error.message === "fetch failed" ? "it cannot be reached" : error.message}${code}`
}

/** Aborts when nothing has been heard for a while; every sign of life restarts it. */
class Watchdog {
  readonly controller = new AbortController()
  #timer: NodeJS.Timeout | undefined

  expect(withinMs: number, what: string): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.controller.abort(new Error(`${what} within ${Math.ceil(withinMs / 1000)} s`)), withinMs)
  }

  stop(): void {
    clearTimeout(this.#timer)
  }
}

const hashExisting = async (path: string, hash: Hash): Promise<void> => {
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk as Buffer)
}

/** One attempt. Returns the digest of the whole file; the connection's failures are thrown as they are. */
const attempt = async ({ url, part, label, bytes, limits, sink }: Download): Promise<string> => {
  const watchdog = new Watchdog()
  const { signal } = watchdog.controller
  let have = await sizeOf(part)
  if (bytes !== undefined && have > bytes) have = 0
  const hash = createHash("sha256")
  if (have > 0) await hashExisting(part, hash)
  if (bytes !== undefined && have === bytes) return hash.digest("hex")
  try {
    watchdog.expect(limits.connectMs, "no answer")
    const response = await fetch(url, { signal, headers: have > 0 ? { range: `bytes=${have}-` } : {} })
    watchdog.expect(limits.idleMs, "no more bytes came")
    const resumed = response.status === 206 && (response.headers.get("content-range") ?? "").startsWith(`bytes ${have}-`)
    if (!resumed && response.status !== 200) {
      await response.body?.cancel()
      // 416: what is here does not fit what is there.
      if (response.status === 416 && have > 0) {
        await rm(part, { force: true })
        throw new Error("it has fewer bytes than an earlier attempt left here")
      }
      throw new FetchError(`it answered ${response.status} ${response.statusText}`)
    }
    const start = resumed ? have : 0
    const length = Number(response.headers.get("content-length") ?? Number.NaN)
    const encoded = response.headers.has("content-encoding")
    const total = Number.isFinite(length) && !encoded ? start + length : bytes
    if (bytes !== undefined && total !== undefined && total !== bytes) {
      await response.body?.cancel()
      throw new FetchError(`it has ${total} bytes where ${bytes} are expected`)
    }
    const digest = resumed ? hash : createHash("sha256")
    const progress = new Progress(sink, label, total)
    const file = await open(part, resumed ? "a" : "w")
    let done = start
    try {
      for await (const chunk of response.body ?? []) {
        watchdog.expect(limits.idleMs, "no more bytes came")
        const data = chunk as Uint8Array
        done += data.byteLength
        if (bytes !== undefined && done > bytes) throw new FetchError(`it has more than the expected ${bytes} bytes`)
        await file.writeFile(data)
        digest.update(data)
        progress.update(done)
      }
      if (total !== undefined && done < total) throw new Error(`it ended after ${done} of ${total} bytes`)
      await file.sync()
    } finally {
      progress.end()
      await file.close()
    }
    return digest.digest("hex")
  } catch (error) {
    // fetch says only "aborted"; the watchdog knows why.
    throw signal.aborted ? signal.reason : error
  } finally {
    watchdog.stop()
  }
}

/**
 * Downloads `url` into `part` and verifies it. A connection that breaks is tried again from where it stopped, as long as
 * each attempt brings bytes. What is left when it fails can be gone on from; after a wrong digest or a full disk nothing is.
 * @throws FetchError that says what happened, without the source's name
 */
export const download = async (options: Download): Promise<void> => {
  const { part, limits, sha256 } = options
  let attempts = 0
  for (;;) {
    const before = await sizeOf(part)
    let digest: string
    try {
      digest = await attempt(options)
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code
      if (code === "ENOSPC" || code === "EDQUOT") {
        await rm(part, { force: true })
        throw diskFull(dirname(part), options.bytes)
      }
      if (error instanceof FetchError) throw error
      const after = await sizeOf(part)
      // An attempt that brought nothing says that it is the host and not the connection; unless what was here did not fit.
      const gained = after > before || (after === 0 && before > 0)
      attempts++
      if (!gained || attempts >= limits.attempts) throw new FetchError(reason(error))
      continue
    }
    if (digest === sha256) return
    await rm(part, { force: true })
    // Old bytes may be at fault, so the whole is fetched once more; fresh ones cannot be.
    if (before === 0) throw new FetchError(`its sha256 is ${digest}, expected ${sha256}; what came was deleted`)
  }
}
