/**
 * The gateway: OpenAI's HTTP and WebSocket protocols in front of the request actors, which it reaches over the bus alone. It
 * lives through every change of the topology: new requests go to the generation that it was switched to last, and those that
 * run stay with theirs.
 */
import { Effect, Exit, Scope } from "effect"
import { HttpMiddleware } from "effect/http"
import * as NodeHttpServer from "@effect/platform-node/NodeHttpServer"
import { limits } from "../config/limits.ts"
import type { Bus } from "../actors/runtime/bus.ts"
import { Fault } from "../actors/runtime/fault.ts"
import { Link } from "../actors/runtime/link.ts"
import { Admission } from "./admission.ts"
import type { GatewayContext, Served } from "./call.ts"
import { shuttingDown } from "./errors.ts"
import { GatewayError } from "./gateway-error.ts"
import { isLoopback } from "./host.ts"
import { noKeys, readKeys, type Keys } from "./keys.ts"
import { authority, Listener, type Address } from "./listener.ts"
import { app } from "./router.ts"
import { StoredResponses } from "./stored-responses.ts"
import { WebSockets } from "./upgrade.ts"

export { GatewayError } from "./gateway-error.ts"

export interface GatewayOptions {
  readonly bus: Bus
  /** Who serves, by generation. */
  readonly members: GatewayContext["members"]
  readonly ready: GatewayContext["ready"]
  /** Where the topology can be read and changed over HTTP. */
  readonly topology?: GatewayContext["topology"]
  /** For tests: other bounds than those of config/limits.ts. */
  readonly bounds?: Partial<Bounds> | undefined
}

export interface ListenOptions extends Address {
  /** Lines `tenant:hash` (keys.ts). Without it the gateway listens on this machine only. */
  readonly keysFile?: string | undefined
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

export class Gateway {
  readonly #options: GatewayOptions
  readonly #bounds: Bounds
  readonly #link: Link
  readonly #admission: Admission
  readonly #stored: StoredResponses
  readonly #handling: Scope.Closeable // of the handlers' fibers, which outlive the first steps of the shutdown
  readonly #sockets: WebSockets
  readonly #listener: Listener
  readonly #running = new Map<string, number>() // requests by generation
  readonly #idle = new Map<string, Set<() => void>>()
  #keys: Keys = noKeys
  #served: Served | undefined
  #context: GatewayContext | undefined

  private constructor(options: GatewayOptions, handling: Scope.Closeable, parts: (gateway: Gateway) => { readonly sockets: WebSockets; readonly listener: Listener }) {
    this.#options = options
    this.#bounds = { ...defaultBounds, ...options.bounds }
    this.#link = new Link(options.bus, "gateway", 0) // several may serve at once, and none is an earlier one of another
    this.#admission = new Admission(this.#bounds.requests)
    this.#stored = new StoredResponses(this.#bounds.storedResponseMs)
    this.#handling = handling
    const { sockets, listener } = parts(this)
    this.#sockets = sockets
    this.#listener = listener
  }

