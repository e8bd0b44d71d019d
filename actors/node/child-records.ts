/**
 * What a node agent writes down of each process that it runs, so that another agent of the same name finds them again after
 * it was killed: in PENSTOCK_HOME/run/<cluster>/<node>, which only this user can read.
 */
import { randomBytes } from "node:crypto"
import { chmodSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs"
import { spawnSync } from "node:child_process"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { setTimeout as sleep } from "node:timers/promises"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import type { PlannedComponent } from "./system.ts"
import type { Wanted } from "./wanted.ts"

export interface ChildRecord {
  readonly pid: number
  /** With the process id it names a process for ever. */
  readonly startedAt: string
  /** The socket on which it waits for a supervisor. */
  readonly control: string
  /** As it was told to be last. */
  readonly planned: PlannedComponent
  readonly wanted: Wanted
  readonly nats: NatsAddress
}

/** Longest path of a socket that every system takes, less the name that is added here. */
const longestFolder = 100 - 24

export class ChildRecords {
  readonly #folder: string
  readonly #sockets: string

  /** Makes the folder. */
  constructor(folder: string) {
    this.#folder = folder
    mkdirSync(folder, { recursive: true, mode: 0o700 })
    chmodSync(folder, 0o700)
    this.#sockets = Buffer.byteLength(folder) <= longestFolder ? folder : mkdtempSync(join(tmpdir(), "penstock-run-"))
  }

  /** A path for the socket of a process that is about to start. */
  newControl(): string {
    return join(this.#sockets, `${randomBytes(8).toString("hex")}.sock`)
  }

  /** Of processes that still run; what is left of others is cleared away. */
  all(): ReadonlyArray<ChildRecord> {
    return readdirSync(this.#folder).flatMap((name) => {
      if (!name.endsWith(".json")) return []
      let record: ChildRecord | undefined
      try {
        record = JSON.parse(readFileSync(join(this.#folder, name), "utf8")) as ChildRecord
        if (runs(record)) return [record]
      } catch {
        // Cut off, or of another version: its process ends by itself.
      }
      rmSync(join(this.#folder, name), { force: true })
      if (typeof record?.control === "string") rmSync(record.control, { force: true })
      return []
    })
  }

  keep(record: ChildRecord): void {
    const path = this.#path(record.pid)
    writeFileSync(`${path}.new`, JSON.stringify(record), { mode: 0o600 })
    renameSync(`${path}.new`, path)
  }

  forget(pid: number): void {
    rmSync(this.#path(pid), { force: true })
  }

  /** At the end of the agent, when nothing runs any more. */
  close(): void {
    if (this.#sockets !== this.#folder) rmSync(this.#sockets, { recursive: true, force: true })
  }

  #path(pid: number): string {
    return join(this.#folder, `${pid}.json`)
  }
}

/** Whether the process that a record names is there, and not another one that got its id. */
export const runs = ({ pid, startedAt }: Pick<ChildRecord, "pid" | "startedAt">): boolean => startTimeOf(pid) === startedAt

/** When a process began, as the system says it; undefined: there is none. */
export const startTimeOf = (pid: number): string | undefined => {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "utf8")
    // After the name, which may hold anything: the state, and 19 fields later the time since boot.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ")
    return fields[0] === "Z" ? undefined : fields[19]
  } catch {
    if (process.platform === "linux") return undefined
    const said = spawnSync("ps", ["-o", "lstart=", "-p", String(pid)], { encoding: "utf8", timeout: 2_000 }).stdout?.trim()
    return said === "" ? undefined : said
  }
}

/** Ends what a record names: by SIGTERM, and by SIGKILL where that is not heeded. Resolves when it is gone. */
export const endProcess = async (record: Pick<ChildRecord, "pid" | "startedAt">): Promise<void> => {
  const signal = (name: NodeJS.Signals): void => {
    try {
      if (runs(record)) process.kill(record.pid, name)
    } catch {
      // It has gone in this moment, or is somebody else's.
    }
  }
  const gone = async (withinMs: number): Promise<boolean> => {
    for (const endMs = performance.now() + withinMs; performance.now() < endMs; await sleep(20)) if (!runs(record)) return true
    return false
  }
  signal("SIGTERM")
  if (await gone(limits.shutdownDeadlineMs / 2)) return
  signal("SIGKILL")
  await gone(limits.shutdownDeadlineMs / 2)
}
