/** Releases the lock. */
export type Release = () => void

export interface LockOptions {
  /** Longest wait for another holder, in milliseconds. */
  readonly deadlineMs: number
  /** Called once, when somebody else holds it. */
  readonly onWait?: (holder: string) => void
}

/**
 * Takes the lock file at `path`, waiting while a live process holds it. A lock is stale when its process is gone (same
 * machine) or has not touched it for a while (any machine). Rejects at the deadline with an error that names the file.
 */
export function takeLock(path: string, options: LockOptions): Promise<Release>
