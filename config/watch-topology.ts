import { readFileSync, statSync, watch, type FSWatcher } from "node:fs"
import { basename, dirname } from "node:path"
import { limits } from "./limits.ts"

export interface TopologyWatchOptions {
  /** Absolute. */
  readonly path: string
  /** What was read last: only another text is told of. */
  readonly text: string
  /** The file's text has become this, or it cannot be read: then why. */
  readonly onText: (text: string) => void
  readonly onUnreadable: (why: string) => void
}

export interface TopologyWatch {
  /** Takes this for what the file says, where whoever calls has written it. */
  expect(text: string): void
  close(): void
}

/**
 * Watches a file by its folder, since most editors put another file in its place, and looks at it now and then besides, where a
 * file system tells nothing. A text is told of once it has been the same for a moment.
 */
export const watchTopology = ({ path, text, onText, onUnreadable }: TopologyWatchOptions): TopologyWatch => {
  let known: string | undefined = text
  let seen = stampOf(path)
  let settling: NodeJS.Timeout | undefined
  const look = () => {
    settling = undefined
    const before = stampOf(path)
    let found: string | undefined
    let why = ""
    try {
      found = readFileSync(path, "utf8")
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code
      why = code === "ENOENT" ? "the file is gone" : `the file cannot be read (${code})`
    }
    if (stampOf(path) !== before) return settle() // it is being written
    seen = before
    if (found === known) return
    known = found
    if (found === undefined) onUnreadable(why)
    else onText(found)
  }
  const settle = () => {
    clearTimeout(settling)
    settling = setTimeout(look, limits.topologySettleMs)
  }
  const name = basename(path)
  let watcher: FSWatcher | undefined
  try {
    watcher = watch(dirname(path), { persistent: false }, (_, changed) => (changed === null || changed === name) && settle())
    watcher.on("error", () => watcher?.close())
  } catch {
    // Where there is no watching, looking is enough.
  }
  const poll = setInterval(() => stampOf(path) !== seen && settling === undefined && settle(), limits.topologyPollMs).unref()
  return {
    expect: (written) => (known = written),
    close: () => {
      watcher?.close()
      clearInterval(poll)
      clearTimeout(settling)
    },
  }
}

/** Differs where the file may have been written. */
const stampOf = (path: string): string => {
  try {
    const { ino, size, mtimeMs } = statSync(path)
    return `${ino} ${size} ${mtimeMs}`
  } catch {
    return "none"
  }
}
