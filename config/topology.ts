import { resolve } from "node:path"
import { Effect, Schema, SchemaGetter, SchemaIssue } from "effect"
import { limits } from "./limits.ts"
import { quantity } from "./quantity.ts"

/** A field that is checked, and perhaps turned into the unit that the code uses. `expected` is what an error says. */
const field = <T>(expected: string, read: (found: unknown) => T | undefined) =>
  Schema.Unknown.pipe(
    Schema.decodeTo(Schema.declare((found: unknown): found is T => found !== undefined), {
      decode: SchemaGetter.transformEffect((found: unknown) => {
        const value = read(found)
        return value === undefined ? Effect.fail(new SchemaIssue.InvalidValue({ message: `expected ${expected}` })) : Effect.succeed(value)
      }),
      encode: SchemaGetter.transform((value: T): unknown => value)
    })
  )

const or = <S extends Schema.Constraint>(schema: S, fallback: S["Encoded"]) =>
  Schema.withDecodingDefaultKey<S>(Effect.succeed(fallback))(schema)

/** Nothing is given to the field to refuse, so that a missing key does not hide the mistakes beside it. */
const required = <T>(schema: ReturnType<typeof field<T>>) => or(schema, undefined)

const text = (expected: string, pattern: RegExp) => field(expected, (found) => (typeof found === "string" && pattern.test(found) ? found : undefined))

const integer = (least: number, most: number) =>
  field(`a whole number in ${least} … ${most}`, (found) =>
    typeof found === "number" && Number.isInteger(found) && found >= least && found <= most ? found : undefined)

const oneOf = <const L extends ReadonlyArray<string>>(allowed: L) =>
  field(`one of ${allowed.join(", ")}`, (found): L[number] | undefined => allowed.find((name) => name === found))

const autoOr = (least: number, most: number) =>
  field(`auto or a whole number in ${least} … ${most}`, (found): number | "auto" | undefined =>
    found === "auto" ? "auto" : typeof found === "number" && Number.isInteger(found) && found >= least && found <= most ? found : undefined)

const bytes = field("a size such as 256MiB", quantity.bytes)

const duration = field("a duration such as 200ms or 2s", quantity.milliseconds)

const name = text("a name of letters, digits, - and _ (at most 63)", /^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$/)

const isRecord = (found: unknown): found is Readonly<Record<string, unknown>> =>
  typeof found === "object" && found !== null && !Array.isArray(found)

const only = (found: Readonly<Record<string, unknown>>, ...keys: ReadonlyArray<string>) => Object.keys(found).every((key) => keys.includes(key))

/**
 * A NATS server and what it wants to see. Everything but the address is the path of a file, so that no secret stands in a
 * topology, which is shown to whoever asks for it.
 */
export interface NatsAddress {
  /** nats:// or tls:// */
  readonly url: string
  /** A .creds file. */
  readonly credentials?: string
  /** A file that holds the seed of an nkey. */
  readonly nkey?: string
  /** A file that holds a token. */
  readonly token?: string
  /** PEM files: who is trusted beside the system's authorities, and this process's own certificate. */
  readonly tls?: { readonly ca?: string; readonly cert?: string; readonly key?: string }
}

export type Bus = "memory" | { readonly nats: NatsAddress | { readonly spawn: true } }

const isPath = (found: unknown): found is string | undefined => found === undefined || (typeof found === "string" && found !== "")

/** No user or password in it: these would be shown with the topology. */
const isNatsUrl = (found: unknown): found is string => {
  if (typeof found !== "string" || !URL.canParse(found)) return false
  const { protocol, hostname, username, password, pathname } = new URL(found)
  return (protocol === "nats:" || protocol === "tls:") && hostname !== "" && username === "" && password === "" && (pathname === "" || pathname === "/")
}

const busForms = "memory, { nats: { spawn: true } } or { nats: { url: nats://HOST:PORT } }, with the paths of files as credentials, nkey or token (one of them) and tls: { ca, cert, key }"

const bus = field(busForms, (found): Bus | undefined => {
  if (found === "memory") return "memory"
  const nats = isRecord(found) && only(found, "nats") ? found["nats"] : undefined
  if (!isRecord(nats)) return undefined
  if (nats["spawn"] === true && only(nats, "spawn")) return { nats: { spawn: true } }
  const { url, credentials, nkey, token, tls } = nats
  if (!isNatsUrl(url) || !only(nats, "url", "credentials", "nkey", "token", "tls")) return undefined
  if (!isPath(credentials) || !isPath(nkey) || !isPath(token)) return undefined
  if ([credentials, nkey, token].filter((path) => path !== undefined).length > 1) return undefined
  if (tls === undefined) return { nats: { url, credentials, nkey, token } }
  if (!isRecord(tls) || !only(tls, "ca", "cert", "key")) return undefined
  const { ca, cert, key } = tls
  // A certificate is of no use without its key.
  if (!isPath(ca) || !isPath(cert) || !isPath(key) || (cert === undefined) !== (key === undefined)) return undefined
  return { nats: { url, credentials, nkey, token, tls: { ca, cert, key } } }
})

