/** The command line itself is wrong: usage on stderr and exit code 2. */
export class UsageError extends Error {}

export const parsePort = (text: string | undefined): number | undefined => {
  if (text === undefined) return undefined
  const port = /^\d{1,5}$/.test(text) ? Number(text) : Number.NaN
  if (!(port <= 65535)) throw new UsageError(`--port: expected a whole number in 0 … 65535, found "${text}"`)
  return port
}
