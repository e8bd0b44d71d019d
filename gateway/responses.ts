/** POST /v1/responses, plain and as server-sent events. Nothing is stored: a conversation goes on by its input, or on a WebSocket. */
import { Effect } from "effect"
import { openBatch, streamBatch, type StreamFormat } from "./answer.ts"
import { attempt, json, readJson, type Handler } from "./call.ts"
import { invalid } from "./errors.ts"
import type { Batch } from "./generation.ts"
import { errorEvent, ResponseEvents, responseId } from "./responses-events.ts"
import { decodeResponses, responsesOrder } from "./responses-request.ts"
import { sseEvent } from "./sse.ts"

export const previousNotFound = (id: string, why: string) => invalid("previous_response_id", `the response ${JSON.stringify(id.slice(0, 100))} is not known here: ${why}`, "previous_response_not_found")

export const responses: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  const id = responseId()
  const { body, order } = yield* attempt(() => {
    const body = decodeResponses(received)
    if (typeof body.previous_response_id === "string") throw previousNotFound(body.previous_response_id, "over HTTP no responses are kept; send the conversation as input, or use the WebSocket")
    return { body, order: responsesOrder(gateway, call, id, body, []) }
  })
  const batch = yield* openBatch(gateway, call, id, [order])
  const events = new ResponseEvents(id, body, gateway.model.id, order.logprobs !== undefined)
  if (body.stream === true) return yield* streamBatch(gateway, call, batch, responsesStream(events))
  return json(200, yield* attempt(() => lastResponse(batch, events)))
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