/** The same with its files' paths absolute, those that are relative starting from `base`. */
export const resolveBus = (written: Bus, base: string): Bus => {
  if (written === "memory" || "spawn" in written.nats) return written
  const from = (path: string | undefined) => (path === undefined ? undefined : resolve(base, path))
  const { url, credentials, nkey, token, tls } = written.nats
  return {
    nats: {
      url,
      credentials: from(credentials),
      nkey: from(nkey),
      token: from(token),
      tls: tls === undefined ? undefined : { ca: from(tls.ca), cert: from(tls.cert), key: from(tls.key) },
    },
  }
}

/** The roles a worker can have. */
export const roles = ["prefill", "decode"] as const
export type Role = (typeof roles)[number]

const roleList = field(`a list of roles, each one of ${roles.join(", ")}, none twice`, (found): ReadonlyArray<Role> | undefined => {
  if (!Array.isArray(found) || found.length === 0 || new Set(found).size !== found.length) return undefined
  const known = found.flatMap((entry) => roles.filter((role) => role === entry))
  return known.length === found.length ? known : undefined
})

const gateway = Schema.Struct({
  host: or(text("a host name or address", /^[A-Za-z0-9.:_-]{1,255}$/), "127.0.0.1"),
  /** 0: any free port. */
  port: or(integer(0, 65535), 8080),
  replicas: or(integer(1, 64), 1),
  /** File of API keys, one `tenant:hash` a line; from the topology file's folder. */
  keys: or(field("the path of a key file, or null", (found): string | null | undefined => (found === null || (typeof found === "string" && found !== "") ? found : undefined)), null)
})

const scheduler = Schema.Struct({
  policy: or(oneOf(["random", "round-robin", "least-loaded", "cache-aware", "kv-centric"]), "cache-aware"),
  admission: or(oneOf(["none", "early-rejection", "predicted-early-rejection"]), "none"),
  /** Requests that may wait for a placement. */
  queue: or(integer(1, 1_000_000), 256),
  /** Milliseconds; what admission protects. */
  objectives: Schema.optionalKey(Schema.Struct({ ttft: required(duration), tbt: required(duration) }))
})

const kv = Schema.Struct({
  blocks: or(autoOr(1, 2 ** 24), "auto"),
  dtype: or(oneOf(["f16", "int8", "int4"]), "f16"),
  /** Tokens in a block. */
  blockTokens: or(integer(1, 1024), 16)
})

const worker = Schema.Struct({
  name: required(name),
  roles: or(roleList, ["prefill", "decode"]),
  device: or(text("cpu, cuda or cuda:N", /^(cpu|cuda(:\d{1,3})?)$/), "cpu"),
  threads: or(autoOr(1, 1024), "auto"),
  kv: or(kv, {}),
  /** Most sequences in a step. */
  maxBatch: or(integer(1, limits.maxBatch), 32)
})

const kvStore = Schema.Struct({
  replicas: or(integer(1, 64), 1),
  /** Bytes. */
  memory: or(bytes, "256MiB"),
  disk: or(Schema.Struct({
    /** A folder, in which each store has its own; from the topology file's. `auto`: in PENSTOCK_HOME, by the cluster's name. */
    path: or(text("auto or a path", /./), "auto"),
    /** Bytes of each store; 0 for none. */
    size: or(bytes, "2GiB")
  }), {}),
  eviction: or(oneOf(["lru", "lfu", "length-aware"]), "lru")
})

/**
 * What runs where: DESIGN section 7. Everything but `penstock` can be left out. Sizes are bytes and durations
 * milliseconds once decoded. It accepts what the design has; not-yet.ts refuses what is not built.
 */
export const Topology = Schema.Struct({
  penstock: required(field("1 (the version of this file's format)", (found): 1 | undefined => (found === 1 ? 1 : undefined))),
  cluster: or(name, "main"),
  model: or(text("the name of a model, or file:, hf: or pypi:", /\S/), "smollm2-135m"),
  bus: or(bus, "memory"),
  gateway: or(gateway, {}),
  request: or(Schema.Struct({ replicas: or(integer(1, 64), 1) }), {}),
  scheduler: or(scheduler, {}),
  workers: or(Schema.Array(worker), [{ name: "w0" }]),
  kvStore: or(kvStore, {}),
  telemetry: or(
    Schema.Struct({
      otlp: or(field("null or an http(s) address", (found): string | null | undefined =>
        found === null || (typeof found === "string" && /^https?:/.test(found) && URL.canParse(found)) ? found : undefined), null)
    }),
    {}
  )
})
export type Topology = typeof Topology.Type
