/** The fields of the Responses API, over HTTP and WebSocket alike. */
import { Schema } from "effect"
import { limits } from "../config/limits.ts"
import type { ChatMessage, FinishReason } from "../actors/messages/request.ts"
import { checkModel, checkPromptBytes, messagesBytes, mostPromptBytes, type Call, type GatewayContext } from "./call.ts"
import { decoder, show } from "./decode.ts"
import { invalid, notSupported } from "./errors.ts"
import type { GenerateOrder } from "./generation.ts"
import { contentFields, formatField, messageContent, refuseFormat, refuseTools, toolFields } from "./messages.ts"
import { drawingOf } from "./sampling.ts"
import { flag, maxInt, modelField, optional, samplingFields, text, whole } from "./schemas.ts"
import type { Turn } from "./turns.ts"

const roles = ["system", "developer", "user", "assistant"] as const

const Item = Schema.Struct({
  type: optional("a string", Schema.String),
  role: Schema.optional(Schema.Literals(roles).annotate({ expected: `one of ${roles.join(", ")}` })),
  content: contentFields,
})

const ResponsesRequest = Schema.Struct({
  model: modelField,
  input: optional("a string or an array of messages", Schema.Union([Schema.String, Schema.Array(Item)])),
  instructions: text,
  max_output_tokens: whole(1, maxInt),
  metadata: optional("an object of strings", Schema.Record(Schema.String, Schema.String)),
  previous_response_id: text,
  /** Absent: true, as with OpenAI. */
  store: flag,
  top_logprobs: whole(0, limits.topLogprobs),
  include: optional("an array of strings", Schema.Array(Schema.String)),
  text: optional("an object", Schema.Struct({ format: formatField })),
  background: flag,
  conversation: optional("a string or an object", Schema.Unknown),
  prompt: optional("an object", Schema.Unknown),
  /** WebSocket only: false computes the prompt's KV and draws nothing. */
  generate: flag,
  ...samplingFields,
  ...toolFields,
})
export type ResponsesRequest = typeof ResponsesRequest.Type

/** Throws an ApiError 400. */
export const decodeResponses = decoder(ResponsesRequest)

const logprobsInclude = "message.output_text.logprobs"

/** The messages of `input`. */
export const inputMessages = (input: ResponsesRequest["input"]): ReadonlyArray<ChatMessage> => {
  if (input === undefined || input === null) throw invalid("input", "expected a string or an array of messages, found nothing")
  if (typeof input === "string") return [{ role: "user", content: input }]
  return input.map((item, index) => {
    const place = `input[${index}]`
    if (item.type !== undefined && item.type !== null && item.type !== "message") throw invalid(`${place}.type`, `expected "message" (this server takes text only), found ${show(item.type)}`)
    if (item.role === undefined) throw invalid(`${place}.role`, `expected one of ${roles.join(", ")}, found nothing`)
    if (item.content === undefined || item.content === null) throw invalid(`${place}.content`, "expected a string or an array of text parts, found nothing")
    return { role: item.role === "developer" ? "system" : item.role, content: messageContent(item.content, `${place}.content`, ["input_text", "output_text", "text"]) }
  })
}

const instructionsOf = ({ instructions }: ResponsesRequest): string | undefined => instructions ?? undefined

/** A conversation is named by its first response. */
export const conversationOf = (id: string, earlier: Turn | undefined): string => earlier?.conversation ?? id

/** What is asked for; `earlier` is the turn that it goes on from, `isKept` whether another can go on from it. Throws an ApiError 400 or 404. */
export const responsesOrder = (gateway: GatewayContext, call: Pick<Call, "tenant">, id: string, body: ResponsesRequest, { earlier, isKept }: { readonly earlier: Turn | undefined; readonly isKept: boolean }): GenerateOrder => {
  checkModel(gateway, body.model)
  refuseTools(body)
  refuseFormat("text.format", body.text?.format)
  refuseFormat("response_format", body.response_format)
  if (body.background === true) throw notSupported("background", "a response in the background")
  if (body.conversation !== undefined && body.conversation !== null) throw notSupported("conversation", "a stored conversation")
  if (body.prompt !== undefined && body.prompt !== null) throw notSupported("prompt", "a stored prompt")
  const instructions = instructionsOf(body)
  const system: ReadonlyArray<ChatMessage> = instructions === undefined ? [] : [{ role: "system", content: instructions }]
  const messages = [...system, ...(earlier?.messages ?? []), ...inputMessages(body.input)]
  if (messages.length === 0) throw invalid("input", "expected at least one message, found an empty array")
  checkPromptBytes(gateway, "input", messagesBytes(messages))
  const answered = earlier?.answered
  // Another model has other ids, and under other instructions it is another prompt from its beginning. Ids that do not fit the
  // message can be told from the text.
  const goesOn = answered !== undefined && answered.model === gateway.model.digest && answered.instructions === instructions && messagesBytes(messages) + answered.tokens.byteLength <= mostPromptBytes(gateway)
  return {
    requestId: id,
    tenant: call.tenant,
    prompt: { kind: "chat", messages, param: "input", ...(goesOn ? { continues: { tokens: answered.tokens, messages: system.length + answered.messages } } : {}) },
    choices: 1,
    ...drawingOf(body),
    maxTokens: body.generate === false ? 0 : (body.max_output_tokens ?? undefined),
    logprobs: (body.include ?? []).includes(logprobsInclude) ? (body.top_logprobs ?? 0) : undefined,
    promptLogprobs: false,
    conversation: isKept ? conversationOf(id, earlier) : undefined,
  }
}

/** The conversation once it is answered; the ids are those of the prompt and of the answer. */
export const turnAfter = (gateway: Pick<GatewayContext, "model">, id: string, earlier: Turn | undefined, body: ResponsesRequest, answer: { readonly text: string; readonly finish: FinishReason; readonly tokens: Uint8Array }): Turn => {
  const asked = [...(earlier?.messages ?? []), ...inputMessages(body.input)]
  const conversation = conversationOf(id, earlier)
  if (body.generate === false) return { conversation, messages: asked, answered: earlier?.answered }
  const messages = [...asked, { role: "assistant", content: answer.text }]
  // What a stop of the client's own has ended was drawn further than its text goes.
  const stops = (body.stop ?? []).length > 0 || (body.stop_token_ids ?? []).length > 0
  const answered = stops && answer.finish === "stop" ? earlier?.answered : { tokens: answer.tokens, model: gateway.model.digest, messages: messages.length, instructions: instructionsOf(body) }
  return { conversation, messages, answered }
}
