/**
 * The gateway: OpenAI's HTTP and WebSocket protocols in front of the request actors, which it reaches over the bus alone.
 */
import { Effect, Scope } from "effect"
import { HttpMiddleware } from "effect/http"
import * as NodeHttpServer from "@effect/platform-node/NodeHttpServer"
import { createServer, type Server } from "node:http"
import { limits } from "../config/limits.ts"
import type { Bus } from "../actors/runtime/bus.ts"
import { Members } from "../actors/presence/members.ts"
import { Link } from "../actors/runtime/link.ts"
import { Admission } from "./admission.ts"
import type { GatewayContext, ServedModel } from "./call.ts"
import { shuttingDown } from "./errors.ts"
import { GatewayError } from "./gateway-error.ts"
import { isLoopback } from "./host.ts"
import { noKeys, readKeys, type Keys } from "./keys.ts"
import { app } from "./router.ts"
import { StoredResponses } from "./stored-responses.ts"
import { WebSockets } from "./upgrade.ts"

export { GatewayError } from "./gateway-error.ts"

export interface GatewayOptions {
  readonly bus: Bus
  readonly namespace: string
  /** Who serves; listened for here where nobody does so already. */
  readonly members?: Members
  readonly host: string
  /** 0 takes a free port. */
  readonly port: number
  /** Lines `tenant:hash` (keys.ts). Without it the gateway listens on this machine only. */
  readonly keysFile?: string
  readonly model: ServedModel
  readonly ready: () => { readonly ready: boolean; readonly reason?: string }
  /** For tests: other bounds than those of config/limits.ts. */
  readonly bounds?: Partial<Bounds>
}

interface Bounds {
  readonly keepAliveMs: number
  readonly stallMs: number
  readonly bodyBytes: number
  readonly requests: number
  readonly shutdownGraceMs: number
  readonly storedResponseMs: number
}

const defaultBounds: Bounds = {
  keepAliveMs: limits.clientKeepAliveMs,
  stallMs: limits.clientStallMs,
  bodyBytes: limits.bodyBytes,
  requests: limits.gatewayRequests,
  shutdownGraceMs: limits.shutdownGraceMs,
  storedResponseMs: limits.storedResponseMs,
}

/**
 * Listens until the scope closes; then accepts nothing more, gives open requests `shutdownGraceMs` to end, tells the rest
 * why, and closes their sockets. Fails with one sentence for the operator where it cannot listen.
 */
export const gateway = (options: GatewayOptions): Effect.Effect<{ readonly url: string; readonly port: number }, GatewayError, Scope.Scope> =>
  Effect.gen(function* () {
    const bounds = { ...defaultBounds, ...options.bounds }
    const context: GatewayContext = {
      link: new Link(options.bus, "gateway", 0), // several may serve at once, and none is an earlier one of another
      namespace: options.namespace,
      model: options.model,
      keys: yield* Effect.try({ try: () => keysFor(options), catch: (error) => error as GatewayError }),
      admission: new Admission(bounds.requests),
      stored: new StoredResponses(bounds.storedResponseMs),
      members: options.members ?? (yield* Members.listen(options.bus, options.namespace)),
      ready: options.ready,
      keepAliveMs: bounds.keepAliveMs,
      stallMs: bounds.stallMs,
      bodyBytes: bounds.bodyBytes,
    }
    const sweep = Effect.sync(() => context.stored.expire())
    yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(limits.storedResponseSweepMs), sweep)))
    const handling = yield* Scope.make() // of the handlers' fibers, which outlive the first steps of the shutdown
    const services = yield* Effect.context<never>()
    // Node's own server around effect's handler: effect's server keeps neither the codes of listen errors nor a way to
    // close sockets after a grace.
    const server = createServer({ keepAlive: true })
    server.maxConnections = 2 * limits.gatewayRequests + limits.webSockets
    const handler = yield* NodeHttpServer.makeHandler(app(context), { scope: handling }).pipe(
      Effect.provideService(HttpMiddleware.TracerDisabledWhen, () => true), // the root span is the router's
    )
    server.on("request", handler)
    const sockets = new WebSockets(context, services)
    sockets.listen(server)
    yield* Effect.acquireRelease(listen(server, options), (_, exit) =>
      Effect.andThen(
        Effect.promise(() => shutdown(server, sockets, context.admission, bounds.shutdownGraceMs)),
        Scope.close(handling, exit),
      ),
    )
    const address = server.address()
    const port = typeof address === "object" && address !== null ? address.port : options.port
    return { url: `http://${authority(options.host, port)}`, port }
  })

const authority = (host: string, port: number): string => (host.includes(":") && !host.startsWith("[") ? `[${host}]:${port}` : `${host}:${port}`)

const keysFor = ({ host, keysFile }: GatewayOptions): Keys => {
  if (keysFile !== undefined) return readKeys(keysFile)
  if (isLoopback(host)) return noKeys
  throw new GatewayError({ message: `without API keys the gateway listens on this machine only, and ${host} is reachable from others; give it a key file, or the host 127.0.0.1` })
}

const listenErrors: Readonly<Record<string, string>> = {
  EADDRINUSE: "the port is in use; choose another (0 takes a free one), or stop what uses it",
  EACCES: "that is not permitted; choose a port of 1024 or higher",
  EADDRNOTAVAIL: "this machine has no such address; choose 127.0.0.1 or one of its own",
  ENOTFOUND: "no address is known by that name; choose 127.0.0.1 or an address of this machine",
}

const listen = (server: Server, { host, port }: GatewayOptions): Effect.Effect<void, GatewayError> =>
  Effect.callback((resume) => {
    const onError = (error: NodeJS.ErrnoException) => {
      const code = error.code ?? error.message
      resume(Effect.fail(new GatewayError({ message: `cannot listen on ${authority(host, port)}: ${listenErrors[code] ?? code}` })))
    }
    server.once("error", onError)
    server.listen({ host: host.replace(/^\[|\]$/g, ""), port }, () => {
      server.off("error", onError)
      server.on("error", () => {}) // of single connections that could not be accepted
      resume(Effect.void)
    })
  })

const shutdown = async (server: Server, sockets: WebSockets, admission: Admission, graceMs: number): Promise<void> => {
  admission.close()
  const closed = new Promise<void>((resolve) => server.close(() => resolve()))
  await admission.idle(graceMs)
  admission.stopAll(shuttingDown)
  sockets.shutdown(shuttingDown)
  server.closeIdleConnections()
  await Promise.all([admission.idle(graceMs), sockets.closed(graceMs)]) // their last words are on their way
  sockets.terminate()
  server.closeAllConnections()
  await closed
}
