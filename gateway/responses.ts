/** /v1/responses: POST, plain and as server-sent events, and GET and DELETE of the responses that are kept. */
import { Effect } from "effect"
import { HttpServerResponse } from "effect/http"
import { limits } from "../config/limits.ts"
import { openBatch, streamBatch, type StreamFormat } from "./answer.ts"
import { attempt, json, readJson, type GatewayContext, type Handler } from "./call.ts"
import { ApiError, invalid, notSupported } from "./errors.ts"
import type { Batch } from "./generation.ts"
import { errorEvent, ResponseEvents, responseId } from "./responses-events.ts"
import { decodeResponses, responsesOrder, turnAfter } from "./responses-request.ts"
import { endConversations } from "./end-conversations.ts"
import { sseEvent } from "./sse.ts"

const keptFor = ({ stored }: GatewayContext): string => `a completed response is kept for ${stored.lifetimeMs / 60_000} minutes (a tenant's last ${limits.storedResponses} at most), and with store: false not at all`

export const previousNotFound = (gateway: GatewayContext, id: string) =>
  invalid("previous_response_id", `the response ${JSON.stringify(id.slice(0, 100))} is not known here: ${keptFor(gateway)}`, "previous_response_not_found")

export const responses: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  const id = responseId()
  const { body, order, earlier } = yield* attempt(() => {
    const body = decodeResponses(received)
    const previous = body.previous_response_id ?? undefined
    const earlier = previous === undefined ? undefined : gateway.stored.get(call.tenant, previous)
    if (previous !== undefined && earlier === undefined) throw previousNotFound(gateway, previous)
    return { body, earlier, order: responsesOrder(gateway, call, id, body, { earlier, isKept: body.store !== false }) }
  })
  const batch = yield* openBatch(gateway, call, id, [order])
  const events = new ResponseEvents({
    id,
    request: body,
    model: gateway.model.id,
    withLogprobs: order.logprobs !== undefined,
    ended: (ended) => {
      if (body.store !== false) gateway.stored.add(call.tenant, id, { ...turnAfter(gateway, id, earlier, body, ended), response: JSON.stringify(ended.response) })
    },
  })
  if (body.stream === true) return yield* streamBatch(gateway, call, batch, responsesStream(events))
  return json(200, yield* attempt(() => lastResponse(batch, events)))
})

const responseNotFound = (gateway: GatewayContext, id: string) =>
  new ApiError({ status: 404, type: "invalid_request_error", code: "response_not_found", message: `the response ${JSON.stringify(id.slice(0, 100))} is not known here: ${keptFor(gateway)}` })

export const oneResponse: Handler = (gateway, call) =>
  attempt(() => {
    if (/[?&]stream=true\b/.test(call.request.url)) throw notSupported("stream", "a kept response as a stream")
    const response = gateway.stored.get(call.tenant, call.rest)?.response
    if (response === undefined) throw responseNotFound(gateway, call.rest)
    return HttpServerResponse.text(response, { contentType: "application/json" })
  })

export const deleteResponse: Handler = (gateway, call) =>
  attempt(() => {
    const turn = gateway.stored.get(call.tenant, call.rest)
    if (turn === undefined) throw responseNotFound(gateway, call.rest)
    gateway.stored.delete(call.tenant, call.rest)
    endConversations(gateway, call.tenant, [turn.conversation])
    return json(200, { id: call.rest, object: "response", deleted: true })
  })

const lastResponse = async (batch: Batch, events: ResponseEvents): Promise<unknown> => {
  let response: unknown
  for (let item = await batch.next(); item !== undefined; item = await batch.next()) response = events.accept(item.event).at(-1)?.["response"] ?? response
  return response
}

const responsesStream = (events: ResponseEvents): StreamFormat => ({
  event: ({ event }) => events.accept(event).map((one) => sseEvent(one.type, one)).join(""),
  end: () => "",
  failure: (error) => (events.started ? sseEvent("response.failed", events.fail(error)) : "") + sseEvent("error", errorEvent(error, events.sequence)),
})
