/**
 * The bus between processes, over NATS. What the client leaves open is closed here: what cannot be sent is refused instead
 * of lost, what waits to be sent is bounded, and a connection that was lost is told to whoever waits for an answer.
 */
import { randomBytes } from "node:crypto"
import { PermissionViolationError, type Msg, type NatsConnection } from "@nats-io/transport-node"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import { header, type Bus, type Buses, type Delivery, type PublishOptions, type Subscription } from "./bus.ts"
import { Fault, type FaultCode } from "./fault.ts"
import { Inboxes } from "./inboxes.ts"
import { Backoff, connectNats, NatsConnectError } from "./nats-connect.ts"
import { bytesOf, encodeHeaders, hop, messageBytes, refusal, withDelivery } from "./nats-message.ts"

export interface NatsBusOptions extends NatsAddress {
  /** Shown in the server's monitoring. */
  readonly name: string
  /** Where answers come in: `inboxPrefix` of actors/messages/subjects.ts. */
  readonly inboxPrefix: string
}

const noBytes = new Uint8Array(0)
const remedy = "`penstock nats-permissions` prints what each kind of process needs"
const notAllowed = `the NATS server does not allow this process to; ${remedy}`
const literalSubject = /^[^\s.*>]+(\.[^\s.*>]+)*$/

export class NatsBus implements Bus {
  readonly name = "nats"
  readonly #connection: NatsConnection
  readonly #backoff: Backoff
  readonly #inboxPrefix: string
  readonly #inboxes = new Inboxes()
  readonly #disconnectHandlers = new Set<() => void>()
  readonly #reconnectHandlers = new Set<() => void>()
  #inboxCount = 0
  #maxPayloadBytes: number
  #state: "connected" | "disconnected" | "closed" = "connected"
  #closing: Promise<void> | undefined
  #refusedInbox: Error | undefined
  #lastComplaint = ""
  /** What the server has refused to take from this process, the newest last. */
  readonly #refused = new Set<string>()
  /** Bytes published that the server has not confirmed to have read, and those of them that it was not asked about yet. */
  #pendingBytes = 0
  #unaskedBytes = 0
  #losses = 0

