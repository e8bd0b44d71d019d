import { readFileSync } from "node:fs"
import { basename, dirname, isAbsolute, resolve } from "node:path"
import { Result, Schema, SchemaIssue } from "effect"
import { isMap, isNode, isPair, isSeq, LineCounter, parseDocument, type Document } from "yaml"
import { ConfigError } from "./config-error.ts"
import { parseModel, type ModelSpec } from "./models.ts"
import { nearest } from "./nearest.ts"
import { notYet } from "./not-yet.ts"
import { resolveBus, roles, Topology } from "./topology.ts"

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
}

type Path = ReadonlyArray<PropertyKey>

interface Problem {
  readonly path: Path
  /** Where the key itself is wrong, its own line is meant and not its value's. */
  readonly atKey?: boolean
  readonly message: string
}

/** A file with nothing but a typo repeated should not fill the terminal. */
const mostProblems = 20

const show = (path: Path): string =>
  path.reduce<string>((text, key) => (typeof key === "number" ? `${text}[${key}]` : text === "" ? String(key) : `${text}.${String(key)}`), "")

const found = (value: unknown): string => {
  const text = JSON.stringify(value) ?? "nothing"
  return text.length > 60 ? `${text.slice(0, 57)}…` : text
}

const valueAt = (value: unknown, path: Path): unknown =>
  path.reduce<unknown>((at, key) => (typeof at === "object" && at !== null ? (at as Record<PropertyKey, unknown>)[key] : undefined), value)

/** Offset in the text of the node (or of its key) at a path, or of the nearest enclosing one that is written. */
const offsetAt = (document: Document.Parsed, path: Path, atKey: boolean): number => {
  let node: unknown = document.contents
  let offset = document.contents?.range?.[0] ?? 0
  for (const [index, key] of path.entries()) {
    const last = index === path.length - 1
    let value: unknown
    if (isMap(node)) {
      const pair = node.items.find((item) => isPair(item) && String(isNode(item.key) ? item.key.toJSON() : item.key) === String(key))
      if (pair === undefined) break
      if (isNode(pair.key)) offset = pair.key.range?.[0] ?? offset
      if (last && atKey) break
      value = pair.value
    } else if (isSeq(node)) {
      value = node.items[Number(key)]
    }
    if (!isNode(value)) break
    // An empty value has no place of its own; its key's line is the one to look at.
    if (value.range !== null && value.range !== undefined && value.toJSON() !== null) offset = value.range[0]
    node = value
  }
  return offset
}

const keysOf = (ast: unknown): ReadonlyArray<string> => {
  const signatures = (ast as { readonly propertySignatures?: ReadonlyArray<{ readonly name: PropertyKey }> }).propertySignatures
  return signatures?.map((signature) => String(signature.name)) ?? []
}

/** Flattens Effect's tree of issues; the formatter that comes with it cannot name the allowed keys. */
const flatten = (issue: SchemaIssue.Issue, path: Path, file: unknown): ReadonlyArray<Problem> => {
  switch (issue._tag) {
    case "Pointer":
      return flatten(issue.issue, [...path, ...issue.path], file)
    case "Filter":
    case "Encoding":
      return flatten(issue.issue, path, file)
    case "Composite":
    case "AnyOf":
      return issue.issues.flatMap((inner) => flatten(inner, path, file))
    case "UnexpectedKey": {
      const allowed = keysOf(issue.ast)
      const meant = nearest(String(path.at(-1)), allowed)
      return [{ path, atKey: true, message: `unknown key${meant === undefined ? "" : `, did you mean ${meant}?`}; allowed: ${allowed.join(", ")}` }]
    }
    case "MissingKey":
      return [{ path, message: "missing" }]
    case "InvalidValue":
      return [{ path, message: `${String(issue.annotations?.["message"] ?? "not valid")}, found ${found(valueAt(file, path))}` }]
    case "InvalidType": {
      const keys = keysOf(issue.ast)
      const expected = keys.length > 0 ? `keys ${keys.join(", ")}` : issue.ast._tag === "Arrays" ? "a list" : "another type"
      return [{ path, message: `expected ${expected}, found ${found(valueAt(file, path))}` }]
    }
    default:
      return [{ path, message: "not valid" }]
  }
}

