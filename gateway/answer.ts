/** From a request's orders to what its client gets: all at once, or as server-sent events. */
import { Effect } from "effect"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { HttpServerResponse } from "effect/http"
import type { Scope } from "effect/Scope"
import type { ServerResponse } from "node:http"
import { limits } from "../config/limits.ts"
import { attributes } from "../config/telemetry.ts"
import { Generate, type FinishReason, type GenerateEvent, type TokenLogprob, type Usage } from "../actors/messages/request.ts"
import { anyId, subject } from "../actors/messages/subjects.ts"
import { attempt, type Call, type GatewayContext } from "./call.ts"
import { ApiError, asApiError, clientGone, internalError, reportDefect } from "./errors.ts"
import { Batch, Generation, type BatchEvent, type GenerateOrder, type OpenGenerate } from "./generation.ts"
import { SseWriter } from "./sse.ts"
import { requestAttributes, responseAttributes } from "./trace.ts"

/** Opens a generation for each order of the answer `id`; they are cancelled when the scope closes, whatever closes it. */
export const openBatch = (gateway: GatewayContext, call: Pick<Call, "onStop">, id: string, orders: ReadonlyArray<GenerateOrder>): Effect.Effect<Batch, ApiError, Scope> =>
  Effect.flatMap(Effect.context<never>(), (context) => {
    const to = subject(gateway.namespace, "request", anyId, Generate.verb)
    const open: OpenGenerate = (message, deadlineMs) => Effect.runSyncWith(context)(gateway.link.open(Generate, to, message, { hop: "request", deadlineMs }))
    return Effect.acquireRelease(
      attempt(() => {
        const batch = new Batch(orders.map((order) => new Generation(open, order, limits.requestDeadlineMs)))
        call.onStop((fault) => batch.stop(fault))
        return batch
      }),
      (batch) => Effect.andThen(Effect.sync(() => batch.stop(clientGone)), Effect.suspend(() => Effect.annotateCurrentSpan(responseAttributes(batch)))),
    ).pipe(Effect.tap(() => Effect.annotateCurrentSpan(requestAttributes(gateway.model.id, id, orders))))
  })

export interface Choice {
  text: string
  readonly tokens: Array<number>
  readonly logprobs: Array<TokenLogprob>
  finish: FinishReason
}

export type PromptEvent = Extract<GenerateEvent, { type: "prompt" }>

export interface Answer {
  readonly prompts: ReadonlyArray<PromptEvent | undefined>
  /** Log probabilities of each prompt's tokens, where asked for. */
  readonly scores: ReadonlyArray<ReadonlyArray<TokenLogprob>>
  /** Prompt-major: the choices of the first prompt come first. */
  readonly choices: ReadonlyArray<Choice>
  readonly usage: Usage
}

export const noUsage: Usage = { promptTokens: 0, completionTokens: 0, cachedTokens: 0 }

export const addUsage = (a: Usage, b: Usage): Usage => ({
  promptTokens: a.promptTokens + b.promptTokens,
  completionTokens: a.completionTokens + b.completionTokens,
  cachedTokens: a.cachedTokens + b.cachedTokens,
})

/** Reads a batch to its end. */
export const collect = async (batch: Batch, prompts: number, choices: number): Promise<Answer> => {
  const seen: Array<PromptEvent | undefined> = Array.from({ length: prompts }, () => undefined)
  const all: Array<Choice> = Array.from({ length: prompts * choices }, () => ({ text: "", tokens: [], logprobs: [], finish: "length" }))
  const scores = Array.from({ length: prompts }, (): Array<TokenLogprob> => [])
  let usage = noUsage
  for (let item = await batch.next(); item !== undefined; item = await batch.next()) {
    const { prompt, event } = item
    if (event.type === "prompt") seen[prompt] = event
    else if (event.type === "scores") scores[prompt]!.push(...event.logprobs)
    else if (event.type === "done") usage = addUsage(usage, event.usage)
    else {
      const choice = all[prompt * choices + event.choice]!
      choice.text += event.text
      choice.tokens.push(...event.tokens)
      if (event.logprobs !== undefined) choice.logprobs.push(...event.logprobs)
      if (event.finish !== undefined) choice.finish = event.finish
    }
  }
  return { prompts: seen, scores, choices: all, usage }
}

/** How an endpoint writes a stream. Each function returns whole events, or nothing. */
export interface StreamFormat {
  event(item: BatchEvent): string
  end(): string
  failure(error: ApiError): string
}

/**
 * Streams a batch to the client, reading it no faster than the client does. A failure before the first byte is the
 * effect's; a later one is written into the stream, which then ends.
 */
export const streamBatch = (gateway: GatewayContext, call: Call, batch: Batch, format: StreamFormat): Effect.Effect<HttpServerResponse.HttpServerResponse, ApiError> =>
  Effect.andThen(Effect.annotateCurrentSpan(attributes.requestStream, true), attempt(async () => {
    // The server is HTTP/1.1 only (gateway.ts).
    const response = NodeHttpServerRequest.toServerResponse(call.request) as ServerResponse
    const sse = new SseWriter(response, { headers: { "x-request-id": call.requestId }, keepAliveMs: gateway.keepAliveMs, stallMs: gateway.stallMs })
    try {
      for (let item = await batch.next(); item !== undefined; item = await batch.next()) {
        if (sse.closed) throw clientGone
        const text = format.event(item)
        const slow = text === "" ? undefined : sse.write(text)
        if (slow !== undefined) await slow
      }
      void sse.write(format.end())
    } catch (error) {
      if (!sse.opened) {
        sse.abandon()
        throw error
      }
      const expected = asApiError(error)
      if (expected === undefined) reportDefect(call.requestId, error)
      void sse.write(format.failure(expected ?? internalError))
    }
    sse.end()
    return HttpServerResponse.empty() // the response has been written and ended already
  }))

export const usageBody = (usage: Usage) => ({
  prompt_tokens: usage.promptTokens,
  completion_tokens: usage.completionTokens,
  total_tokens: usage.promptTokens + usage.completionTokens,
  prompt_tokens_details: { cached_tokens: usage.cachedTokens },
})
