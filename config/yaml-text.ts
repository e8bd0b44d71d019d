import { isMap, isNode, isPair, isScalar, isSeq, LineCounter, parseDocument, visit, type Document, type YAMLParseError } from "yaml"
import type { Path } from "./problem.ts"

/** Something wrong at a place of a text. */
export interface Flaw {
  readonly offset: number
  readonly message: string
}

/** A text of YAML 1.2, read into a value whose parts can be found again in it. */
export interface YamlText {
  readonly value: unknown
  /** What is wrong with it as YAML; nothing can be said of the value then. */
  readonly flaws: ReadonlyArray<Flaw>
  lineOf(offset: number): number
  /** Offset of the value (or of its key) at a path, or of the nearest enclosing one that is written. */
  offsetOf(path: Path, atKey: boolean): number
}

/** What the parser says, in words for who writes the file; `end` is the length of what is written in it. */
const explain = (error: YAMLParseError, end: number): string => {
  switch (error.code) {
    case "MULTIPLE_DOCS":
      return "a second document begins here (---); a file holds one"
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

/** Keys that a mapping has twice. The parser's own check compares each with each, which takes seconds where there are thousands. */
const duplicateKeys = (document: Document.Parsed, lineOf: (offset: number) => number): ReadonlyArray<Flaw> => {
  const flaws: Array<Flaw> = []
  visit(document, {
    Map: (_, { items }) => {
      const first = new Map<string, number>()
      for (const { key } of items) {
        if (!isScalar(key)) continue
        const [name, offset] = [String(key.value), key.range?.[0] ?? 0]
        const firstOffset = first.get(name)
        if (firstOffset === undefined) first.set(name, offset)
        else flaws.push({ offset, message: `the key ${name} is given twice, first in line ${lineOf(firstOffset)}; write it once` })
      }
    },
  })
  return flaws
}

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

/** Reads a text of YAML; it does not throw. */
export const readYaml = (text: string): YamlText => {
  const lines = new LineCounter()
  const document = parseDocument(text, { lineCounter: lines, prettyErrors: false, uniqueKeys: false, logLevel: "error" })
  const lineOf = (offset: number) => Math.max(1, lines.linePos(offset).line)
  const read = (value: unknown, flaws: ReadonlyArray<Flaw>): YamlText => ({ value, flaws, lineOf, offsetOf: (path, atKey) => offsetAt(document, path, atKey) })
  const end = text.trimEnd().length
  if (document.errors.length > 0) return read(undefined, document.errors.map((error) => ({ offset: error.pos[0], message: explain(error, end) })))
  try {
    const duplicates = duplicateKeys(document, lineOf)
    return read(duplicates.length > 0 ? undefined : document.toJS({ maxAliasCount: 100 }), duplicates)
  } catch (error) {
    return read(undefined, [{ offset: 0, message: `not valid YAML: ${error instanceof Error ? error.message : String(error)}` }])
  }
}
