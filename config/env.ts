import { homedir } from "node:os"
import { delimiter, isAbsolute, join } from "node:path"
import { ConfigError } from "./config-error.ts"

/** The names only, so that config/ imports nothing of the project; kernels/index.ts has the same ones. */
const instructionSets = ["reference", "avx2", "avx512"] as const

/** What the environment decides. This file is the only reader of `process.env`. */
export interface Env {
  /** Cache of models and binaries; an absolute folder. */
  readonly home: string
  /** Wins over the topology file, loses to --port. */
  readonly port: number | undefined
  /** Highest instruction set the kernels may use. */
  readonly isa: (typeof instructionSets)[number] | undefined
  /** Wins over `threads: auto` of a worker. */
  readonly threads: number | undefined
  /** A nats-server binary. */
  readonly natsServer: string | undefined
  /** The addon of workers on a GPU, instead of the one in build/cuda. */
  readonly cudaAddon: string | undefined
  /** A Jaeger binary, for the test of traces. */
  readonly jaeger: string | undefined
  /** The folder of node-llama-cpp, for a bench beside it. */
  readonly nodeLlamaCpp: string | undefined
  /** The python of an environment with openvino-genai, for a bench beside it. */
  readonly openVinoPython: string | undefined
  /** Folders that programs are looked for in: the absolute ones of PATH. */
  readonly searchPath: ReadonlyArray<string>
  readonly otlpEndpoint: string | undefined
  /** An API key for the commands that ask a running Penstock. */
  readonly key: string | undefined
  /** Where Hugging Face's files come from; another one for mirrors. */
  readonly hfEndpoint: string
}

/** The user's cache folder by the platform's convention (XDG base directories, ~/Library/Caches, %LOCALAPPDATA%). */
const cacheFolder = (variables: NodeJS.ProcessEnv): string => {
  const xdg = variables["XDG_CACHE_HOME"]
  // The XDG specification says that a relative path is invalid and to be ignored.
  if (xdg !== undefined && isAbsolute(xdg)) return xdg
  if (process.platform === "darwin") return join(homedir(), "Library", "Caches")
  if (process.platform === "win32") return variables["LOCALAPPDATA"] ?? join(homedir(), "AppData", "Local")
  return join(homedir(), ".cache")
}

/**
 * Reads and checks the variables of DESIGN section 11. An empty variable counts as unset.
 * @throws ConfigError with one line for each wrong variable: name, what was found, what is allowed.
 */
export const readEnv = (variables: NodeJS.ProcessEnv = process.env): Env => {
  const problems: Array<string> = []
  const value = (name: string): string | undefined => {
    const text = variables[name]?.trim()
    return text === undefined || text === "" ? undefined : text
  }
  const integer = (name: string, least: number, most: number): number | undefined => {
    const text = value(name)
    if (text === undefined) return undefined
    const number = /^\d+$/.test(text) ? Number(text) : Number.NaN
    if (number >= least && number <= most) return number
    problems.push(`${name}: expected a whole number in ${least} … ${most}, found "${text}"`)
    return undefined
  }
  const url = (name: string): string | undefined => {
    const text = value(name)
    if (text === undefined) return undefined
    if (URL.canParse(text) && /^https?:$/.test(new URL(text).protocol)) return text.replace(/\/+$/, "")
    problems.push(`${name}: expected an http or https address, found "${text}"`)
    return undefined
  }
  const absolute = (name: string): string | undefined => {
    const text = value(name)
    if (text === undefined || isAbsolute(text)) return text
    problems.push(`${name}: expected an absolute path, found "${text}"`)
    return undefined
  }
  const isaText = value("PENSTOCK_ISA")
  const isa = instructionSets.find((name) => name === isaText)
  if (isaText !== undefined && isa === undefined) {
    problems.push(`PENSTOCK_ISA: expected one of ${instructionSets.join(", ")}, found "${isaText}"`)
  }
  const env: Env = {
    home: absolute("PENSTOCK_HOME") ?? join(cacheFolder(variables), "penstock"),
    port: integer("PENSTOCK_PORT", 0, 65535),
    isa,
    threads: integer("PENSTOCK_THREADS", 1, 1024),
    natsServer: absolute("PENSTOCK_NATS_SERVER"),
    cudaAddon: absolute("PENSTOCK_CUDA_ADDON"),
    jaeger: absolute("PENSTOCK_JAEGER"),
    nodeLlamaCpp: absolute("PENSTOCK_NODE_LLAMA_CPP"),
    openVinoPython: absolute("PENSTOCK_OPENVINO_PYTHON"),
    searchPath: (value("PATH") ?? "").split(delimiter).filter((folder) => isAbsolute(folder)),
    otlpEndpoint: url("OTEL_EXPORTER_OTLP_ENDPOINT"),
    key: value("PENSTOCK_KEY"),
    hfEndpoint: url("HF_ENDPOINT") ?? "https://huggingface.co"
  }
  if (problems.length > 0) throw new ConfigError(problems)
  return env
}

/** This process's environment with some variables set, for a child process. */
export const childEnv = (extra: Readonly<Record<string, string>>): NodeJS.ProcessEnv => ({ ...process.env, ...extra })
