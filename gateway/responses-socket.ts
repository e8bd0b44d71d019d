/**
 * One WebSocket connection of the Responses protocol: `response.create` messages in, the events of one response at a time
 * out. The generation is read no faster than the client takes its events, and cancelled when the client goes.
 */
import { Cause, Effect, Exit, type Context } from "effect"
import type { NodeWS } from "@effect/platform-node/NodeSocket"
import { limits } from "../config/limits.ts"
import { attributes, spans } from "../config/telemetry.ts"
import { Fault } from "../actors/runtime/fault.ts"
import { openBatch } from "./answer.ts"
import { attempt, parseJson, type GatewayContext } from "./call.ts"
import { asApiError, clientGone, fromFault, internalError, invalid, reportDefect } from "./errors.ts"
import type { Stop } from "./admission.ts"
import { endConversations } from "./end-conversations.ts"
import type { Batch } from "./generation.ts"
import { previousNotFound } from "./responses.ts"
import { errorEvent, ResponseEvents, responseId, type Ended, type ResponseEvent } from "./responses-events.ts"
import { responsesPath } from "./router.ts"
import { decodeResponses, responsesOrder, turnAfter, type ResponsesRequest } from "./responses-request.ts"
import { Turns, type Turn } from "./turns.ts"

export interface SocketPeer {
  readonly tenant: string
  readonly requestId: string
  /** The context to run in: tracer, and the span that the upgrade request named as its parent. */
  readonly services: Context.Context<never>
}

export class ResponsesSocket {
  readonly #current: () => GatewayContext
  readonly #socket: NodeWS.WebSocket
  readonly #peer: SocketPeer
  readonly #queue: Array<string> = []
  /** Its own last responses, those with store: false too. */
  readonly #turns = new Turns({ count: limits.webSocketTurns, bytes: limits.webSocketTurnBytes, lifetimeMs: Number.POSITIVE_INFINITY })
  /** Those that went on here, the latest last. */
  readonly #conversations = new Set<string>()
  readonly #deleted: () => void
  readonly #pings: NodeJS.Timeout
  #unanswered = 0 // pings since the client was last heard of
  #stop: Stop | undefined
  #busy = false
  #working: Promise<void> = Promise.resolve()
  #sent: Promise<void> = Promise.resolve()

