import { createHash } from "node:crypto"
import { readFileSync } from "node:fs"
import { basename, dirname, isAbsolute, resolve } from "node:path"
import { Result, Schema } from "effect"
import { ConfigError } from "./config-error.ts"
import { limits } from "./limits.ts"
import { parseModel, type ModelSpec } from "./models.ts"
import { notYet } from "./not-yet.ts"
import { problemsOf, showFound, showPath, valueAt, type Problem } from "./problem.ts"
import { natsSecrets, resolveBus, roles, Topology } from "./topology.ts"
import { readYaml } from "./yaml-text.ts"

/** What the command line and the environment say; it wins over the file, also after edits. */
export interface TopologyOverrides {
  readonly host?: string | undefined
  readonly port?: number | undefined
}

export interface LoadedTopology {
  readonly topology: Topology
  /** Absolute. */
  readonly path: string
  readonly model: ModelSpec
  /** As it was read, before what overrides it. */
  readonly text: string
  readonly revision: string
}

export interface ParseTopologyOptions {
  /** Of the file, absolute: relative paths in it start from its folder, and errors name it. */
  readonly path: string
  /** Applied again at every load. */
  readonly overrides?: TopologyOverrides | undefined
}

/** Names a text of a topology file: 16 hex digits of its SHA-256, so that whoever edits can say what they have read. */
export const revisionOf = (text: string): string => createHash("sha256").update(text).digest("hex").slice(0, 16)

/** A file with nothing but a typo repeated should not fill the terminal. */
const mostProblems = 20

/** Those among which the first ones are looked for. */
const mostPlaced = 200

/** What no single field can tell. */
const crossChecks = (topology: Topology): ReadonlyArray<Problem> => {
  const problems: Array<Problem> = []
  if (topology.workers.length === 0) problems.push({ path: ["workers"], message: "expected at least one worker, found none" })
  topology.workers.forEach((worker, index) => {
    const first = topology.workers.findIndex((other) => other.name === worker.name)
    if (first < index) problems.push({ path: ["workers", index, "name"], message: `"${worker.name}" is already the name of workers[${first}]; names must differ` })
    // Blocks are found, stored and handed over by their hash, so one cluster has one size and type of them.
    for (const key of ["blockTokens", "dtype"] as const) {
      const [expected, found] = [topology.workers[0]?.kv[key], worker.kv[key]]
      if (found !== expected) problems.push({ path: ["workers", index, "kv", key], message: `expected ${expected}, as workers[0] has, found ${found}` })
    }
  })
  // KV of a CPU and of a GPU differ in their last bits, so that what one has computed is not what the other would have.
  const kindOf = ({ device }: Topology["workers"][number]): string => (device === "cpu" ? "cpu" : "cuda")
  const decoding = topology.workers.find((worker) => worker.roles.includes("decode"))
  topology.workers.forEach((worker, index) => {
    const [first] = topology.workers
    if (!topology.mixedKv && kindOf(worker) !== kindOf(first!)) {
      problems.push({ path: ["workers", index, "device"], message: `expected ${kindOf(first!)}, as workers[0] has, found ${worker.device}: KV of the two differs in its last bits, and mixedKv: true says that this may be` })
    } else if (topology.mixedKv && decoding !== undefined && worker.roles.includes("decode") && kindOf(worker) !== kindOf(decoding)) {
      problems.push({ path: ["workers", index, "device"], message: `expected ${kindOf(decoding)}, as ${decoding.name} has, found ${worker.device}: all that decode have one kind of device` })
    }
  })
  for (const role of roles) {
    if (topology.workers.length > 0 && !topology.workers.some((worker) => worker.roles.includes(role))) {
      problems.push({ path: ["workers"], message: `no worker has the role ${role}; at least one must` })
    }
  }
  if (topology.bus !== "memory" && "url" in topology.bus.nats) {
    const { nats } = topology.bus
    const said = natsSecrets.filter((secret) => nats[secret] !== undefined)
    if (said.length > 1) problems.push({ path: ["bus", "nats", said[1]!], message: `one of ${natsSecrets.join(", ")} is enough, found ${said.join(" and ")}` })
    // A certificate is of no use without its key.
    for (const [one, other] of [["cert", "key"], ["key", "cert"]] as const) {
      if (nats.tls?.[one] !== undefined && nats.tls[other] === undefined) problems.push({ path: ["bus", "nats", "tls", one], message: `needs ${other} beside it` })
    }
  }
  if (topology.scheduler.admission !== "none" && topology.scheduler.objectives === undefined) {
    problems.push({ path: ["scheduler", "admission"], message: `${topology.scheduler.admission} needs objectives: { ttft: …, tbt: … }` })
  }
  return problems
}