/** A word out of a fixed list that is nearly right deserves the right one. */
const withSuggestion = (problem: Problem, file: unknown): Problem => {
  const value = valueAt(file, problem.path)
  const list = /^expected one of ([^,]+(?:, [^,]+)*), found /.exec(problem.message)?.[1]
  const meant = typeof value === "string" && list !== undefined ? nearest(value, list.split(", ")) : undefined
  return meant === undefined ? problem : { ...problem, message: `${problem.message}; did you mean ${meant}?` }
}

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
  for (const role of roles) {
    if (topology.workers.length > 0 && !topology.workers.some((worker) => worker.roles.includes(role))) {
      problems.push({ path: ["workers"], message: `no worker has the role ${role}; at least one must` })
    }
  }
  if (topology.scheduler.admission !== "none" && topology.scheduler.objectives === undefined) {
    problems.push({ path: ["scheduler", "admission"], message: `${topology.scheduler.admission} needs objectives: { ttft: …, tbt: … }` })
  }
  return problems
}

/**
 * Checks the text of a topology file.
 * @param text YAML 1.2
 * @param path of the file, for relative paths in it and for errors
 * @throws ConfigError with one line for each mistake, at most 20: `single.yaml:7: workers[0].rolls: unknown key, did you
 *   mean roles?; allowed: …`
 */
export const parseTopology = (text: string, path: string, overrides: TopologyOverrides = {}): LoadedTopology => {
  const lines = new LineCounter()
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false, uniqueKeys: true })
  const file = basename(path)
  const fail = (problems: ReadonlyArray<{ readonly line: number; readonly message: string }>): never => {
    const sorted = [...problems].sort((a, b) => a.line - b.line).map(({ line, message }) => `${file}:${line}: ${message}`)
    const rest = sorted.length - mostProblems
    throw new ConfigError(rest > 0 ? [...sorted.slice(0, mostProblems), `${file}: and ${rest} more`] : sorted)
  }
  const refuse = (problems: ReadonlyArray<Problem>): never =>
    fail(problems.map((problem) => ({
      line: lines.linePos(offsetAt(document, problem.path, problem.atKey === true)).line,
      message: problem.path.length === 0 ? problem.message : `${show(problem.path)}: ${problem.message}`
    })))

  if (document.errors.length > 0) {
    return fail(document.errors.map((error) => ({ line: lines.linePos(error.pos[0]).line, message: `not valid YAML: ${error.message}` })))
  }
  let value: unknown
  try {
    value = document.toJS({ maxAliasCount: 100 })
  } catch (error) {
    return fail([{ line: 1, message: `not valid YAML: ${error instanceof Error ? error.message : String(error)}` }])
  }
  if (value === null || value === undefined) return fail([{ line: 1, message: "the file is empty; it must at least say penstock: 1" }])

  const decode = (onExcessProperty: "error" | "ignore") => Schema.decodeUnknownResult(Topology, { errors: "all", onExcessProperty })(value)
  const decoded = decode("error")
  if (Result.isFailure(decoded)) {
    // An unknown key ends the decoding of its mapping before the values are looked at; a second pass shows those as well.
    const values = decode("ignore")
    const issues = Result.isFailure(values) ? [decoded.failure.issue, values.failure.issue] : [decoded.failure.issue]
    const problems = issues.flatMap((issue) => flatten(issue, [], value)).map((problem) => withSuggestion(problem, value))
    return refuse([...new Map(problems.map((problem) => [`${show(problem.path)} ${problem.message}`, problem])).values()])
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
    ...notYet(topology).map((entry) => ({ path: entry.path, message: `${found(valueAt(value, entry.path))} is not available yet: use ${entry.use}` }))
  ]
  let model: ModelSpec | undefined
  try {
    model = parseModel(topology.model, dirname(path))
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error
    problems.push({ path: ["model"], message: error.message.replace(/^model: /, "") })
  }
  if (problems.length > 0 || model === undefined) return refuse(problems)
  return { topology, path, model }
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
  return parseTopology(text, absolute, overrides)
}
