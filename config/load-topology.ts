import { createHash } from "node:crypto"
import { readFileSync } from "node:fs"
import { basename, dirname, isAbsolute, resolve } from "node:path"
import { Result, Schema, SchemaIssue } from "effect"
import { isMap, isNode, isPair, isScalar, isSeq, LineCounter, parseDocument, visit, type Document, type YAMLParseError } from "yaml"
import { ConfigError } from "./config-error.ts"
import { limits } from "./limits.ts"
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

type Path = ReadonlyArray<PropertyKey>

interface Problem {
  readonly path: Path
  /** Where the key itself is wrong, its own line is meant and not its value's. */
  readonly atKey?: boolean
  readonly message: string
}

/** A file with nothing but a typo repeated should not fill the terminal. */
const mostProblems = 20

/** Those among which the first ones are looked for. */
const mostPlaced = 200

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
      const pair = node.items.find((item) => isPair(item) && String(isScalar(item.key) ? item.key.value : isNode(item.key) ? item.key.toJSON() : item.key) === String(key))
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

/** What the parser of YAML says, in words for who writes the file; `end` is the length of what is written in it. */
const explainYaml = (error: YAMLParseError, end: number): string => {
  switch (error.code) {
    case "MULTIPLE_DOCS":
      return "a second document begins here (---); a file holds one topology"
    case "TAB_AS_INDENT":
      return "not valid YAML: indent with spaces, not with tabs"
    case "RESOURCE_EXHAUSTION":
      return "not valid YAML: nested too deeply"
    default: {
      const cutOff = (error.code === "BAD_INDENT" || error.code === "MISSING_CHAR") && error.pos[1] >= end
      return `not valid YAML: ${cutOff ? "the file ends in the middle of a value: " : ""}${error.message}`
    }
  }
}

/** Keys that a mapping has twice. YAML's own check compares each with each, which takes seconds where there are thousands. */
const duplicateKeys = (document: Document.Parsed): ReadonlyArray<{ readonly key: string; readonly offset: number; readonly firstOffset: number }> => {
  const found: Array<{ key: string; offset: number; firstOffset: number }> = []
  visit(document, {
    Map: (_, { items }) => {
      const first = new Map<string, number>()
      for (const { key } of items) {
        if (!isScalar(key)) continue
        const [name, offset] = [String(key.value), key.range?.[0] ?? 0]
        const firstOffset = first.get(name)
        if (firstOffset === undefined) first.set(name, offset)
        else found.push({ key: name, offset, firstOffset })
      }
    },
  })
  return found
}

/**
 * Checks the text of a topology file, wherever it comes from: a file, a request, another machine.
 * @param text YAML 1.2
 * @throws ConfigError with one line for each mistake, at most 20: `single.yaml:7: workers[0].rolls: unknown key, did you
 *   mean roles?; allowed: …`
 */
export const parseTopology = (text: string, { path, overrides = {} }: ParseTopologyOptions): LoadedTopology => {
  const file = basename(path)
  const lines = new LineCounter()
  /** A problem's place is looked for only where it may be shown. */
  const fail = <P extends { readonly message: string }>(problems: ReadonlyArray<P>, offsetOf: (problem: P) => number = () => 0): never => {
    const placed = problems.slice(0, mostPlaced).map((problem) => ({ line: Math.max(1, lines.linePos(offsetOf(problem)).line), message: problem.message }))
    const once = [...new Set(placed.sort((a, b) => a.line - b.line).map(({ line, message }) => `${file}:${line}: ${message}`))]
    const rest = once.length - mostProblems + problems.length - placed.length
    throw new ConfigError(rest > 0 ? [...once.slice(0, mostProblems), `${file}: and ${rest} more`] : once)
  }
  const bytes = Buffer.byteLength(text)
  if (bytes > limits.topologyBytes) return fail([{ message: `expected at most ${limits.topologyBytes} bytes, found ${bytes}` }])
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false, uniqueKeys: false, logLevel: "error" })
  const refuse = (problems: ReadonlyArray<Problem>): never =>
    fail(
      problems.map(({ path, atKey, message }) => ({ path, atKey, message: path.length === 0 ? message : `${show(path)}: ${message}` })),
      ({ path, atKey }) => offsetAt(document, path, atKey === true),
    )

  if (document.errors.length > 0) {
    const end = text.trimEnd().length
    return fail(document.errors.map((error) => ({ message: explainYaml(error, end), offset: error.pos[0] })), ({ offset }) => offset)
  }
  const duplicates = duplicateKeys(document)
  if (duplicates.length > 0) {
    return fail(
      duplicates.map(({ key, offset, firstOffset }) => ({ message: `the key ${key} is given twice, first in line ${lines.linePos(firstOffset).line}; write it once`, offset })),
      ({ offset }) => offset,
    )
  }
  let value: unknown
  try {
    value = document.toJS({ maxAliasCount: 100 })
  } catch (error) {
    return fail([{ message: `not valid YAML: ${error instanceof Error ? error.message : String(error)}` }])
  }
  if (value === null || value === undefined) return fail([{ message: "the file is empty; it must at least say penstock: 1" }])

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
