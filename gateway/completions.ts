/** POST /v1/completions: a prompt or a batch, as text or token ids, with echo and log probabilities. */
import { Effect, Schema } from "effect"
import { randomUUID } from "node:crypto"
import { limits } from "../config/limits.ts"
import { Detokenize, type Prompt, type Usage } from "../actors/messages/request.ts"
import { anyId, subject } from "../actors/messages/subjects.ts"
import { packTokens, unpackTokens } from "../actors/messages/tokens.ts"
import { addUsage, collect, noUsage, openBatch, streamBatch, usageBody, type Answer, type PromptEvent, type StreamFormat } from "./answer.ts"
import { attempt, checkModel, checkPromptBytes, json, readJson, type Call, type GatewayContext, type Handler } from "./call.ts"
import { decoder } from "./decode.ts"
import { fromFault, invalid, notSupported } from "./errors.ts"
import type { BatchEvent, GenerateOrder } from "./generation.ts"
import { CompletionLogprobsWriter } from "./logprobs.ts"
import { refuseFormat, toolFields } from "./messages.ts"
import { drawingOf } from "./sampling.ts"
import { choicesField, flag, maxInt, modelField, samplingFields, streamOptionsField, text, tokenId, whole } from "./schemas.ts"
import { sseData, sseDone } from "./sse.ts"

/** OpenAI's default for this endpoint. */
const defaultMaxTokens = 16

const CompletionRequest = Schema.Struct({
  model: modelField,
  prompt: Schema.Union([Schema.String, Schema.Array(Schema.String), Schema.Array(tokenId), Schema.Array(Schema.Array(tokenId))]).annotate({
    expected: "a string, an array of strings, an array of token ids or an array of those",
  }),
  max_tokens: whole(0, maxInt),
  n: choicesField,
  best_of: choicesField,
  logprobs: whole(0, limits.topLogprobs),
  echo: flag,
  suffix: text,
  stream_options: streamOptionsField,
  ...samplingFields,
  response_format: toolFields.response_format,
})
type CompletionRequest = typeof CompletionRequest.Type

const decodeCompletion = decoder(CompletionRequest)

const isArray = (value: unknown): value is ReadonlyArray<unknown> => Array.isArray(value)

/** Throws an ApiError 400. A single prompt is a batch of one. */
const promptsOf = (gateway: GatewayContext, prompt: CompletionRequest["prompt"]): ReadonlyArray<Prompt> => {
  if (isArray(prompt) && prompt.length === 0) throw invalid("prompt", "expected at least one prompt or token, found an empty array")
  const all: ReadonlyArray<string | ReadonlyArray<number>> =
    typeof prompt === "string" ? [prompt] : typeof prompt[0] === "number" ? [prompt as ReadonlyArray<number>] : (prompt as ReadonlyArray<string | ReadonlyArray<number>>)
  if (all.length > limits.promptBatch) throw invalid("prompt", `expected at most ${limits.promptBatch} prompts, found ${all.length}`)
  return all.map((one, index) => {
    const place = all.length === 1 ? "prompt" : `prompt[${index}]`
    if (typeof one !== "string" && one.length === 0) throw invalid(place, "expected at least one token id, found an empty array")
    checkPromptBytes(gateway, place, typeof one === "string" ? Buffer.byteLength(one) : one.length * 4)
    return typeof one === "string" ? { kind: "text", text: one } : { kind: "tokens", tokens: packTokens(one) }
  })
}

const ordersOf = (gateway: GatewayContext, call: Call, id: string, body: CompletionRequest): ReadonlyArray<GenerateOrder> => {
  checkModel(gateway, body.model)
  refuseFormat("response_format", body.response_format)
  if (typeof body.suffix === "string" && body.suffix !== "") throw notSupported("suffix", "filling in before a suffix")
  if (typeof body.best_of === "number" && body.best_of !== (body.n ?? 1)) throw invalid("best_of", "only the value of n is supported", "unsupported_parameter")
  if (body.stream_options !== undefined && body.stream_options !== null && body.stream !== true) throw invalid("stream_options", "only allowed when stream is true")
  const drawing = drawingOf(body)
  const logprobs = body.logprobs ?? undefined
  return promptsOf(gateway, body.prompt).map((prompt, index) => ({
    requestId: `${id}-${index}`,
    tenant: call.tenant,
    prompt,
    choices: body.n ?? 1,
    ...drawing,
    maxTokens: body.max_tokens ?? defaultMaxTokens,
    logprobs,
    promptLogprobs: body.echo === true && logprobs !== undefined,
  }))
}