/**
 * Checks the text of a topology file, wherever it comes from: a file, a request, another machine.
 * @param text YAML 1.2
 * @throws ConfigError with one line for each mistake, at most 20: `single.yaml:7: workers[0].rolls: unknown key, did you
 *   mean roles?; allowed: …`
 */
export const parseTopology = (text: string, { path, overrides = {} }: ParseTopologyOptions): LoadedTopology => {
  const file = basename(path)
  const bytes = Buffer.byteLength(text)
  if (bytes > limits.topologyBytes) throw new ConfigError([`${file}:1: expected at most ${limits.topologyBytes} bytes, found ${bytes}`])
  const yaml = readYaml(text)
  const { value } = yaml
  /** A problem's place is looked for only where it may be shown. */
  const fail = <P extends { readonly message: string }>(problems: ReadonlyArray<P>, offsetOf: (problem: P) => number): never => {
    const placed = problems.slice(0, mostPlaced).map((problem) => ({ line: yaml.lineOf(offsetOf(problem)), message: problem.message }))
    const once = [...new Set(placed.sort((a, b) => a.line - b.line).map(({ line, message }) => `${file}:${line}: ${message}`))]
    const rest = once.length - mostProblems + problems.length - placed.length
    throw new ConfigError(rest > 0 ? [...once.slice(0, mostProblems), `${file}: and ${rest} more`] : once)
  }
  const refuse = (problems: ReadonlyArray<Problem>): never =>
    fail(
      problems.map((problem) => ({ ...problem, message: problem.path.length === 0 ? problem.message : `${showPath(problem.path)}: ${problem.message}` })),
      ({ path, atKey }) => yaml.offsetOf(path, atKey === true),
    )
  if (yaml.flaws.length > 0) return fail(yaml.flaws, ({ offset }) => offset)
  if (value === null || value === undefined) return refuse([{ path: [], message: "the file is empty; it must at least say penstock: 1" }])

  const decode = (onExcessProperty: "error" | "ignore") => Schema.decodeUnknownResult(Topology, { errors: "all", onExcessProperty })(value)
  const decoded = decode("error")
  if (Result.isFailure(decoded)) {
    // An unknown key ends the decoding of its mapping before the values are looked at; a second pass shows those as well.
    const values = decode("ignore")
    const issues = Result.isFailure(values) ? [decoded.failure.issue, values.failure.issue] : [decoded.failure.issue]
    return refuse(issues.flatMap((issue) => problemsOf(issue, value)))
  }
  const written = decoded.success
  const keys = written.gateway.keys
  const { disk } = written.kvStore
  const topology: Topology = {
    ...written,
    bus: resolveBus(written.bus, dirname(path)),
    gateway: {
      ...written.gateway,
      host: overrides.host ?? written.gateway.host,
      port: overrides.port ?? written.gateway.port,
      keys: keys === null || isAbsolute(keys) ? keys : resolve(dirname(path), keys)
    },
    kvStore: { ...written.kvStore, disk: { ...disk, path: disk.path === "auto" ? "auto" : resolve(dirname(path), disk.path) } }
  }
  const problems: Array<Problem> = [
    ...crossChecks(topology),
    ...notYet(topology).map((entry) => ({ path: entry.path, message: `${showFound(valueAt(value, entry.path))} is not available yet: use ${entry.use}` }))
  ]
  let model: ModelSpec | undefined
  try {
    model = parseModel(topology.model, dirname(path))
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    problems.push({ path: ["model"], message: error.message.replace(/^model: /, "") })
  }
  if (problems.length > 0 || model === undefined) return refuse(problems)
  return { topology, path, model, text, revision: revisionOf(text) }
}

/**
 * Reads and checks a topology file.
 * @throws ConfigError as `parseTopology`, or with one line where the file cannot be read
 */
export const loadTopology = (path: string, overrides: TopologyOverrides = {}): LoadedTopology => {
  const absolute = resolve(path)
  let text: string
  try {
    text = readFileSync(absolute, "utf8")
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code
    throw new ConfigError([`${path}: ${code === "ENOENT" ? "no such file" : `cannot be read (${code})`}; give a topology file, such as config/topologies/single.yaml`])
  }
  return parseTopology(text, { path: absolute, overrides })
}
