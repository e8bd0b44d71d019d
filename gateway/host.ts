/** What counts as this machine, and what a web page elsewhere must not reach. */
import { isIP } from "node:net"
import { ApiError } from "./errors.ts"

export const isLoopback = (host: string): boolean => {
  const name = host.replace(/^\[|\]$/g, "").toLowerCase()
  if (name === "localhost" || name.endsWith(".localhost")) return true
  return isIP(name) === 4 ? name.startsWith("127.") : name === "::1" || name.startsWith("::ffff:127.")
}

const isOfThisMachine = (origin: string): boolean => {
  const url = URL.canParse(origin) ? new URL(origin) : undefined
  return url !== undefined && (!/^https?:$/.test(url.protocol) || isLoopback(url.hostname))
}

/**
 * What lets a page of another origin read the answers: any page where keys are asked for, which no browser sends by
 * itself; without keys only pages of this machine.
 */
export const corsHeaders = (origin: string | undefined, keysRequired: boolean): Readonly<Record<string, string>> =>
  origin === undefined || !(keysRequired || isOfThisMachine(origin)) ? {} : { "access-control-allow-origin": origin, "access-control-expose-headers": "x-request-id, retry-after", vary: "origin" }

/** What a browser asks before it sends such a page's request. */
export const preflightHeaders = (headers: Readonly<Record<string, string | undefined>>, methods: string, keysRequired: boolean): Readonly<Record<string, string>> =>
  Object.keys(corsHeaders(headers["origin"], keysRequired)).length === 0
    ? {}
    : { "access-control-allow-methods": methods, "access-control-allow-headers": headers["access-control-request-headers"] ?? "authorization, content-type", "access-control-max-age": "600" }

/**
 * Without keys, whoever reaches the port is trusted, and a browser lets any web page reach it: by a plain cross-site
 * POST or a WebSocket (which no same-origin rule covers), which carry the page's http(s) origin, or by a name of its own that
 * is rebound to 127.0.0.1, which is then the Host. Throws an ApiError 403 for one that is not of this machine.
 */
export const refuseForeignPage = ({ origin, host }: Readonly<Record<string, string | undefined>>): void => {
  const url = `http://${host ?? "localhost"}`
  if (!URL.canParse(url) || !isLoopback(new URL(url).hostname)) {
    throw new ApiError({ status: 403, type: "invalid_request_error", code: "foreign_host", message: "without API keys this server answers by a name of this machine only, such as localhost; start it with keys (gateway.keys in the topology) to reach it by another" })
  }
  if (origin === undefined || isOfThisMachine(origin)) return
  throw new ApiError({ status: 403, type: "invalid_request_error", code: "foreign_origin", message: "a web page of another origin may not use this server; start it with API keys (gateway.keys in the topology) to allow that" })
}
