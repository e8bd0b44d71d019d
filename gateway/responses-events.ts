/**
 * The events of one response in the order of OpenAI's Responses API, from the events of a generation: the same for
 * server-sent events and WebSocket, and with their last one the plain answer.
 */
import { randomUUID } from "node:crypto"
import type { FinishReason, GenerateEvent, TokenLogprob, Usage } from "../actors/messages/request.ts"
import { packTokens } from "../actors/messages/tokens.ts"
import { noUsage } from "./answer.ts"
import type { ApiError } from "./errors.ts"
import { chatLogprobs } from "./logprobs.ts"
import type { ResponsesRequest } from "./responses-request.ts"

export interface ResponseEvent {
  readonly type: string
  readonly sequence_number: number
  readonly [field: string]: unknown
}

type Status = "in_progress" | "completed" | "incomplete" | "failed"

export const responseId = (): string => `resp_${randomUUID().replaceAll("-", "")}`

/** A response that has come to its end. */
export interface Ended {
  readonly response: object
  readonly text: string
  readonly finish: FinishReason
  /** Of the prompt and the answer. */
  readonly tokens: Uint8Array // int32 little-endian
}

export interface ResponseOptions {
  readonly id: string
  readonly request: ResponsesRequest
  readonly model: string
  readonly withLogprobs: boolean
  /** Called before the last event goes out, so that whoever has seen that can go on from it. */
  readonly ended: (ended: Ended) => void
}

export class ResponseEvents {
  readonly #id: string
  readonly #itemId = `msg_${randomUUID().replaceAll("-", "")}`
  readonly #created = Math.floor(Date.now() / 1000)
  readonly #request: ResponsesRequest
  readonly #model: string
  readonly #withLogprobs: boolean
  readonly #ended: (ended: Ended) => void
  readonly #logprobs: Array<TokenLogprob> = []
  #sequence = 0
  #text = ""
  #prompt: Uint8Array = new Uint8Array(0)
  #tokens: Array<number> = []
  #finish: FinishReason = "length"
  #usage: Usage = noUsage
  #started = false

  constructor({ id, request, model, withLogprobs, ended }: ResponseOptions) {
    this.#id = id
    this.#request = request
    this.#model = model
    this.#withLogprobs = withLogprobs
    this.#ended = ended
  }

  get started(): boolean {
    return this.#started
  }

  get sequence(): number {
    return this.#sequence
  }