  private constructor(connection: NatsConnection, backoff: Backoff, inboxPrefix: string) {
    this.#connection = connection
    this.#backoff = backoff
    // Two connections of one process, or two lives of it, must not get each other's answers.
    this.#inboxPrefix = `${inboxPrefix}.${randomBytes(6).toString("hex")}`
    this.#maxPayloadBytes = connection.info?.max_payload ?? limits.maxPayloadBytes
    this.subscribeBelow(this.#inboxPrefix, (delivery) => this.#receive(delivery), (error) => (this.#refusedInbox = error))
    void this.#watch()
    // The client gives up by itself only by a defect; then nobody should wait for it.
    void connection.closed().then(() => this.close())
  }

  /**
   * Connects to a server; from then on a lost connection is made again, for as long as it takes.
   * @throws NatsConnectError: one sentence with what to do
   */
  static async connect(options: NatsBusOptions): Promise<NatsBus> {
    const backoff = new Backoff()
    const bus = new NatsBus(await connectNats(options, options.name, backoff), backoff, options.inboxPrefix)
    // By the answer the server has taken the subscription, or refused it.
    await bus.#connection.flush().catch(() => {})
    if (bus.#refusedInbox === undefined) return bus
    await bus.close()
    throw new NatsConnectError(`${options.name}: the server grants no answers to this process: let its user subscribe to ${options.inboxPrefix}.>`)
  }

  /** Of the server, headers included. */
  get maxPayloadBytes(): number {
    return (this.#maxPayloadBytes = this.#connection.info?.max_payload ?? this.#maxPayloadBytes)
  }

  get connected(): boolean {
    return this.#state === "connected" && this.#connection.info !== undefined
  }

  publish(subject: string, data: Uint8Array, options: PublishOptions = {}): void {
    const { headers, reply } = options
    if (this.#state === "closed") throw refusal("unavailable", subject, "the bus is closed")
    if (!literalSubject.test(subject) || (reply !== undefined && !literalSubject.test(reply))) throw refusal("invalid_request", subject, "is no subject to publish to")
    const bytes = data.byteLength + bytesOf(subject, headers)
    if (bytes > this.maxPayloadBytes) throw refusal("invalid_request", subject, `${bytes} bytes are over the bus's limit of ${this.maxPayloadBytes}`)
    // The client would take it, and forget it when it connects again.
    if (!this.connected) throw refusal("disconnected", subject, "there is no connection to the NATS server")
    // The server drops it, and who waits for an answer would wait for his deadline.
    if (this.#refused.size > 0 && this.#refused.has(subject)) throw refusal("unavailable", subject, notAllowed)
    const cost = bytes + messageBytes + subject.length + (reply?.length ?? 0)
    if (this.#pendingBytes + cost > limits.busPendingBytes) throw refusal("overloaded", subject, `${this.#pendingBytes} bytes wait for the NATS server already`)
    try {
      this.#connection.publish(subject, data, { reply, headers: headers === undefined ? undefined : encodeHeaders(headers) })
    } catch (error) {
      throw refusal("unavailable", subject, error instanceof Error ? error.message : String(error))
    }
    this.#pendingBytes += cost
    this.#unaskedBytes += cost
    if (this.#unaskedBytes >= limits.busConfirmBytes) this.#askHowFar()
  }

  subscribe(subject: string, handler: (delivery: Delivery) => void, options: { readonly queue?: string } = {}): Subscription {
    const { queue } = options
    const refused = (code: FaultCode, why: string) => new Fault({ code, message: `subscribe to ${subject}: ${why}`, hop })
    if (this.#state === "closed") throw refused("unavailable", "the bus is closed")
    if (!literalSubject.test(subject) || (queue !== undefined && /^$|\s/.test(queue))) throw refused("invalid_request", "is no subject, or its queue no name")
    if (subject.startsWith(`${this.#inboxPrefix}.`)) return this.#inboxes.subscribe(subject, handler, queue)
    // Without a connection the client keeps the subscription, and makes it when there is one.
    const callback = (error: Error | null, message: Msg) => {
      if (error === null) withDelivery(message, handler)
    }
    try {
      const subscription = this.#connection.subscribe(subject, queue === undefined ? { callback } : { callback, queue })
      return given(subscription)
    } catch (error) {
      throw refused("unavailable", error instanceof Error ? error.message : String(error))
    }
  }

  /** Receives what is sent to any subject that begins with `prefix` and a point. */
  subscribeBelow(prefix: string, handler: (delivery: Delivery) => void, refused: (error: Error) => void = () => {}): Subscription {
    const callback = (error: Error | null, message: Msg) => (error === null ? withDelivery(message, handler) : refused(error))
    return given(this.#connection.subscribe(`${prefix}.>`, { callback }))
  }

  /** Resolves when the server has taken all that was published and subscribed before. Rejects with a Fault when it cannot. */
  async flush(): Promise<void> {
    try {
      if (!this.connected) throw new Error("there is no connection to the NATS server")
      await this.#connection.flush()
    } catch (error) {
      throw new Fault({ code: "disconnected", message: `flush: ${error instanceof Error ? error.message : String(error)}`, hop })
    }
  }

  inbox(): string {
    return `${this.#inboxPrefix}.${++this.#inboxCount}`
  }

  onDisconnect(handler: () => void): Subscription {
    return listen(this.#disconnectHandlers, handler)
  }

  /** Calls back when there is a connection again, and the server knows all subscriptions. */
  onReconnect(handler: () => void): Subscription {
    return listen(this.#reconnectHandlers, handler)
  }

  close(): Promise<void> {
    return (this.#closing ??= this.#close())
  }

  async #close(): Promise<void> {
    const ended = (work: Promise<unknown>) => {
      let timer: NodeJS.Timeout
      const late = new Promise<void>((resolve) => (timer = setTimeout(resolve, limits.busDrainDeadlineMs)))
      return Promise.race([work.catch(() => {}), late]).finally(() => clearTimeout(timer))
    }
    if (this.connected) await ended(this.#connection.drain())
    this.#state = "closed"
    await ended(this.#connection.close())
    this.#inboxes.clear()
    callAll(this.#disconnectHandlers)
  }

  #receive(delivery: Delivery): void {
    if (this.#inboxes.deliver(delivery) || delivery.reply === undefined) return
    // To the server somebody is subscribed here: only we know that nobody is.
    try {
      this.publish(delivery.reply, noBytes, { headers: { [header.noResponders]: delivery.subject } })
    } catch {
      // Without a connection nobody can be told.
    }
  }

  #askHowFar(): void {
    const asked = this.#unaskedBytes
    const loss = this.#losses
    this.#unaskedBytes = 0
    this.#connection.flush().then(
      () => loss === this.#losses && (this.#pendingBytes -= asked),
      () => {}, // the connection was lost, and all of it with it
    )
  }

  async #watch(): Promise<void> {
    for await (const status of this.#connection.status()) {
      if (status.type === "disconnect") this.#lost()
      else if (status.type === "reconnecting") this.#backoff.attempted()
      else if (status.type === "reconnect") this.#found()
      else if (status.type === "error") this.#complain(status.error)
    }
  }

  /** The client says so once for each attempt that got as far as the server, too. */
  #lost(): void {
    if (this.#state !== "connected") return
    this.#state = "disconnected"
    this.#losses++
    this.#pendingBytes = 0
    this.#unaskedBytes = 0
    callAll(this.#disconnectHandlers)
  }

  #found(): void {
    if (this.#state !== "disconnected") return
    this.#state = "connected"
    this.#refused.clear() // a server says anew what its users may
    this.#backoff.reset()
    callAll(this.#reconnectHandlers)
  }

  /** What is not allowed fails silently for whoever tried first, so it is said here, once in a row. */
  #complain(error: Error): void {
    const refused = error instanceof PermissionViolationError ? error : undefined
    if (refused?.operation === "publish") {
      this.#refused.add(refused.subject)
      for (const oldest of this.#refused) if (this.#refused.size > limits.busRefusedSubjects) this.#refused.delete(oldest)
    }
    const what = refused === undefined ? error.message : `this process may not ${refused.operation === "publish" ? "publish" : "subscribe"} to ${refused.subject}; ${remedy}`
    if (what !== this.#lastComplaint && this.#state === "connected") console.error(`bus nats: the server says: ${what}`)
    this.#lastComplaint = what
  }
}

/**
 * Both connections of a process.
 * @throws NatsConnectError as `NatsBus.connect`
 */
export const connectBuses = async (options: NatsBusOptions): Promise<Buses & { readonly control: NatsBus; readonly bulk: NatsBus }> => {
  const control = await NatsBus.connect({ ...options, name: `${options.name} control` })
  try {
    return { control, bulk: await NatsBus.connect({ ...options, name: `${options.name} bulk` }) }
  } catch (error) {
    await control.close()
    throw error
  }
}

const given = (subscription: ReturnType<NatsConnection["subscribe"]>): Subscription => ({
  unsubscribe: () => subscription.isClosed() || subscription.unsubscribe(),
  drain: () => subscription.isClosed() || subscription.isDraining() || void subscription.drain().catch(() => {}),
})

const listen = (handlers: Set<() => void>, handler: () => void): Subscription => {
  // Of its own, so that the same function can be given twice.
  const entry = () => handler()
  handlers.add(entry)
  return { unsubscribe: () => handlers.delete(entry) }
}

const callAll = (handlers: ReadonlySet<() => void>): void => {
  for (const handler of Array.from(handlers)) {
    try {
      handler()
    } catch (defect) {
      console.error("bus nats: a listener threw", defect)
    }
  }
}
