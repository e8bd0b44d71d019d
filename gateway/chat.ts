/** POST /v1/chat/completions. */
import { Effect, Schema } from "effect"
import { randomUUID } from "node:crypto"
import { limits } from "../config/limits.ts"
import type { ChatMessage, FinishReason, Usage } from "../actors/messages/request.ts"
import { unpackTokens } from "../actors/messages/tokens.ts"
import { addUsage, collect, noUsage, openBatch, streamBatch, usageBody, type Answer, type StreamFormat } from "./answer.ts"
import { attempt, checkModel, checkPromptBytes, json, messagesBytes, readJson, type Call, type GatewayContext, type Handler } from "./call.ts"
import { decoder } from "./decode.ts"
import { invalid } from "./errors.ts"
import type { BatchEvent, GenerateOrder } from "./generation.ts"
import { chatLogprobs } from "./logprobs.ts"
import { contentFields, messageContent, refuseTools, refuseFormat, toolFields } from "./messages.ts"
import { drawingOf } from "./sampling.ts"
import { choicesField, flag, maxInt, modelField, optional, samplingFields, streamOptionsField, text, whole } from "./schemas.ts"
import { sseData, sseDone } from "./sse.ts"

const roles = ["system", "developer", "user", "assistant", "tool"] as const

const Message = Schema.Struct({
  role: Schema.Literals(roles).annotate({ expected: `one of ${roles.join(", ")}` }),
  content: contentFields,
  name: text,
  tool_calls: optional("an array", Schema.Array(Schema.Unknown)),
})

const ChatRequest = Schema.Struct({
  model: modelField,
  messages: Schema.Array(Message).check(Schema.isMinLength(1, { expected: "an array of at least one message" })),
  max_tokens: whole(1, maxInt),
  max_completion_tokens: whole(1, maxInt),
  n: choicesField,
  logprobs: flag,
  top_logprobs: whole(0, limits.topLogprobs),
  stream_options: streamOptionsField,
  ...samplingFields,
  ...toolFields,
})
type ChatRequest = typeof ChatRequest.Type

const decodeChat = decoder(ChatRequest)

const messageOf = (message: ChatRequest["messages"][number], index: number): ChatMessage => {
  const place = `messages[${index}]`
  if ((message.tool_calls ?? []).length > 0) throw invalid(`${place}.tool_calls`, "tool calls are not supported yet", "unsupported_parameter")
  if (message.content === undefined || message.content === null) {
    if (message.role !== "assistant") throw invalid(`${place}.content`, `expected a string or an array of text parts, found ${message.content === null ? "null" : "nothing"}`)
  }
  return {
    role: message.role === "developer" ? "system" : message.role,
    content: messageContent(message.content, `${place}.content`, ["text"]),
    ...(typeof message.name === "string" ? { name: message.name } : {}),
  }
}

const orderOf = (gateway: GatewayContext, call: Call, id: string, body: ChatRequest): GenerateOrder => {
  checkModel(gateway, body.model)
  refuseTools(body)
  refuseFormat("response_format", body.response_format)
  if (body.stream_options !== undefined && body.stream_options !== null && body.stream !== true) throw invalid("stream_options", "only allowed when stream is true")
  if (typeof body.top_logprobs === "number" && body.logprobs !== true) throw invalid("top_logprobs", "only allowed when logprobs is true")
  const messages = body.messages.map(messageOf)
  checkPromptBytes(gateway, "messages", messagesBytes(messages))
  return {
    requestId: id,
    tenant: call.tenant,
    prompt: { kind: "chat", messages },
    choices: body.n ?? 1,
    ...drawingOf(body),
    maxTokens: body.max_completion_tokens ?? body.max_tokens ?? undefined,
    logprobs: body.logprobs === true ? (body.top_logprobs ?? 0) : undefined,
    promptLogprobs: false,
  }
}

export const chatCompletions: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  const id = `chatcmpl-${randomUUID().replaceAll("-", "")}`
  const { body, order } = yield* attempt(() => {
    const body = decodeChat(received)
    return { body, order: orderOf(gateway, call, id, body) }
  })
  const common: Common = { id, created: Math.floor(Date.now() / 1000), model: gateway.model.id }
  const batch = yield* openBatch(gateway, call, id, [order])
  if (body.stream === true) return yield* streamBatch(gateway, call, batch, chatStream(common, order.choices, body))
  const answer = yield* attempt(() => collect(batch, 1, order.choices))
  return json(200, chatBody(common, answer, body))
})

interface Common {
  readonly id: string
  readonly created: number
  readonly model: string
}

const chatBody = (common: Common, answer: Answer, body: ChatRequest) => {
  const withIds = body.return_token_ids === true
  const prompt = answer.prompts[0]
  return {
    ...common,
    object: "chat.completion",
    choices: answer.choices.map((choice, index) => ({
      index,
      message: { role: "assistant", content: choice.text, refusal: null },
      logprobs: body.logprobs === true ? { content: chatLogprobs(choice.logprobs), refusal: null } : null,
      finish_reason: choice.finish,
      ...(withIds ? { token_ids: choice.tokens } : {}),
    })),
    usage: usageBody(answer.usage),
    ...(withIds && prompt !== undefined ? { prompt_token_ids: [...unpackTokens(prompt.tokens, "prompt.tokens")] } : {}),
  }
}

const chatStream = (common: Common, choices: number, body: ChatRequest): StreamFormat => {
  const withUsage = body.stream_options?.include_usage === true
  const withIds = body.return_token_ids === true
  const finished = new Set<number>()
  let usage: Usage = noUsage
  const chunk = (choiceList: ReadonlyArray<unknown>, more: object = {}) =>
    sseData({ ...common, object: "chat.completion.chunk", choices: choiceList, ...(withUsage ? { usage: null } : {}), ...more })
  const choice = (index: number, delta: object, finish: FinishReason | null, more: object = {}) => ({ index, delta, logprobs: null, finish_reason: finish, ...more })
  return {
    event: ({ event }: BatchEvent): string => {
      if (event.type === "prompt") {
        const ids = withIds ? { prompt_token_ids: [...unpackTokens(event.tokens, "prompt.tokens")] } : {}
        let text = ""
        for (let index = 0; index < choices; index++) text += chunk([choice(index, { role: "assistant", content: "" }, null)], index === 0 ? ids : {})
        return text
      }
      if (event.type === "done") {
        usage = addUsage(usage, event.usage)
        return ""
      }
      if (event.type === "scores") return ""
      let text = ""
      const logprobs = body.logprobs === true && event.logprobs !== undefined && event.logprobs.length > 0 ? { logprobs: { content: chatLogprobs(event.logprobs), refusal: null } } : undefined
      const ids = withIds && event.tokens.length > 0 ? { token_ids: event.tokens } : undefined
      if (event.text !== "" || logprobs !== undefined || ids !== undefined) text += chunk([choice(event.choice, { content: event.text }, null, { ...logprobs, ...ids })])
      if (event.finish !== undefined && !finished.has(event.choice)) {
        finished.add(event.choice)
        text += chunk([choice(event.choice, {}, event.finish)])
      }
      return text
    },
    end: () => (withUsage ? sseData({ ...common, object: "chat.completion.chunk", choices: [], usage: usageBody(usage) }) : "") + sseDone,
    failure: (error) => sseData(error.body),
  }
}
