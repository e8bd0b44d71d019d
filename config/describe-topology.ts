import type { SchemaAST } from "effect"
import type { JsonSchema } from "./field.ts"
import { usableOf } from "./not-yet.ts"
import { Topology } from "./topology.ts"

/** What one part of a topology file may be; the reference and the JSON Schema are written from it. */
export interface Description {
  /** One sentence; empty for a form of something that has one. */
  readonly description: string
  /** What it is where it is left out, as it would be written; `undefined` where there is nothing to say. */
  readonly fallback: unknown
  readonly isRequired: boolean
  /** In words, where it is one value; it reads on after "expected". */
  readonly expected: string | undefined
  /** What there is to use for now, where the format has more than is built. */
  readonly usable: string | undefined
  /** JSON Schema that its parts do not say. */
  readonly json: JsonSchema
  readonly parts:
    | { readonly kind: "value" }
    | { readonly kind: "mapping"; readonly keys: ReadonlyArray<readonly [name: string, Description]> }
    | { readonly kind: "list"; readonly item: Description }
    | { readonly kind: "choice"; readonly forms: ReadonlyArray<Description> }
}

const partsOf = (ast: SchemaAST.AST, path: ReadonlyArray<string | number>): Description["parts"] => {
  switch (ast._tag) {
    case "Objects":
      return { kind: "mapping", keys: ast.propertySignatures.map(({ name, type }) => [String(name), describe(type, [...path, String(name)])] as const) }
    case "Arrays":
      return { kind: "list", item: describe(ast.rest[0]!, [...path, 0]) }
    case "Union":
      return { kind: "choice", forms: ast.types.map((type) => describe(type, path)) }
    default:
      return { kind: "value" }
  }
}

/** Values that stand for all that a part can be, for asking which of them are built. */
const samplesOf = (json: JsonSchema, isAbsent: boolean): ReadonlyArray<unknown> => {
  const { enum: allowed, examples, minimum, maximum } = json as Readonly<Record<string, ReadonlyArray<unknown> | number | undefined>>
  if (isAbsent) return [{}] // that it is there at all
  return [allowed, examples, [minimum, maximum]].flatMap((some) => (Array.isArray(some) ? some : [])).filter((sample) => sample !== undefined)
}

const describe = (ast: SchemaAST.AST, path: ReadonlyArray<string | number>): Description => {
  const annotations = (ast.annotations ?? {}) as { readonly description?: string; readonly default?: unknown; readonly expected?: string; readonly json?: JsonSchema | (() => JsonSchema) }
  const literal: JsonSchema = ast._tag === "Literal" ? { enum: [ast.literal] } : {}
  const json = typeof annotations.json === "function" ? annotations.json() : (annotations.json ?? literal)
  const parts = partsOf(ast, path)
  const isAbsent = annotations.default === undefined && ast.context?.isOptional === true
  return {
    description: annotations.description ?? "",
    fallback: annotations.default,
    isRequired: annotations.default === undefined && !isAbsent,
    expected: annotations.expected ?? (ast._tag === "Literal" ? String(ast.literal) : undefined),
    usable: usableOf(path, samplesOf(json, isAbsent)),
    json,
    parts,
  }
}

/** The whole file. */
export const describeTopology = (): Description => describe(Topology.ast, [])
