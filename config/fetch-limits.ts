/** Bounds of fetching a model. Apart from limits.ts because `pull` and the tests shorten them. */
export const fetchLimits = {
  /** Longest wait for the first byte of an answer; a host that cannot be reached should cost a few seconds only. */
  connectMs: 5_000,
  /** Silence in the middle of a download after which it is taken for dead. */
  idleMs: 20_000,
  /** Attempts at one source; each goes on where the one before stopped, and only while each brings bytes. */
  attempts: 20,
  /** Longest wait for another process that fetches the same model. */
  lockMs: 30 * 60_000,
  /** Left free on the disk beyond the model itself. */
  spareBytes: 16 * 1024 * 1024
} as const
export type FetchLimits = { readonly [K in keyof typeof fetchLimits]: number }
