/** What becomes of a request with an Upgrade header: a Responses WebSocket, a refusal, or a plain request after all. */
import { Context, Option, Tracer } from "effect"
import { Headers, HttpTraceContext } from "effect/http"
import { NodeWS } from "@effect/platform-node/NodeSocket"
import { STATUS_CODES, type IncomingMessage, type Server } from "node:http"
import type { Duplex } from "node:stream"
import { limits } from "../config/limits.ts"
import type { Fault } from "../actors/runtime/fault.ts"
import type { GatewayContext } from "./call.ts"
import { ApiError, asApiError, fromFault, internalError, reportDefect, shuttingDown } from "./errors.ts"
import { refuseForeignPage } from "./host.ts"
import { ResponsesSocket } from "./responses-socket.ts"
import { pathOf, requestIdOf, responsesPath } from "./router.ts"

/** The `ws` package itself, since effect's Socket shows neither its buffer (back-pressure) nor its close codes. */
export class WebSockets {
  readonly #current: () => GatewayContext
  readonly #services: Context.Context<never>
  readonly #server: NodeWS.WebSocketServer
  readonly #open = new Set<ResponsesSocket>()
  readonly #requestIds = new WeakMap<IncomingMessage, string>()

  constructor(current: () => GatewayContext, bodyBytes: number, services: Context.Context<never>) {
    this.#current = current
    this.#services = services
    this.#server = new NodeWS.WebSocketServer({ noServer: true, maxPayload: bodyBytes, perMessageDeflate: false })
    this.#server.on("headers", (headers, request) => headers.push(`x-request-id: ${this.#requestIds.get(request) ?? ""}`))
  }

  /** Handles the `upgrade` events of a server. */
  listen(server: Server): void {
    server.on("upgrade", (request: IncomingMessage, socket: Duplex, head: Buffer) => {
      if (request.headers.upgrade?.toLowerCase() !== "websocket") return ignoreUpgrade(server, request, socket, head)
      socket.on("error", () => {})
      const requestId = requestIdOf(one(request.headers["x-request-id"]))
      try {
        this.#accept(request, socket, head, requestId)
      } catch (error) {
        const expected = asApiError(error)
        if (expected === undefined) reportDefect(requestId, error)
        refuse(socket, expected ?? internalError, requestId)
      }
    })
  }

  /** Tells every client why, and begins to close. */
  shutdown(fault: Fault): void {
    for (const socket of this.#open) void socket.shutdown(fault)
  }

  /** Ends what has not closed by itself. */
  terminate(): void {
    for (const client of this.#server.clients) client.terminate()
  }

  /** Resolves once every socket is closed, or after `mostMs`. */
  async closed(mostMs: number): Promise<void> {
    const deadline = performance.now() + mostMs
    while (this.#open.size > 0 && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 5))
  }

  #accept(request: IncomingMessage, socket: Duplex, head: Buffer, requestId: string): void {
    const gateway = this.#current()
    if (gateway.admission.closing) throw fromFault(shuttingDown)
    const path = pathOf(request.url ?? "/")
    if (path !== responsesPath) throw new ApiError({ status: 404, type: "invalid_request_error", code: "not_found", message: `there is no WebSocket at ${path.slice(0, 200)}; the Responses protocol is at ${responsesPath}` })
    if (!gateway.keys.required) refuseForeignPage({ origin: request.headers.origin, host: request.headers.host })
    const tenant = gateway.keys.tenantOf(request.headers.authorization)
    if (this.#open.size >= limits.webSockets) {
      throw new ApiError({ status: 429, type: "rate_limit_error", code: "websocket_connection_limit_reached", message: `the server has ${this.#open.size} WebSocket connections, which is its limit` })
    }
    this.#requestIds.set(request, requestId)
    const parent = HttpTraceContext.fromHeaders(Headers.fromInput(request.headers as Record<string, string>))
    const services = Option.match(parent, { onNone: () => this.#services, onSome: (span) => Context.add(this.#services, Tracer.ParentSpan, span) })
    this.#server.handleUpgrade(request, socket, head, (client) => {
      const responses = new ResponsesSocket(this.#current, client, { tenant, requestId, services })
      this.#open.add(responses)
      client.on("close", () => this.#open.delete(responses))
    })
  }
}

const one = (header: string | ReadonlyArray<string> | undefined): string | undefined => (typeof header === "string" ? header : header?.[0])

const refuse = (socket: Duplex, error: ApiError, requestId: string): void => {
  const body = JSON.stringify(error.body)
  const headers = { "content-type": "application/json", "content-length": String(Buffer.byteLength(body)), connection: "close", "x-request-id": requestId, ...error.headers }
  const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`)
  socket.end(`HTTP/1.1 ${error.status} ${STATUS_CODES[error.status] ?? "Error"}\r\n${lines.join("")}\r\n${body}`)
}

/**
 * Some clients offer HTTP/2 (`Upgrade: h2c`, as curl --http2 and Java's do) on plain requests, which a server is free to
 * ignore. Node 20 hands any such request over once there is an upgrade listener, so it is put back without the offer.
 */
const ignoreUpgrade = (server: Server, request: IncomingMessage, socket: Duplex, head: Buffer): void => {
  const lines = [`${request.method} ${request.url} HTTP/${request.httpVersion}`]
  for (let index = 0; index < request.rawHeaders.length; index += 2) {
    const name = request.rawHeaders[index]!
    if (!/^(connection|upgrade|http2-settings)$/i.test(name)) lines.push(`${name}: ${request.rawHeaders[index + 1]}`)
  }
  socket.unshift(Buffer.concat([Buffer.from(`${lines.join("\r\n")}\r\n\r\n`, "latin1"), head]))
  server.emit("connection", socket)
}