  /** @param current the gateway as it is now: each response is made as it finds it */
  constructor(current: () => GatewayContext, socket: NodeWS.WebSocket, peer: SocketPeer) {
    this.#current = current
    const gateway = current()
    this.#socket = socket
    this.#peer = peer
    socket.on("message", (data, isBinary) => this.#receive(data as Buffer, isBinary))
    socket.on("pong", () => (this.#unanswered = 0))
    socket.on("error", () => {}) // a protocol error of the client's; "close" follows
    socket.on("close", () => this.#close())
    this.#deleted = gateway.stored.onDelete((id) => this.#turns.delete(id))
    this.#pings = setInterval(() => this.#ping(), gateway.keepAliveMs)
  }

  /** Tells the client why and closes: what runs has been stopped already, or is stopped here. */
  async shutdown(fault: Fault): Promise<void> {
    this.#queue.length = 0
    this.#stop?.(fault)
    await this.#working // the running response has its own last event
    void this.#send(errorEvent(fromFault(fault)))
    this.#socket.close(1001, fault.message.slice(0, 100))
  }

  #receive(data: Buffer, isBinary: boolean): void {
    this.#unanswered = 0
    if (isBinary) return void this.#send(errorEvent(invalid(undefined, "expected JSON in a text message, found a binary one")))
    const waitingBytes = this.#queue.reduce((sum, { length }) => sum + length, 0)
    if (this.#queue.length >= limits.webSocketQueue || (waitingBytes > 0 && waitingBytes + data.byteLength > this.#current().bodyBytes)) {
      return void this.#send(errorEvent(fromFault(new Fault({ code: "overloaded", message: `${this.#queue.length} responses wait on this connection already`, hop: "gateway" }))))
    }
    this.#queue.push(data.toString("utf8"))
    if (!this.#busy) this.#working = this.#work()
  }

  async #work(): Promise<void> {
    this.#busy = true
    for (let next = this.#queue.shift(); next !== undefined; next = this.#queue.shift()) {
      if (this.#socket.readyState === this.#socket.OPEN) await this.#respond(next)
    }
    this.#busy = false
  }

  async #respond(text: string): Promise<void> {
    const run = Effect.scoped(this.#create(text)).pipe(Effect.withSpan(spans.gatewayRequest, { kind: "server", attributes: { [attributes.requestId]: this.#peer.requestId, [attributes.httpRoute]: responsesPath, [attributes.requestStream]: true } }))
    const exit = await Effect.runPromiseExitWith(this.#peer.services)(run)
    if (Exit.isSuccess(exit)) return
    const error = Cause.squash(exit.cause)
    const expected = asApiError(error)
    if (expected === undefined) reportDefect(this.#peer.requestId, error)
    await this.#send(errorEvent(expected ?? internalError))
  }

  /** Fails before the first event only; a later failure is the response's own last event. */
  #create = Effect.fnUntraced(function* (this: ResponsesSocket, text: string) {
    const gateway = this.#current()
    const id = responseId()
    const place = yield* Effect.acquireRelease(attempt(() => gateway.admission.enter()), ({ leave }) => Effect.sync(leave))
    yield* Effect.acquireRelease(Effect.sync(gateway.enter), (leave) => Effect.sync(leave))
    const { body, order, earlier } = yield* attempt(() => {
      const message = parseJson(text)
      const type = typeof message === "object" && message !== null && "type" in message ? message.type : undefined
      if (type !== "response.create") throw invalid("type", 'expected "response.create"')
      const body = decodeResponses(message)
      const earlier = this.#earlier(body.previous_response_id ?? undefined)
      return { body, earlier, order: responsesOrder(gateway, this.#peer, id, body, { earlier, isKept: true }) }
    })
    const onStop = (stop: Stop) => {
      this.#stop = stop
      place.onStop(stop)
    }
    const batch = yield* openBatch(gateway, { onStop }, id, [order])
    if (this.#socket.readyState !== this.#socket.OPEN) batch.stop(clientGone)
    const events = new ResponseEvents({ id, request: body, model: gateway.model.id, withLogprobs: order.logprobs !== undefined, ended: (ended) => this.#keep(gateway, id, earlier, body, ended) })
    yield* attempt(() => this.#stream(batch, events))
  })

  #earlier(previous: string | undefined): Turn | undefined {
    if (previous === undefined) return undefined
    const gateway = this.#current()
    const turn = this.#turns.get(previous) ?? gateway.stored.get(this.#peer.tenant, previous)
    if (turn === undefined) throw previousNotFound(gateway, previous)
    return turn
  }

  #keep(gateway: GatewayContext, id: string, earlier: Turn | undefined, body: ResponsesRequest, ended: Ended): void {
    const turn = turnAfter(gateway, id, earlier, body, ended)
    this.#goesOn(turn.conversation)
    this.#turns.add(id, turn)
    if (body.store !== false) gateway.stored.add(this.#peer.tenant, id, { ...turn, response: JSON.stringify(ended.response) })
  }

  #goesOn(conversation: string): void {
    this.#conversations.delete(conversation)
    const { value: oldest } = this.#conversations.size < limits.webSocketTurns ? { value: undefined } : this.#conversations.values().next()
    this.#conversations.add(conversation)
    if (oldest === undefined) return
    this.#conversations.delete(oldest)
    endConversations(this.#current(), this.#peer.tenant, [oldest])
  }

  async #stream(batch: Batch, events: ResponseEvents): Promise<void> {
    try {
      for (let item = await batch.next(); item !== undefined; item = await batch.next()) {
        if (this.#socket.readyState !== this.#socket.OPEN) throw clientGone // "close" comes only once the peer has answered
        for (const event of events.accept(item.event)) void this.#send(event)
        if (this.#socket.bufferedAmount > limits.webSocketBufferBytes) {
          await this.#sent
          this.#unanswered = 0 // slow is not silent: its pong waits behind all this
        }
      }
    } catch (error) {
      const expected = asApiError(error)
      if (!events.started || expected === undefined) throw error
      void this.#send(events.fail(expected))
    } finally {
      this.#stop = undefined
    }
  }

  /** Resolves when the message has left the process, or never can. */
  #send(event: ResponseEvent): Promise<void> {
    if (this.#socket.readyState !== this.#socket.OPEN) return this.#sent
    this.#sent = new Promise((resolve) => this.#socket.send(JSON.stringify(event), () => resolve()))
    return this.#sent
  }

  #ping(): void {
    // Pings are counted, not time: while this process itself stood still, nobody could be heard.
    const { keepAliveMs, stallMs } = this.#current()
    if (this.#unanswered * keepAliveMs > stallMs) return this.#socket.terminate()
    this.#unanswered++
    if (this.#socket.readyState === this.#socket.OPEN) this.#socket.ping()
  }

  #close(): void {
    clearInterval(this.#pings)
    this.#deleted()
    endConversations(this.#current(), this.#peer.tenant, this.#conversations)
    this.#queue.length = 0
    this.#stop?.(clientGone)
  }
}
