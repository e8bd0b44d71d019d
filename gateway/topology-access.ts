/**
 * The wanted topology as whoever operates it reads and changes it. Messages are for people, with place and remedy.
 */
import type { Change } from "../actors/node/change.ts"
import type { Topology } from "../config/topology.ts"

export interface TopologyState {
  /** Names the text: whoever rewrites it says which one they have read. */
  readonly revision: string
  /** Of the watched file; undefined: there is none. */
  readonly path: string | undefined
  readonly text: string
  readonly topology: Topology
  /** `changing`: steps are under way, or a model is fetched for them. */
  readonly state: "settled" | "changing" | "failed"
  /** What is left to do. */
  readonly plan: ReadonlyArray<string>
  /** The last ones, newest first. */
  readonly changes: ReadonlyArray<Change>
  readonly drained: ReadonlyArray<string>
  /** Why the file as it is now was refused, where it was. */
  readonly refused: string | undefined
}

export interface TopologyAccess {
  readonly state: () => TopologyState
  /**
   * Checks a text, and rewrites the watched file with it.
   * @param dryRun only says what would be done
   * @param ifRevision the text that it replaces; undefined: whatever is there
   * @throws ConfigError where it is refused, StaleRevision where another text has come in between
   */
  readonly put: (text: string, options: { readonly dryRun: boolean; readonly ifRevision: string | undefined }) => Promise<{ readonly revision: string; readonly plan: ReadonlyArray<string> }>
  /** @throws WorkerError */
  readonly drain: (name: string, undo: boolean) => void | Promise<void>
}

/** Somebody else was first. */
export class StaleRevision extends Error {
  readonly _tag = "StaleRevision"
  readonly current: string

  constructor(current: string) {
    super(`the topology has changed since it was read: its revision is ${current} now; read it again, and apply your change to that`)
    this.current = current
  }
}