  /** Serves nothing yet: it is switched to a generation first, and then listens. `close` ends it. */
  static readonly make = (options: GatewayOptions): Effect.Effect<Gateway, never, Scope.Scope> =>
    Effect.gen(function* () {
      const handling = yield* Scope.make()
      const services = yield* Effect.context<never>()
      let gateway: Gateway | undefined
      const current = () => gateway!.context
      const request = yield* NodeHttpServer.makeHandler(app(current), { scope: handling }).pipe(
        Effect.provideService(HttpMiddleware.TracerDisabledWhen, () => true), // the root span is the router's
      )
      gateway = new Gateway(options, handling, (made) => {
        const sockets = new WebSockets(current, made.#bounds.bodyBytes, services)
        return { sockets, listener: new Listener({ request, upgrade: (server) => sockets.listen(server) }) }
      })
      const stored = gateway.#stored
      yield* Effect.forkScoped(Effect.forever(Effect.andThen(Effect.sleep(limits.storedResponseSweepMs), Effect.sync(() => stored.expire()))))
      return gateway
    })

  /** As a request finds it that comes now. */
  get context(): GatewayContext {
    if (this.#context === undefined) throw new Fault({ code: "unavailable", message: "gateway: nothing is served yet", hop: "gateway" })
    return this.#context
  }

  /** The address of its front door, once it listens. */
  get address(): { readonly url: string; readonly port: number } | undefined {
    const { address } = this.#listener
    return address === undefined ? undefined : { url: `http://${authority(address)}`, port: address.port }
  }

  /** Sends new requests to this generation. */
  switchTo(served: Served): void {
    this.#served = served
    this.#refresh()
  }

  /**
   * Listens there, and at the earlier address no more. Fails with one sentence for the operator, and without a change, where it
   * cannot.
   */
  listen(at: ListenOptions): Effect.Effect<void, GatewayError> {
    return Effect.gen({ self: this }, function* () {
      const keys = yield* Effect.try({ try: () => keysFor(at), catch: (error) => error as GatewayError })
      yield* this.#listener.listen(at)
      this.#keys = keys
      this.#refresh()
    })
  }

  /** Those that requests go to, or run in. */
  get generations(): ReadonlyArray<string> {
    return [...new Set([...(this.#served === undefined ? [] : [this.#served.id]), ...this.#running.keys()])]
  }

  /** Resolves when no request runs in a generation. */
  untilIdle(generation: string): Effect.Effect<void> {
    return Effect.callback((resume) => {
      if (!this.#running.has(generation)) return resume(Effect.void)
      const done = () => resume(Effect.void)
      const waiting = this.#idle.get(generation) ?? new Set()
      this.#idle.set(generation, waiting.add(done))
      return Effect.sync(() => void waiting.delete(done))
    })
  }

  /** Lets no request in any more; returns when the last one has ended. */
  leave(): Effect.Effect<void> {
    return Effect.promise(() => {
      this.#admission.close()
      return this.#admission.idle(limits.requestDeadlineMs)
    })
  }

  /** Accepts nothing more, gives open requests `shutdownGraceMs` to end, tells the rest why, and closes their sockets. */
  close(): Effect.Effect<void> {
    return Effect.andThen(Effect.promise(() => this.#shutdown(this.#bounds.shutdownGraceMs)), Effect.suspend(() => Scope.close(this.#handling, Exit.void)))
  }

  #refresh(): void {
    const served = this.#served
    if (served === undefined) return
    const { id, namespace, model } = served
    const { keepAliveMs, stallMs, bodyBytes } = this.#bounds
    const { members, ready, topology } = this.#options
    this.#context = { generation: id, link: this.#link, namespace, model, enter: () => this.#enter(id), keys: this.#keys, admission: this.#admission, stored: this.#stored, members, ready, topology, keepAliveMs, stallMs, bodyBytes }
  }

  #enter(generation: string): () => void {
    this.#running.set(generation, (this.#running.get(generation) ?? 0) + 1)
    return () => {
      const left = this.#running.get(generation)! - 1
      if (left > 0) return void this.#running.set(generation, left)
      this.#running.delete(generation)
      const waiting = this.#idle.get(generation) ?? []
      this.#idle.delete(generation)
      for (const done of waiting) done()
    }
  }

  async #shutdown(graceMs: number): Promise<void> {
    const [admission, sockets, listener] = [this.#admission, this.#sockets, this.#listener]
    admission.close()
    const closed = listener.close()
    await admission.idle(graceMs)
    admission.stopAll(shuttingDown)
    sockets.shutdown(shuttingDown)
    listener.closeIdle()
    await Promise.all([admission.idle(graceMs), sockets.closed(graceMs)]) // their last words are on their way
    sockets.terminate()
    listener.closeAll()
    await closed
  }
}

const keysFor = ({ host, keysFile }: ListenOptions): Keys => {
  if (keysFile !== undefined) return readKeys(keysFile)
  if (isLoopback(host)) return noKeys
  throw new GatewayError({ message: `without API keys the gateway listens on this machine only, and ${host} is reachable from others; give it a key file, or the host 127.0.0.1` })
}
