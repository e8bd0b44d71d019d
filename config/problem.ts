import type { SchemaIssue } from "effect"
import { nearest } from "./nearest.ts"

export type Path = ReadonlyArray<PropertyKey>

/** A mistake in a file, by the path of keys that leads to it. */
export interface Problem {
  readonly path: Path
  /** Where the key itself is wrong, its own line is meant and not its value's. */
  readonly atKey?: boolean
  readonly message: string
}

/** `workers[0].kv.dtype` */
export const showPath = (path: Path): string =>
  path.reduce<string>((text, key) => (typeof key === "number" ? `${text}[${key}]` : text === "" ? String(key) : `${text}.${String(key)}`), "")

/** A value that was found, as an error shows it: without what stands before the @ of an address, which may be a password. */
export const showFound = (value: unknown): string => {
  const text = (JSON.stringify(value) ?? "nothing").replace(/\/\/[^/@\s"]*@/g, "//…@")
  return text.length > 60 ? `${text.slice(0, 57)}…` : text
}

export const valueAt = (value: unknown, path: Path): unknown =>
  path.reduce<unknown>((at, key) => (typeof at === "object" && at !== null ? (at as Record<PropertyKey, unknown>)[key] : undefined), value)

const keysOf = (ast: unknown): ReadonlyArray<string> => {
  const signatures = (ast as { readonly propertySignatures?: ReadonlyArray<{ readonly name: PropertyKey }> }).propertySignatures
  return signatures?.map((signature) => String(signature.name)) ?? []
}

const annotated = (annotations: object | undefined, name: "expected" | "message" | "messageMissingKey" | "meant"): string | undefined => {
  const found = (annotations as Readonly<Record<string, unknown>> | undefined)?.[name]
  return typeof found === "string" ? found : undefined
}

/** Of the forms that a mapping can have, the one that the file most likely means: the one that knows most of its keys, the last of equals. */
const likeliest = (forms: ReadonlyArray<SchemaIssue.Issue>, found: unknown): ReadonlyArray<SchemaIssue.Issue> => {
  const written = typeof found === "object" && found !== null ? Object.keys(found) : []
  const known = (issue: SchemaIssue.Issue) => ("ast" in issue ? keysOf(issue.ast).filter((key) => written.includes(key)).length : 0)
  return forms.slice(0, 1).map((first) => forms.reduce((best, form) => (known(form) >= known(best) ? form : best), first))
}

/**
 * Flattens Effect's tree of issues; the formatter that comes with it cannot name the allowed keys.
 * @param file the value that was decoded
 * @param path from there to what the issue is about
 */
export const problemsOf = (issue: SchemaIssue.Issue, file: unknown, path: Path = []): ReadonlyArray<Problem> => {
  const inner = (issue: SchemaIssue.Issue, at: Path = path) => problemsOf(issue, file, at)
  const found = () => `, found ${showFound(valueAt(file, path))}`
  switch (issue._tag) {
    case "Pointer":
      return inner(issue.issue, [...path, ...issue.path])
    case "Filter":
    case "Encoding":
      return inner(issue.issue)
    case "Composite":
      return issue.issues.flatMap((each) => inner(each))
    case "AnyOf":
      return issue.issues.length === 0
        ? [{ path, message: `expected ${annotated(issue.ast.annotations, "expected") ?? "another value"}${found()}` }]
        : likeliest(issue.issues, valueAt(file, path)).flatMap((each) => inner(each))
    case "UnexpectedKey": {
      const allowed = keysOf(issue.ast)
      const meant = nearest(String(path.at(-1)), allowed)
      return [{ path, atKey: true, message: `unknown key${meant === undefined ? "" : `, did you mean ${meant}?`}; allowed: ${allowed.join(", ")}` }]
    }
    case "MissingKey":
      return [{ path, message: annotated(issue.annotations, "messageMissingKey") ?? "missing" }]
    case "InvalidValue": {
      const meant = annotated(issue.annotations, "meant")
      return [{ path, message: `${annotated(issue.annotations, "message") ?? "not valid"}${found()}${meant === undefined ? "" : `; did you mean ${meant}?`}` }]
    }
    case "InvalidType": {
      const keys = keysOf(issue.ast)
      const expected = keys.length > 0 ? `keys ${keys.join(", ")}` : issue.ast._tag === "Arrays" ? "a list" : (annotated(issue.ast.annotations, "expected") ?? "another type")
      return [{ path, message: `expected ${expected}${found()}` }]
    }
    default:
      return [{ path, message: "not valid" }]
  }
}
