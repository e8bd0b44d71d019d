/** Which handler answers which request, and what holds for all of them: ids, keys, admission, errors, the root span. */
import { randomUUID } from "node:crypto"
import { Effect, Option } from "effect"
import * as NodeHttpServerRequest from "@effect/platform-node/NodeHttpServerRequest"
import { HttpServerRequest, HttpServerResponse, HttpTraceContext } from "effect/http"
import type { ServerResponse } from "node:http"
import { attributes, spans } from "../config/telemetry.ts"
import { actors } from "./actors-route.ts"
import { chatCompletions } from "./chat.ts"
import { attempt, json, type GatewayContext, type Handler } from "./call.ts"
import { completions } from "./completions.ts"
import { ApiError, asApiError, internalError, reportDefect, shuttingDown, fromFault } from "./errors.ts"
import { corsHeaders, preflightHeaders, refuseForeignPage } from "./host.ts"
import { deleteResponse, oneResponse, responses } from "./responses.ts"
import { drainWorker, getTopology, putTopology } from "./topology-route.ts"
import { detokenize, health, models, oneModel, ready, tokenize } from "./simple-routes.ts"

interface Route {
  readonly method: "GET" | "POST" | "PUT" | "DELETE"
  /** Ends with `/*` where the rest of the path is the handler's. */
  readonly path: string
  /** Answers without a key, and is not counted as an open request: for probes. */
  readonly open?: boolean
  readonly handler: Handler
}

const routes: ReadonlyArray<Route> = [
  { method: "GET", path: "/health", open: true, handler: health },
  { method: "GET", path: "/ready", open: true, handler: ready },
  { method: "GET", path: "/actors", handler: actors },
  { method: "GET", path: "/topology", handler: getTopology },
  { method: "PUT", path: "/topology", handler: putTopology },
  { method: "POST", path: "/topology/drain", handler: drainWorker },
  { method: "GET", path: "/v1/models", handler: models },
  { method: "GET", path: "/v1/models/*", handler: oneModel },
  { method: "POST", path: "/v1/chat/completions", handler: chatCompletions },
  { method: "POST", path: "/v1/completions", handler: completions },
  { method: "POST", path: "/v1/responses", handler: responses },
  { method: "GET", path: "/v1/responses/*", handler: oneResponse },
  { method: "DELETE", path: "/v1/responses/*", handler: deleteResponse },
  { method: "POST", path: "/tokenize", handler: tokenize },
  { method: "POST", path: "/detokenize", handler: detokenize },
]

export const responsesPath = "/v1/responses"

/** The client's own id where it is a sane one, so that its logs and ours can be joined. */
export const requestIdOf = (header: string | undefined): string =>
  header !== undefined && /^[\w.:-]{1,128}$/.test(header) ? header : `req_${randomUUID().replaceAll("-", "")}`

