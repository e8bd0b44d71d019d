/**
 * Fields of a configuration file. Each carries what it accepts three times: as code that reads it, in words for errors and
 * the reference, and as JSON Schema for editors; a test holds the three together.
 */
import { Effect, Schema, SchemaGetter, SchemaIssue } from "effect"
import { nearest } from "./nearest.ts"
import { quantity } from "./quantity.ts"

/** A part of a JSON Schema, draft-07. */
export type JsonSchema = Readonly<Record<string, unknown>>

export interface FieldOptions<T> {
  /** What an error says, after "expected". */
  readonly expected: string
  /** A function where it takes more than this program to know. */
  readonly json: JsonSchema | (() => JsonSchema)
  /** The value in the unit that the code uses; `undefined` where it is refused. */
  readonly read: (found: unknown) => T | undefined
  /** What was probably meant by a value that is refused. */
  readonly meant?: (found: unknown) => string | undefined
}

/** A field that is checked, and perhaps turned into the unit that the code uses. */
export const field = <T>({ expected, json, read, meant }: FieldOptions<T>) =>
  Schema.Unknown.annotateKey({ messageMissingKey: `expected ${expected}, found nothing` }).pipe(
    Schema.decodeTo(Schema.declare((found: unknown): found is T => found !== undefined), {
      decode: SchemaGetter.transformEffect((found: unknown) => {
        const value = read(found)
        return value === undefined ? Effect.fail(new SchemaIssue.InvalidValue({ message: `expected ${expected}`, meant: meant?.(found) })) : Effect.succeed(value)
      }),
      encode: SchemaGetter.transform((value: T): unknown => value)
    })
  ).annotate({ expected, json })

type Described = Schema.Constraint & { annotate(annotations: { readonly description: string; readonly default?: never }): unknown }

const describe = <S extends Described>(description: string, schema: S, fallback: unknown): S => schema.annotate({ description, default: fallback as never }) as S

/** A key that may be left out, one sentence that says what it means, and what it is then, as it would be written. */
export const key = <S extends Described>(description: string, schema: S, fallback: S["Encoded"]) =>
  Schema.withDecodingDefaultKey<S>(Effect.succeed(fallback))(describe(description, schema, fallback))

/** Nothing is given to the field to refuse, so that a missing key does not hide the mistakes beside it. */
export const requiredKey = <S extends Described>(description: string, schema: S) => Schema.withDecodingDefaultKey<S>(Effect.succeed(undefined as S["Encoded"]))(describe(description, schema, undefined))

/** A key that tells one form of a mapping from another: without it, it is another form. */
export const distinctiveKey = <S extends Described>(description: string, schema: S) => describe(description, schema, undefined)

/** A key that is not there in the decoded value where it is not written. */
export const optionalKey = <S extends Described>(description: string, schema: S) => Schema.optionalKey(describe(description, schema, undefined))

export const text = (expected: string, pattern: RegExp, json: JsonSchema = {}) =>
  field({ expected, json: { type: "string", pattern: pattern.source, ...json }, read: (found) => (typeof found === "string" && pattern.test(found) ? found : undefined) })

export const nullOr = (expected: string, pattern: RegExp, holds: (found: string) => boolean = () => true) =>
  field({
    expected: `${expected}, or null`,
    json: { type: ["string", "null"], pattern: pattern.source },
    read: (found): string | null | undefined => (found === null || (typeof found === "string" && pattern.test(found) && holds(found)) ? found : undefined)
  })

/** A path, which may be relative. */
export const path = text("the path of a file", /./)

const isWithin = (found: unknown, least: number, most: number): found is number => typeof found === "number" && Number.isInteger(found) && found >= least && found <= most

/** A whole number, of something where that needs saying. */
export const integer = (least: number, most: number, of = "") =>
  field({
    expected: `a whole number ${of === "" ? "" : `of ${of} `}in ${least} … ${most}`,
    json: { type: "integer", minimum: least, maximum: most },
    read: (found) => (isWithin(found, least, most) ? found : undefined)
  })

export const autoOr = (least: number, most: number, of: string) =>
  field({
    expected: `auto or a whole number of ${of} in ${least} … ${most}`,
    json: { anyOf: [{ enum: ["auto"] }, { type: "integer", minimum: least, maximum: most }] },
    read: (found): number | "auto" | undefined => (found === "auto" || isWithin(found, least, most) ? found : undefined)
  })

export const oneOf = <const L extends ReadonlyArray<string>>(allowed: L) =>
  field({
    expected: `one of ${allowed.join(", ")}`,
    json: { enum: allowed },
    read: (found): L[number] | undefined => allowed.find((name) => name === found),
    meant: (found) => (typeof found === "string" ? nearest(found, allowed) : undefined)
  })

/** The one value that is allowed here. */
export const exactly = <const V extends string | number | boolean>(value: V, why: string = "") =>
  field({ expected: `${value}${why}`, json: { enum: [value] }, read: (found): V | undefined => (found === value ? value : undefined) })

export const listOf = <const L extends ReadonlyArray<string>>(what: string, allowed: L) =>
  field({
    expected: `a list of ${what}, each one of ${allowed.join(", ")}, none twice`,
    json: { type: "array", items: { enum: allowed }, minItems: 1, uniqueItems: true },
    read: (found): ReadonlyArray<L[number]> | undefined => {
      if (!Array.isArray(found) || found.length === 0 || new Set(found).size !== found.length) return undefined
      const known = found.flatMap((entry): ReadonlyArray<L[number]> => allowed.filter((name) => name === entry))
      return known.length === found.length ? known : undefined
    }
  })

/** Bytes once decoded. */
export const bytes = field({
  expected: `a size such as 256MiB (units ${quantity.byteUnits.join(", ")})`,
  json: { anyOf: [{ type: "string", pattern: quantity.bytesPattern }, { type: "integer", minimum: 0 }] },
  read: quantity.bytes,
  meant: quantity.meantBytes
})

/** Milliseconds once decoded. */
export const duration = field({
  expected: `a duration such as 200ms or 2s (units ${quantity.millisecondUnits.join(", ")})`,
  json: { type: "string", pattern: quantity.millisecondsPattern },
  read: quantity.milliseconds,
  meant: quantity.meantDuration
})
