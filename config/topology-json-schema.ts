import { describeTopology, type Description } from "./describe-topology.ts"
import type { JsonSchema } from "./field.ts"

/** What an editor shows of a part. */
const shown = ({ description, expected, usable }: Description): string | undefined =>
  [description, expected === undefined ? "" : `Expected: ${expected}.`, usable === undefined ? "" : `For now use ${usable}.`].filter((text) => text !== "").join(" ") || undefined

const partsOf = (parts: Description["parts"]): JsonSchema => {
  switch (parts.kind) {
    case "mapping": {
      const required = parts.keys.filter(([, part]) => part.isRequired).map(([name]) => name)
      return {
        type: "object",
        additionalProperties: false,
        ...(required.length === 0 ? {} : { required }),
        properties: Object.fromEntries(parts.keys.map(([name, part]) => [name, schemaOf(part)])),
      }
    }
    case "list":
      return { type: "array", items: schemaOf(parts.item) }
    case "choice":
      return { anyOf: parts.forms.map(schemaOf) }
    case "value":
      return {}
  }
}

const schemaOf = (part: Description): JsonSchema => {
  const description = shown(part)
  return {
    ...(description === undefined ? {} : { description }),
    ...(part.fallback === undefined ? {} : { default: part.fallback }),
    ...part.json,
    ...partsOf(part.parts),
  }
}

/** The JSON Schema (draft-07, which editors know best) of a topology file, as text. */
export const topologyJsonSchema = (): string => `${JSON.stringify({ $schema: "http://json-schema.org/draft-07/schema#", title: "Penstock topology", ...schemaOf(describeTopology()) }, undefined, 2)}\n`