/** The path without query and trailing slash. */
export const pathOf = (url: string): string => {
  const path = url.split(/[?#]/, 1)[0]!
  return path.length > 1 && path.endsWith("/") ? path.slice(0, -1) : path
}

/** Answers every request, each as the gateway is when it comes; fails never. */
export const app = (current: () => GatewayContext): Effect.Effect<HttpServerResponse.HttpServerResponse, never, HttpServerRequest.HttpServerRequest> =>
  Effect.flatMap(HttpServerRequest.HttpServerRequest, (request) => {
    const gateway = current()
    const requestId = requestIdOf(request.headers["x-request-id"])
    // On Node's response itself, because streams of events are written to it directly.
    const response = NodeHttpServerRequest.toServerResponse(request) as ServerResponse
    for (const [name, value] of Object.entries(corsHeaders(request.headers["origin"], gateway.keys.required))) response.setHeader(name, value)
    return answer(gateway, request, requestId).pipe(
      Effect.catchDefect((defect) => {
        const expected = asApiError(defect) // a Fault thrown where nobody expected one is still a Fault
        if (expected === undefined) reportDefect(requestId, defect)
        return Effect.fail(expected ?? internalError)
      }),
      Effect.catch((error: ApiError) => Effect.succeed(json(error.status, error.body, error.headers))),
      // A client that takes nothing of the answer is closed; Node resets this with every byte taken, and for the next request.
      Effect.tap(() => Effect.sync(() => void response.setTimeout(gateway.stallMs))),
      Effect.map((answered) => HttpServerResponse.setHeaders(answered, { "x-request-id": requestId, ...(gateway.admission.closing ? { connection: "close" } : {}) })),
      Effect.interruptible, // by a client that goes away
    )
  })

const answer = (gateway: GatewayContext, request: HttpServerRequest.HttpServerRequest, requestId: string): Effect.Effect<HttpServerResponse.HttpServerResponse, ApiError> => {
  const path = pathOf(request.url)
  const matches = routes.flatMap((route) => {
    const rest = restOf(route.path, path)
    return rest === undefined ? [] : [{ route, rest }]
  })
  if (matches.length === 0) return Effect.fail(new ApiError({ status: 404, type: "invalid_request_error", code: "not_found", message: `there is nothing at ${path.slice(0, 200)}` }))
  const allowed = [...new Set(matches.flatMap(({ route }) => (route.method === "GET" ? ["GET", "HEAD"] : [route.method]))), "OPTIONS"].join(", ")
  if (request.method === "OPTIONS") return Effect.succeed(HttpServerResponse.empty({ status: 204, headers: { allow: allowed, ...preflightHeaders(request.headers, allowed, gateway.keys.required) } }))
  const method = request.method === "HEAD" ? "GET" : request.method
  const match = matches.find(({ route }) => route.method === method)
  if (match === undefined) {
    return Effect.fail(new ApiError({ status: 405, type: "invalid_request_error", code: "method_not_allowed", message: `${request.method} is not allowed at ${path.slice(0, 200)}; ${allowed} are`, headers: { allow: allowed } }))
  }
  const { route, rest } = match
  const call = { requestId, rest, request }
  if (route.open === true) return Effect.scoped(route.handler(gateway, { ...call, tenant: "default", onStop: () => {} }))
  const parent = Option.getOrUndefined(HttpTraceContext.fromHeaders(request.headers))
  return Effect.gen(function* () {
    const tenant = yield* attempt(() => {
      if (!gateway.keys.required) refuseForeignPage(request.headers)
      return gateway.keys.tenantOf(request.headers["authorization"])
    })
    if (gateway.admission.closing) return yield* Effect.fail(fromFault(shuttingDown))
    if (route.method === "GET") return yield* route.handler(gateway, { ...call, tenant, onStop: () => {} })
    const place = yield* Effect.acquireRelease(attempt(() => gateway.admission.enter()), ({ leave }) => Effect.sync(leave))
    yield* Effect.acquireRelease(Effect.sync(gateway.enter), (leave) => Effect.sync(leave))
    return yield* route.handler(gateway, { ...call, tenant, onStop: place.onStop })
  }).pipe(
    Effect.scoped,
    Effect.tap((response) => Effect.annotateCurrentSpan(attributes.httpStatus, response.status)),
    Effect.tapError((error) => Effect.annotateCurrentSpan(attributes.httpStatus, error.status)),
    Effect.withSpan(spans.gatewayRequest, { parent, kind: "server", attributes: { [attributes.requestId]: requestId, [attributes.httpRoute]: route.path } }),
  )
}

/** What is left of the path after the route's, or undefined where the route is another. */
const restOf = (route: string, path: string): string | undefined => {
  if (!route.endsWith("/*")) return route === path ? "" : undefined
  const prefix = route.slice(0, -1)
  if (!path.startsWith(prefix) || path.length === prefix.length) return undefined
  try {
    return decodeURIComponent(path.slice(prefix.length))
  } catch {
    return path.slice(prefix.length)
  }
}
