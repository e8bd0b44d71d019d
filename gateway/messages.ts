/** Text content, tools and formats: what chat and Responses have in common. */
import { Schema } from "effect"
import { show } from "./decode.ts"
import { invalid, notSupported } from "./errors.ts"
import { flag, optional } from "./schemas.ts"

const Part = Schema.Struct({ type: Schema.String.annotate({ expected: "the type of the part (a string)" }), text: Schema.optional(Schema.Unknown) })

export const contentFields = optional("a string or an array of text parts", Schema.Union([Schema.String, Schema.Array(Part)]))
type Content = string | ReadonlyArray<typeof Part.Type> | null | undefined

/** The text of a message's content; several parts are set apart by line ends. Throws an ApiError for parts that are no text. */
export const messageContent = (content: Content, place: string, textTypes: ReadonlyArray<string>): string => {
  if (content === undefined || content === null) return ""
  if (typeof content === "string") return content
  return content
    .map((part, index) => {
      if (!textTypes.includes(part.type)) throw invalid(`${place}[${index}].type`, `expected ${textTypes.map(show).join(" or ")} (this server takes text only), found ${show(part.type)}`)
      if (typeof part.text !== "string") throw invalid(`${place}[${index}].text`, `expected a string, found ${show(part.text)}`)
      return part.text
    })
    .join("\n")
}

const list = optional("an array", Schema.Array(Schema.Unknown))
const Named = Schema.Struct({ type: Schema.String.annotate({ expected: "a string" }) })
export const formatField = optional("an object with a type", Named)

/** Fields whose meaning is not built yet, so that a request which needs them is refused and not misunderstood. */
export const toolFields = {
  tools: list,
  tool_choice: optional("a string or an object", Schema.Union([Schema.String, Named])),
  parallel_tool_calls: flag,
  functions: list,
  modalities: optional("an array of strings", Schema.Array(Schema.String)),
  response_format: formatField,
} as const

export const refuseTools = (body: {
  readonly tools?: ReadonlyArray<unknown> | null
  readonly tool_choice?: string | object | null
  readonly functions?: ReadonlyArray<unknown> | null
  readonly modalities?: ReadonlyArray<string> | null
}): void => {
  const choice = body.tool_choice ?? "auto"
  if ((body.tools ?? []).length > 0 && choice !== "none") throw notSupported("tools", "calling tools")
  if (choice !== "none" && choice !== "auto") throw notSupported("tool_choice", "calling tools")
  if ((body.functions ?? []).length > 0) throw notSupported("functions", "calling functions")
  if ((body.modalities ?? []).some((modality) => modality !== "text")) throw notSupported("modalities", "output other than text")
}

export const refuseFormat = (param: string, format: { readonly type: string } | null | undefined): void => {
  if (format === undefined || format === null || format.type === "text") return
  if (format.type === "json_object" || format.type === "json_schema") throw notSupported(param, `the format ${format.type}`)
  throw invalid(`${param}.type`, `expected "text", found ${show(format.type)}`)
}
