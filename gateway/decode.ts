/**
 * Request bodies as typed values: a Schema that does not hold becomes a 400 that names the field, what it may be and what
 * was found. Fields that no Schema names are let through.
 */
import { Result, SchemaParser, type Schema, type SchemaAST, type SchemaIssue } from "effect"
import { invalid } from "./errors.ts"

/** Throws an ApiError 400. */
export const decoder = <A>(schema: Schema.Codec<A, A, never, never>): ((body: unknown) => A) => {
  const decode = SchemaParser.decodeUnknownResult(schema)
  return (body) => {
    const result = decode(body)
    if (Result.isSuccess(result)) return result.success
    const { path, expected } = locate(result.failure, { path: [], expected: "another value", parent: undefined })
    throw invalid(path.length === 0 ? undefined : formatPath(path), `expected ${expected}, found ${show(valueAt(body, path))}`)
  }
}

interface Place {
  readonly path: ReadonlyArray<PropertyKey>
  readonly expected: string
  readonly parent: SchemaAST.AST | undefined
}

/** Follows the issue to the deepest place at fault that has one meaning, and what its Schema says is expected there. */
const locate = (issue: SchemaIssue.Issue, place: Place): Place => {
  switch (issue._tag) {
    case "Pointer": {
      const child = place.parent === undefined ? undefined : childOf(place.parent, issue.path[0])
      return locate(issue.issue, { path: [...place.path, ...issue.path], expected: expectedOf(child) ?? place.expected, parent: child })
    }
    case "Composite":
      return locate(issue.issues[0], at(place, issue.ast))
    case "AnyOf": {
      const here = at(place, issue.ast)
      const [first, ...others] = issue.issues
      return first === undefined || others.length > 0 ? here : locate(first, here)
    }
    case "Filter":
      return locate(issue.issue, place)
    case "InvalidType":
      return at(place, issue.ast)
    default:
      return place
  }
}

const at = (place: Place, ast: SchemaAST.AST): Place => ({ ...place, expected: expectedOf(ast) ?? place.expected, parent: ast })

/** The `expected` annotation: on the last check where there are checks, or within what makes a field optional. */
const expectedOf = (ast: SchemaAST.AST | undefined): string | undefined => {
  if (ast === undefined) return undefined
  const annotation = (ast.checks?.at(-1) ?? ast).annotations?.["expected"]
  if (typeof annotation === "string") return annotation
  return ast._tag === "Union" ? expectedOf(ast.types[0]) : ast._tag === "Objects" ? "an object" : ast._tag === "Arrays" ? "an array" : undefined
}

const childOf = (parent: SchemaAST.AST, key: PropertyKey | undefined): SchemaAST.AST | undefined => {
  if (parent._tag === "Objects") return parent.propertySignatures.find(({ name }) => name === key)?.type
  return parent._tag === "Arrays" ? parent.rest[0] : undefined
}

const valueAt = (body: unknown, path: ReadonlyArray<PropertyKey>): unknown => {
  let value = body
  for (const key of path) value = typeof value === "object" && value !== null ? (value as Record<PropertyKey, unknown>)[key] : undefined
  return value
}

const formatPath = (path: ReadonlyArray<PropertyKey>): string =>
  path.reduce<string>((text, key) => (typeof key === "number" ? `${text}[${key}]` : text === "" ? String(key) : `${text}.${String(key)}`), "")

/** A short rendering: never a whole body. */
export const show = (value: unknown): string => {
  if (value === undefined) return "nothing"
  if (typeof value === "string") return JSON.stringify(value.length > 60 ? `${value.slice(0, 60)}…` : value)
  if (Array.isArray(value)) return `an array of ${value.length}`
  return typeof value === "object" && value !== null ? "an object" : String(value)
}
