/**
 * API keys: a file with a line `tenant:hash` for each key, where hash is the SHA-256 of the key in hex (`sha256-` before
 * it is allowed), and `#` begins a comment. One line that makes a key and its entry:
 *
 *     KEY=$(openssl rand -hex 24); printf 'alice:%s\n' "$(printf %s "$KEY" | sha256sum | cut -d' ' -f1)" >> keys.txt; echo "$KEY"
 */
import { createHash, timingSafeEqual } from "node:crypto"
import { readFileSync } from "node:fs"
import { ApiError } from "./errors.ts"
import { GatewayError } from "./gateway-error.ts"

interface Key {
  readonly tenant: string
  readonly hash: Buffer
}

/** Who a request is for: a tenant, by its key. */
export interface Keys {
  /** Whether a key is asked for at all. */
  readonly required: boolean
  /** The tenant of an Authorization header. Throws an ApiError 401. */
  tenantOf(authorization: string | undefined): string
}

export const noKeys: Keys = { required: false, tenantOf: () => "default" }

/** Reads a key file. Throws a GatewayError that names the file and the line, and never what stands on it. */
export const readKeys = (file: string): Keys => {
  let text: string
  try {
    text = readFileSync(file, "utf8")
  } catch (error) {
    throw new GatewayError({ message: `${file}: the key file cannot be read (${(error as NodeJS.ErrnoException).code ?? "unknown error"})` })
  }
  const keys: Array<Key> = []
  for (const [index, line] of text.split(/\r?\n/).entries()) {
    const entry = line.replace(/#.*$/, "").trim()
    if (entry === "") continue
    const match = /^([A-Za-z0-9._-]{1,64}):(?:sha256-)?([0-9a-fA-F]{64})$/.exec(entry)
    if (match === null) throw new GatewayError({ message: `${file}:${index + 1}: expected "tenant:hash", the hash being the SHA-256 of the key in 64 hex digits` })
    const twin = keys.find(({ hash }) => hash.equals(Buffer.from(match[2]!, "hex")))
    if (twin !== undefined && twin.tenant !== match[1]) throw new GatewayError({ message: `${file}:${index + 1}: this key is ${twin.tenant}'s already; give every tenant a key of its own` })
    keys.push({ tenant: match[1]!, hash: Buffer.from(match[2]!, "hex") })
  }
  if (keys.length === 0) throw new GatewayError({ message: `${file}: the key file has no key; add a line "tenant:hash", or leave the file away to serve this machine without keys` })
  return { required: true, tenantOf: (authorization) => tenantOf(keys, authorization) }
}

const tenantOf = (keys: ReadonlyArray<Key>, authorization: string | undefined): string => {
  const presented = /^bearer\s+(\S+)\s*$/i.exec(authorization ?? "")?.[1]
  if (presented === undefined) throw unauthorised("no API key was given; send it as \"Authorization: Bearer KEY\"")
  const hash = createHash("sha256").update(presented).digest()
  let tenant: string | undefined
  for (const key of keys) if (timingSafeEqual(key.hash, hash)) tenant = key.tenant // all of them, whichever matches
  if (tenant === undefined) throw unauthorised("the API key is not one of this server's")
  return tenant
}

const unauthorised = (message: string): ApiError =>
  new ApiError({ status: 401, type: "invalid_request_error", code: "invalid_api_key", message, headers: { "www-authenticate": "Bearer" } })
