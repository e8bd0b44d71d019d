/** What every handler works with: the gateway as it was configured, and one call on it. */
import { ByteSize, Effect } from "effect"
import { HttpIncomingMessage, HttpServerResponse, type HttpServerRequest } from "effect/http"
import type { Scope } from "effect/Scope"
import { limits } from "../config/limits.ts"
import type { PresenceMessage } from "../actors/messages/presence.ts"
import type { Link } from "../actors/runtime/link.ts"
import type { Admission, Stop } from "./admission.ts"
import { ApiError, asApiError, invalid, modelNotFound } from "./errors.ts"
import type { Keys } from "./keys.ts"
import type { TopologyAccess } from "./topology-access.ts"
import type { StoredResponses } from "./stored-responses.ts"

export interface ServedModel {
  readonly id: string
  /** Other names it answers to. */
  readonly aliases?: ReadonlyArray<string>
  readonly created: number
  readonly ownedBy: string
  readonly contextLength: number
  /** Digest of its file: token ids mean the same as long as it does. */
  readonly digest: string
}

/** A generation as its clients see it. */
export interface Served {
  readonly id: string
  /** Where its actors speak. */
  readonly namespace: string
  readonly model: ServedModel
}

/** Who serves in one generation. */
export interface ServingMembers {
  readonly generation: string
  readonly members: ReadonlyArray<PresenceMessage>
}

/** The gateway as one request finds it, and keeps it: later ones may go to another generation. */
export interface GatewayContext extends Omit<Served, "id"> {
  readonly generation: string
  readonly link: Link
  /** Counts a request of this generation, until the returned function is called. */
  readonly enter: () => () => void
  readonly keys: Keys
  readonly admission: Admission
  readonly stored: StoredResponses
  readonly members: () => ReadonlyArray<ServingMembers>
  readonly ready: () => { readonly ready: boolean; readonly reason?: string }
  /** Where the topology can be read and changed. */
  readonly topology: TopologyAccess | undefined
  readonly keepAliveMs: number
  readonly stallMs: number
  readonly bodyBytes: number
}

export interface Call {
  readonly requestId: string
  readonly tenant: string
  /** What the path holds after the route's own, percent-decoded. */
  readonly rest: string
  readonly onStop: (stop: Stop) => void
  readonly request: HttpServerRequest.HttpServerRequest
}

export type Handler = (gateway: GatewayContext, call: Call) => Effect.Effect<HttpServerResponse.HttpServerResponse, ApiError, Scope>

/** Runs plain code: what it throws on purpose becomes the failure, anything else a defect. */
export const attempt = <A>(run: () => Promise<A> | A): Effect.Effect<A, ApiError> =>
  Effect.tryPromise({ try: async () => run(), catch: (error) => error }).pipe(
    Effect.catch((error) => {
      const expected = asApiError(error)
      return expected === undefined ? Effect.die(error) : Effect.fail(expected)
    }),
  )

/** The body, whatever its content type says. */
export const readText = (gateway: GatewayContext, call: Call): Effect.Effect<string, ApiError> => {
  if (Number(call.request.headers["content-length"]) > gateway.bodyBytes) return Effect.fail(tooLarge(gateway.bodyBytes))
  return call.request.text.pipe(
    Effect.provideService(HttpIncomingMessage.MaxBodySize, ByteSize.bytes(gateway.bodyBytes)),
    Effect.mapError((error) => (error.reason._tag === "RequestParseError" && error.reason.reason === "BodyTooLarge" ? tooLarge(gateway.bodyBytes) : invalid(undefined, "the body could not be read to its end"))),
  )
}

/** The body as JSON. */
export const readJson = (gateway: GatewayContext, call: Call): Effect.Effect<unknown, ApiError> => Effect.flatMap(readText(gateway, call), (text) => attempt(() => parseJson(text)))

/** Throws an ApiError 400 with the parser's reason, which has the position where the parser knows it. */
export const parseJson = (text: string): unknown => {
  try {
    return JSON.parse(text)
  } catch (error) {
    throw invalid(undefined, text.trim() === "" ? "the body is empty; a JSON object is expected" : `the body is not JSON: ${(error as SyntaxError).message.slice(0, 200)}`, "invalid_json")
  }
}

const tooLarge = (most: number): ApiError =>
  new ApiError({ status: 413, type: "invalid_request_error", code: "request_too_large", message: `the body is larger than ${most} bytes, which is the limit` })

export const json = (status: number, body: unknown, headers: Readonly<Record<string, string>> = {}): HttpServerResponse.HttpServerResponse =>
  HttpServerResponse.text(JSON.stringify(body), { status, headers, contentType: "application/json" })

/** Throws where the request names another model. */
export const checkModel = (gateway: GatewayContext, model: string): void => {
  if (model !== gateway.model.id && gateway.model.aliases?.includes(model) !== true) throw modelNotFound(model, gateway.model.id)
}

/** Bytes of messages on the bus. */
export const messagesBytes = (messages: ReadonlyArray<{ readonly role: string; readonly content: string; readonly name?: string }>): number =>
  messages.reduce((bytes, { role, content, name }) => bytes + Buffer.byteLength(content) + Buffer.byteLength(role) + Buffer.byteLength(name ?? "") + limits.messageOverheadBytes, 0)

/** Bytes of a prompt that cross the bus in one message. */
export const mostPromptBytes = (gateway: GatewayContext): number => Math.min(gateway.link.bus.maxPayloadBytes, limits.maxPayloadBytes) - 64 * 1024 // the rest of the message

/** Throws where a prompt cannot cross the bus in one message: it is far beyond any context then. */
export const checkPromptBytes = (gateway: GatewayContext, param: string, bytes: number): void => {
  const most = mostPromptBytes(gateway)
  if (bytes > most) throw invalid(param, `${bytes} bytes are more than one request may hold (${most})`, "context_length_exceeded")
}
