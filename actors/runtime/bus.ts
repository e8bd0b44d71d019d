/**
 * The bus: how actors reach each other. Bytes and headers on subjects, in order per publisher and subject, at most once.
 * Implementations pass one conformance suite (test/actors/bus.test.ts); everything above (messages, streams) is shared.
 */
export type Headers = Readonly<Record<string, string>>

export interface Delivery {
  readonly subject: string
  /** A view that the receiver must not write, and must copy to keep when the bus is a network. */
  readonly data: Uint8Array
  readonly headers: Headers
  /** Where an answer is expected, if one is. */
  readonly reply: string | undefined
}

export interface PublishOptions {
  readonly headers?: Headers
  readonly reply?: string
}

export interface Subscription {
  unsubscribe(): void
  /** Asks for nothing more, and takes what is on its way already; absent where nothing ever is. */
  drain?(): void
}

export interface Bus {
  readonly name: string
  /** Most bytes of data and headers in one message. */
  readonly maxPayloadBytes: number
  /**
   * Sends without waiting. A message with a `reply` that nobody is subscribed to is answered by an empty message with the
   * header `ps-no-responders`. Throws a Fault where the message is too large or the bus is closed.
   */
  publish(subject: string, data: Uint8Array, options?: PublishOptions): void
  /** Each subscriber without a queue gets every message; of a queue group, one member does. Handlers must not throw. */
  subscribe(subject: string, handler: (delivery: Delivery) => void, options?: { readonly queue?: string }): Subscription
  /** A fresh subject that only this process receives on. */
  inbox(): string
  /** Calls back when the connection was lost or closed: open streams fail, since what was on its way may be lost. */
  onDisconnect(handler: () => void): Subscription
  /** Delivers what is on its way, then refuses everything. */
  close(): Promise<void>
}

/**
 * The connections of a process. What is small and urgent (requests, tokens, credits, cancels) must not wait behind
 * megabytes of KV, so bulk has a connection of its own. In memory both are the same object.
 */
export interface Buses {
  readonly control: Bus
  readonly bulk: Bus
}

/** Header names of the envelope. */
export const header = {
  version: "ps-version",
  sender: "ps-sender",
  epoch: "ps-epoch",
  /** The receiver's incarnation that is meant. */
  toEpoch: "ps-to-epoch",
  /** Milliseconds that the receiver has left, relative since clocks differ between machines. */
  budgetMs: "ps-budget-ms",
  fault: "ps-fault",
  noResponders: "ps-no-responders",
  /** Frames that the opener of a stream accepts before it grants more. */
  streamWindow: "ps-stream-window",
  traceparent: "traceparent",
} as const

export const protocolVersion = "1"
