/**
 * Makes a connection to a NATS server: who we are, whom we trust, how it is tried again, and what to do where it fails.
 */
import { readFileSync } from "node:fs"
import { isIP } from "node:net"
import { connect, credsAuthenticator, nkeyAuthenticator, tokenAuthenticator, type Authenticator, type NatsConnection } from "@nats-io/transport-node"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"

/** No connection could be made. The message is for people, says what to do, and holds no secret. */
export class NatsConnectError extends Error {
  readonly _tag = "NatsConnectError"
}

/** How long the next attempt waits: the same answer until an attempt was made, since the client asks more than once. */
export class Backoff {
  #attempts = 0
  #delayMs = 0

  constructor() {
    this.reset()
  }

  get delayMs(): number {
    return this.#delayMs
  }

  attempted(): void {
    this.#attempts++
    const longest = Math.min(limits.busReconnectDelayMs * 2 ** this.#attempts, limits.busReconnectDelayMaxMs)
    // Half of it by chance, so that all clients of a server that comes back do not come in the same moment.
    this.#delayMs = longest / 2 + (Math.random() * longest) / 2
  }

  reset(): void {
    this.#attempts = -1
    this.attempted()
  }
}

/**
 * Connects, and keeps connecting for ever once it has.
 * @param inboxPrefix where answers to the client's own requests come in; not needed by whoever makes none
 * @throws NatsConnectError
 */
export const connectNats = async (address: NatsAddress, name: string, backoff: Backoff, inboxPrefix?: string): Promise<NatsConnection> => {
  const { url, tls } = address
  // What the user wrote without what nobody should read.
  const shown = url.replace(/\/\/[^/@]*@/, "//")
  const authenticator = authenticatorOf(address)
  const pem = (key: "ca" | "cert" | "key") => (tls?.[key] === undefined ? undefined : readFile(tls[key], `bus.nats.tls.${key}`).toString())
  const secure = tls !== undefined || url.startsWith("tls:")
  const { hostname } = new URL(url)
  // The client names a host to the check of certificates only where it is no address; Node would check "localhost".
  const checked = isIP(hostname) === 0 ? {} : { host: hostname }
  try {
    return await connect({
      servers: url,
      name,
      ...(inboxPrefix === undefined ? {} : { inboxPrefix }),
      authenticator,
      tls: secure ? { ...checked, ca: pem("ca"), cert: pem("cert"), key: pem("key") } : undefined,
      timeout: limits.busConnectDeadlineMs,
      reconnect: true,
      maxReconnectAttempts: -1,
      reconnectDelayHandler: () => backoff.delayMs,
      // A server that is being set up may refuse for a while; and files may be replaced.
      ignoreAuthErrorAbort: true,
      pingInterval: limits.busPingIntervalMs,
      maxPingOut: 3,
      // A stack for each request costs more than the request.
      noAsyncTraces: true,
    })
  } catch (error) {
    throw error instanceof NatsConnectError ? error : new NatsConnectError(`${shown}: ${explain(error, address)}`)
  }
}

const readFile = (path: string, key: string): Buffer => {
  try {
    return readFileSync(path)
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    throw new NatsConnectError(`${path}: ${code === "ENOENT" ? "no such file" : `cannot be read (${code})`}; ${key} in the topology names it`)
  }
}

/** Reads the file again at each connection, so that it can be replaced; what was read last counts while it cannot be read. */
const authenticatorOf = ({ credentials, nkey, token }: NatsAddress): Authenticator | undefined => {
  const [path, key, make] =
    credentials !== undefined
      ? ([credentials, "credentials", (bytes: Buffer) => credsAuthenticator(bytes)] as const)
      : nkey !== undefined
        ? ([nkey, "nkey", (bytes: Buffer) => nkeyAuthenticator(Buffer.from(bytes.toString().trim()))] as const)
        : token !== undefined
          ? ([token, "token", (bytes: Buffer) => tokenAuthenticator(bytes.toString().trim())] as const)
          : []
  if (path === undefined || make === undefined) return undefined
  const valid = (bytes: Buffer): Authenticator => {
    const authenticator = make(bytes)
    authenticator("nonce")
    return authenticator
  }
  const first = readFile(path, `bus.nats.${key}`)
  let current: Authenticator
  try {
    current = valid(first)
  } catch {
    throw new NatsConnectError(`${path}: is no ${key === "nkey" ? "seed of an nkey" : "NATS credentials file"}; bus.nats.${key} in the topology names it`)
  }
  return (nonce) => {
    try {
      const renewed = make(readFileSync(path))
      const signed = renewed(nonce)
      current = renewed
      return signed
    } catch {
      // An authenticator that throws would end the connection for good.
      return current(nonce)
    }
  }
}

const explain = (error: unknown, { credentials, nkey, token }: NatsAddress): string => {
  const codes: Array<string> = []
  let message = ""
  for (let at: unknown = error; at instanceof Error; at = at.cause) {
    message = `${message} ${at.name} ${at.message}`
    if ("code" in at && typeof at.code === "string") codes.push(at.code)
  }
  const any = (pattern: RegExp) => pattern.test(message) || codes.some((code) => pattern.test(code))
  if (any(/ECONNREFUSED|connection refused/)) return "no NATS server answers there: start one, correct bus.nats.url in the topology, or write bus: { nats: { spawn: true } }"
  if (any(/ENOTFOUND|EAI_AGAIN/)) return "there is no host of that name: correct bus.nats.url in the topology"
  if (any(/authorization|authentication/i)) {
    const given = credentials ?? nkey ?? token
    return given === undefined
      ? "the server wants to know who asks: give bus.nats.credentials, nkey or token in the topology"
      : `the server refuses what ${given} says: put what it expects there`
  }
  if (any(/does not support 'tls'|tls.*not available/i)) return "the server speaks no TLS: use nats:// and leave out bus.nats.tls, or configure the server for it"
  if (any(/ERR_TLS_CERT_ALTNAME_INVALID/)) return "the server's certificate is for another host name: use the one it is for in bus.nats.url"
  if (any(/CERT|SELF_SIGNED|UNABLE_TO_|ISSUER/)) return `the server's certificate is not trusted (${codes[0] ?? "no code"}): name its authority in bus.nats.tls.ca`
  if (any(/alert|ECONNRESET|EPROTO|SSL|PEM|ERR_OSSL/i)) return `no secure connection can be made (${codes[0] ?? "no code"}): check bus.nats.tls.cert and key, which the server may demand`
  if (any(/timeout|ETIMEDOUT|EHOSTUNREACH|ENETUNREACH/i)) return `no NATS server answers within ${limits.busConnectDeadlineMs / 1000} s: check bus.nats.url in the topology, and the network`
  if (any(/unexpected response|JSON/)) return "what answers there is no NATS server: correct bus.nats.url in the topology"
  return `the connection fails (${codes[0] ?? (error instanceof Error ? error.message : String(error))}): check bus.nats.url in the topology and the server's log`
}