/** The text of each prompt to echo, where the request actor does not send it (it does with log probabilities). */
const echoTexts = (gateway: GatewayContext, orders: ReadonlyArray<GenerateOrder>) =>
  Effect.forEach(orders, ({ prompt, promptLogprobs }) => {
    if (promptLogprobs || prompt.kind === "chat") return Effect.succeed(undefined)
    if (prompt.kind === "text") return Effect.succeed(prompt.text)
    const tokens = [...unpackTokens(prompt.tokens, "prompt")]
    return gateway.link.ask(Detokenize, subject(gateway.namespace, "request", anyId, Detokenize.verb), { tokens }, { hop: "request" }).pipe(Effect.mapBoth({ onSuccess: ({ content }) => content, onFailure: fromFault }))
  })

export const completions: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  const id = `cmpl-${randomUUID().replaceAll("-", "")}`
  const { body, orders } = yield* attempt(() => {
    const body = decodeCompletion(received)
    return { body, orders: ordersOf(gateway, call, id, body) }
  })
  const texts = body.echo === true ? yield* echoTexts(gateway, orders) : []
  const batch = yield* openBatch(gateway, call, id, orders)
  const format: Format = { common: { id, object: "text_completion", created: Math.floor(Date.now() / 1000), model: gateway.model.id }, body, texts, choices: body.n ?? 1 }
  if (body.stream === true) return yield* streamBatch(gateway, call, batch, completionStream(format))
  const answer = yield* attempt(() => collect(batch, orders.length, format.choices))
  return json(200, completionBody(format, answer))
})

interface Format {
  readonly common: { readonly id: string; readonly object: "text_completion"; readonly created: number; readonly model: string }
  readonly body: CompletionRequest
  readonly texts: ReadonlyArray<string | undefined> // [prompts], with echo
  readonly choices: number
}

const echoed = ({ body, texts }: Format, prompt: number, event: PromptEvent | undefined): string => (body.echo === true ? (texts[prompt] ?? event?.text ?? "") : "")

const promptIds = ({ body }: Format, event: PromptEvent | undefined) =>
  body.return_token_ids === true && event !== undefined ? { prompt_token_ids: [...unpackTokens(event.tokens, "prompt.tokens")] } : {}

const completionBody = (format: Format, answer: Answer) => ({
  ...format.common,
  choices: answer.choices.map((choice, index) => {
    const prompt = Math.floor(index / format.choices)
    const event = answer.prompts[prompt]
    const withLogprobs = typeof format.body.logprobs === "number"
    return {
      index,
      text: echoed(format, prompt, event) + choice.text,
      logprobs: withLogprobs ? new CompletionLogprobsWriter().write([...answer.scores[prompt]!, ...choice.logprobs]) : null,
      finish_reason: choice.finish,
      ...(format.body.return_token_ids === true ? { token_ids: choice.tokens } : {}),
      ...promptIds(format, event),
    }
  }),
  usage: usageBody(answer.usage),
})

const completionStream = (format: Format): StreamFormat => {
  const { common, body, choices } = format
  const withUsage = body.stream_options?.include_usage === true
  const withLogprobs = typeof body.logprobs === "number"
  const writers = new Map<number, CompletionLogprobsWriter>()
  const writerOf = (index: number): CompletionLogprobsWriter => {
    const writer = writers.get(index) ?? new CompletionLogprobsWriter()
    writers.set(index, writer)
    return writer
  }
  let usage: Usage = noUsage
  const chunk = (index: number, fields: object) => sseData({ ...common, choices: [{ index, text: "", logprobs: null, finish_reason: null, ...fields }], ...(withUsage ? { usage: null } : {}) })
  /** A chunk for each choice of a prompt. */
  const toAll = (prompt: number, fields: (index: number) => object) => Array.from({ length: choices }, (_, choice) => chunk(prompt * choices + choice, fields(prompt * choices + choice))).join("")
  return {
    event: ({ prompt, event }: BatchEvent): string => {
      if (event.type === "done") {
        usage = addUsage(usage, event.usage)
        return ""
      }
      if (event.type === "prompt") {
        return body.echo === true || body.return_token_ids === true ? toAll(prompt, () => ({ text: echoed(format, prompt, event), ...promptIds(format, event) })) : ""
      }
      if (event.type === "scores") return toAll(prompt, (index) => ({ logprobs: writerOf(index).write(event.logprobs) }))
      const index = prompt * choices + event.choice
      const logprobs = withLogprobs && event.logprobs !== undefined && event.logprobs.length > 0 ? writerOf(index).write(event.logprobs) : null
      const ids = body.return_token_ids === true && event.tokens.length > 0 ? { token_ids: event.tokens } : undefined
      if (event.text === "" && logprobs === null && ids === undefined && event.finish === undefined) return ""
      return chunk(index, { text: event.text, logprobs, finish_reason: event.finish ?? null, ...ids })
    },
    end: () => (withUsage ? sseData({ ...common, choices: [], usage: usageBody(usage) }) : "") + sseDone,
    failure: (error) => sseData(error.body),
  }
}
