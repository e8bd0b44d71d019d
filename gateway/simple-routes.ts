/** The routes that answer at once: health, readiness, models, and text to tokens and back. */
import { Effect, Schema } from "effect"
import { limits } from "../config/limits.ts"
import { Detokenize, Tokenize } from "../actors/messages/request.ts"
import { anyId, subject } from "../actors/messages/subjects.ts"
import { unpackTokens } from "../actors/messages/tokens.ts"
import type { MessageType } from "../actors/runtime/codec.ts"
import { attempt, checkModel, checkPromptBytes, json, readJson, type GatewayContext, type Handler } from "./call.ts"
import { decoder } from "./decode.ts"
import { fromFault, invalid } from "./errors.ts"
import { tokenId } from "./schemas.ts"

/** Alive: says nothing about whether requests can be served. */
export const health: Handler = () => Effect.succeed(json(200, { status: "ok" }))

export const ready: Handler = (gateway) =>
  Effect.sync(() => {
    const state = gateway.admission.closing ? { ready: false, reason: "shutting down" } : gateway.ready()
    return json(state.ready ? 200 : 503, state)
  })

const modelBody = ({ model }: GatewayContext) => ({ id: model.id, object: "model", created: model.created, owned_by: model.ownedBy, max_model_len: model.contextLength })

export const models: Handler = (gateway) => Effect.succeed(json(200, { object: "list", data: [modelBody(gateway)] }))

export const oneModel: Handler = (gateway, call) =>
  Effect.map(attempt(() => checkModel(gateway, call.rest)), () => json(200, modelBody(gateway)))

const ask = <A, R>(gateway: GatewayContext, type: MessageType<A, R, "ask">, message: A) =>
  Effect.mapError(gateway.link.ask(type, subject(gateway.namespace, "request", anyId, type.verb), message, { hop: "request" }), fromFault)

const decodeTokenize = decoder(Schema.Struct({ content: Schema.String.annotate({ expected: "a string" }) }))
const decodeDetokenize = decoder(Schema.Struct({ tokens: Schema.Array(tokenId).annotate({ expected: "an array of token ids" }) }))

export const tokenize: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  const { content } = yield* attempt(() => {
    const body = decodeTokenize(received)
    const bytes = Buffer.byteLength(body.content)
    if (bytes > limits.tokenizeBytes) throw invalid("content", `${bytes} bytes are more than the ${limits.tokenizeBytes} that are tokenised at once`)
    return body
  })
  const { tokens } = yield* ask(gateway, Tokenize, { content })
  return json(200, { tokens: [...unpackTokens(tokens, "tokens")] })
})

export const detokenize: Handler = Effect.fnUntraced(function* (gateway, call) {
  const received = yield* readJson(gateway, call)
  const { tokens } = yield* attempt(() => {
    const body = decodeDetokenize(received)
    checkPromptBytes(gateway, "tokens", body.tokens.length * 5) // an id is at most 5 bytes on the wire
    return body
  })
  return json(200, yield* ask(gateway, Detokenize, { tokens }))
})