  /** The events that one event of the generation gives rise to. */
  accept(event: GenerateEvent): ReadonlyArray<ResponseEvent> {
    switch (event.type) {
      case "prompt":
        this.#prompt = event.tokens
        return this.#start()
      case "scores":
        return []
      case "delta":
        return [...this.#start(), ...this.#delta(event)]
      case "done":
        this.#usage = event.usage
        return this.#end()
    }
  }

  /** The last event of a response that fails once it has begun. */
  fail(error: ApiError): ResponseEvent {
    const code = error.status === 429 ? "rate_limit_exceeded" : error.status === 400 ? "invalid_prompt" : "server_error"
    return this.#event("response.failed", { response: this.response("failed", { error: { code, message: error.message } }) })
  }

  /** The response object as of now. */
  response(status: Status, more: object = {}): object {
    const request = this.#request
    return {
      id: this.#id,
      object: "response",
      created_at: this.#created,
      status,
      background: false,
      completed_at: status === "completed" ? Math.floor(Date.now() / 1000) : null,
      error: null,
      incomplete_details: status === "incomplete" ? { reason: "max_output_tokens" } : null,
      instructions: request.instructions ?? null,
      max_output_tokens: request.max_output_tokens ?? null,
      metadata: request.metadata ?? {},
      model: this.#model,
      output: status === "in_progress" || request.generate === false ? [] : [this.#item(status === "completed" ? "completed" : "incomplete")],
      parallel_tool_calls: true,
      previous_response_id: request.previous_response_id ?? null,
      store: request.store !== false,
      temperature: request.temperature ?? 1,
      text: { format: { type: "text" } },
      tool_choice: "auto",
      tools: [],
      top_logprobs: request.top_logprobs ?? 0,
      top_p: request.top_p ?? 1,
      truncation: "disabled",
      usage: status === "in_progress" ? null : this.#usageBody(),
      user: request.user ?? null,
      ...more,
    }
  }

  #start(): ReadonlyArray<ResponseEvent> {
    if (this.#started) return []
    this.#started = true
    const response = this.response("in_progress")
    const events = [this.#event("response.created", { response }), this.#event("response.in_progress", { response })]
    if (this.#request.generate === false) return events
    const item = { ...this.#item("in_progress"), content: [] }
    return [...events, this.#event("response.output_item.added", { output_index: 0, item }), this.#event("response.content_part.added", { ...this.#place(), part: this.#part() })]
  }

  #delta(event: Extract<GenerateEvent, { type: "delta" }>): ReadonlyArray<ResponseEvent> {
    if (event.finish !== undefined) this.#finish = event.finish
    const withIds = this.#request.return_token_ids === true
    this.#tokens.push(...event.tokens)
    this.#text += event.text
    const logprobs = this.#withLogprobs ? (event.logprobs ?? []) : []
    this.#logprobs.push(...logprobs)
    if (event.text === "" && logprobs.length === 0 && !(withIds && event.tokens.length > 0)) return []
    const ids = withIds ? { token_ids: event.tokens } : {}
    return [this.#event("response.output_text.delta", { ...this.#place(), delta: event.text, logprobs: chatLogprobs(logprobs), ...ids })]
  }

  #end(): ReadonlyArray<ResponseEvent> {
    const warmed = this.#request.generate === false
    const status = warmed || this.#finish === "stop" ? "completed" : "incomplete"
    const response = this.response(status)
    const tokens = Buffer.concat([this.#prompt, packTokens(this.#tokens)])
    this.#ended({ response, text: this.#text, finish: this.#finish, tokens })
    if (warmed) return [...this.#start(), this.#event("response.completed", { response })]
    return [
      ...this.#start(),
      this.#event("response.output_text.done", { ...this.#place(), text: this.#text, logprobs: chatLogprobs(this.#logprobs) }),
      this.#event("response.content_part.done", { ...this.#place(), part: this.#part() }),
      this.#event("response.output_item.done", { output_index: 0, item: this.#item(status) }),
      this.#event(`response.${status}`, { response }),
    ]
  }

  #event(type: string, fields: object): ResponseEvent {
    return { type, sequence_number: this.#sequence++, ...fields }
  }

  #place() {
    return { item_id: this.#itemId, output_index: 0, content_index: 0 }
  }

  #part() {
    return { type: "output_text", text: this.#text, annotations: [], logprobs: chatLogprobs(this.#logprobs) }
  }

  #item(status: "in_progress" | "completed" | "incomplete") {
    const ids = this.#request.return_token_ids === true ? { token_ids: [...this.#tokens] } : {}
    return { id: this.#itemId, type: "message", role: "assistant", status, content: [this.#part()], ...ids }
  }

  #usageBody() {
    const { promptTokens, completionTokens, cachedTokens } = this.#usage
    return {
      input_tokens: promptTokens,
      input_tokens_details: { cached_tokens: cachedTokens },
      output_tokens: completionTokens,
      output_tokens_details: { reasoning_tokens: 0 },
      total_tokens: promptTokens + completionTokens,
    }
  }
}

/** The event for a failure that belongs to no response, or ends a stream: flat for the official client, nested for others. */
export const errorEvent = (error: ApiError, sequence = 0): ResponseEvent => {
  const { message, param, code } = error.body.error
  return { type: "error", sequence_number: sequence, status: error.status, code, message, param, error: error.body.error }
}
