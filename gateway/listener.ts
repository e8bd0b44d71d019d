/**
 * Where the gateway listens: one address at a time, and another one when the topology says so, without dropping a socket.
 */
import { Effect } from "effect"
import { createServer, type RequestListener, type Server } from "node:http"
import { limits } from "../config/limits.ts"
import { GatewayError } from "./gateway-error.ts"

export interface Address {
  readonly host: string
  /** 0 takes a free port. */
  readonly port: number
}

export const authority = ({ host, port }: Address): string => (host.includes(":") && !host.startsWith("[") ? `[${host}]:${port}` : `${host}:${port}`)

const listenErrors: Readonly<Record<string, string>> = {
  EADDRINUSE: "the port is in use; choose another (0 takes a free one), or stop what uses it",
  EACCES: "that is not permitted; choose a port of 1024 or higher",
  EADDRNOTAVAIL: "this machine has no such address; choose 127.0.0.1 or one of its own",
  ENOTFOUND: "no address is known by that name; choose 127.0.0.1 or an address of this machine",
}

export interface Handlers {
  readonly request: RequestListener
  /** Takes the `upgrade` events of a server. */
  readonly upgrade: (server: Server) => void
}

export class Listener {
  readonly #handlers: Handlers
  readonly #servers = new Set<Server>()
  #current: { readonly server: Server; readonly asked: Address } | undefined

  constructor(handlers: Handlers) {
    this.#handlers = handlers
  }

  /** The address that is listened at. */
  get address(): Address | undefined {
    const { server, asked } = this.#current ?? {}
    const bound = server?.address()
    if (asked === undefined) return undefined
    return { host: asked.host, port: typeof bound === "object" && bound !== null ? bound.port : asked.port }
  }

  /** Listens there, and then no more at the old address, whose open connections go on. Fails without a change. */
  listen(asked: Address): Effect.Effect<void, GatewayError> {
    return Effect.gen({ self: this }, function* () {
      const before = this.#current
      if (before?.asked.host === asked.host && before.asked.port === asked.port) return
      // Of two addresses with the same port one may hold the other.
      const first = before !== undefined && asked.port !== 0 && this.address?.port === asked.port
      if (first) before.server.close()
      const server = yield* this.#bind(asked).pipe(
        Effect.tapError(() => (first ? Effect.ignore(Effect.map(this.#bind(before.asked), (again) => void (this.#current = { server: again, asked: before.asked }))) : Effect.void)),
      )
      this.#current = { server, asked }
      if (before !== undefined && !first) before.server.close()
    })
  }

  /** Accepts nothing more; resolves when the last connection has ended. */
  close(): Promise<void> {
    this.#current = undefined
    return Promise.all(Array.from(this.#servers, (server) => new Promise((resolve) => server.close(resolve)))).then(() => {})
  }

  closeIdle(): void {
    for (const server of this.#servers) server.closeIdleConnections()
  }

  closeAll(): void {
    for (const server of this.#servers) server.closeAllConnections()
  }

  // Node's own server around effect's handler: effect's server keeps neither the codes of listen errors nor a way to
  // close sockets after a grace.
  #bind(asked: Address): Effect.Effect<Server, GatewayError> {
    return Effect.callback((resume) => {
      const server = createServer({ keepAlive: true }, this.#handlers.request)
      server.maxConnections = 2 * limits.gatewayRequests + limits.webSockets
      this.#handlers.upgrade(server)
      const onError = (error: NodeJS.ErrnoException) => {
        const code = error.code ?? error.message
        resume(Effect.fail(new GatewayError({ message: `cannot listen on ${authority(asked)}: ${listenErrors[code] ?? code}` })))
      }
      server.once("error", onError)
      server.listen({ host: asked.host.replace(/^\[|\]$/g, ""), port: asked.port }, () => {
        server.off("error", onError)
        server.on("error", () => {}) // of single connections that could not be accepted
        this.#servers.add(server)
        server.once("close", () => this.#servers.delete(server))
        resume(Effect.succeed(server))
      })
    })
  }
}
