/**
 * How a process speaks to actors: typed messages in an envelope (version, sender, epoch, remaining time, trace), with a
 * deadline on every answer and faults that name the hop.
 */
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import { header, protocolVersion, type Bus, type Delivery, type Headers, type Subscription } from "./bus.ts"
import { decodeFault, type MessageType } from "./codec.ts"
import { Fault } from "./fault.ts"
import { openStream, type StreamReader } from "./stream-reader.ts"
import { currentTraceparent } from "./trace-context.ts"

export interface SendOptions {
  /** Names the receiver in faults, for example "decode w0". */
  readonly hop: string
  readonly deadlineMs?: number
  /** The receiver's incarnation that is meant: an earlier one keeps silent, a later one answers `stale`. */
  readonly epoch?: number
}

const noBytes = new Uint8Array(0)

export class Link {
  readonly bus: Bus
  readonly sender: string
  readonly epoch: number

  /** `sender` names this side ("gateway", "request r0"); `epoch` fences what an earlier incarnation of it asks. 0: it has no incarnations. */
  constructor(bus: Bus, sender: string, epoch: number) {
    this.bus = bus
    this.sender = sender
    this.epoch = epoch
  }

  /** Sends a message that is not answered. */
  tell<A>(type: MessageType<A, void, "tell">, to: string, message: A, options: Pick<SendOptions, "epoch"> = {}): Effect.Effect<void, Fault> {
    return Effect.flatMap(this.#headers(undefined, options.epoch), (headers) =>
      Effect.try({ try: () => this.bus.publish(to, type.encode(message), { headers }), catch: (error) => Fault.from(error, this.sender) }),
    )
  }

  /** Sends a message and waits for its answer. */
  ask<A, R>(type: MessageType<A, R, "ask">, to: string, message: A, options: SendOptions): Effect.Effect<R, Fault> {
    const budgetMs = options.deadlineMs ?? limits.askDeadlineMs
    return Effect.flatMap(this.#headers(budgetMs, options.epoch), (headers) =>
      Effect.callback<R, Fault>((resume) => {
        const subscriptions: Array<Subscription> = []
        const lost = (code: "disconnected" | "unavailable" | "deadline_exceeded", why: string) =>
          settle(Effect.fail(new Fault({ code, message: `${options.hop}: ${type.verb}: ${why}`, hop: options.hop })))
        const receive = ({ data, headers }: Delivery) => {
          if (headers[header.noResponders] !== undefined) return lost("unavailable", "nobody serves it")
          if (headers[header.fault] !== undefined) return settle(Effect.fail(decodeFault(data, options.hop)))
          settle(Effect.try({ try: () => type.decodeReply(data), catch: (error) => Fault.from(error, options.hop) }))
        }
        const timer = setTimeout(() => lost("deadline_exceeded", `no answer within ${budgetMs} ms`), budgetMs)
        const release = () => {
          clearTimeout(timer)
          for (const subscription of subscriptions) subscription.unsubscribe()
        }
        const settle = (outcome: Effect.Effect<R, Fault>) => {
          release()
          resume(outcome)
        }
        try {
          const inbox = this.bus.inbox()
          subscriptions.push(this.bus.onDisconnect(() => lost("disconnected", "the connection was lost")), this.bus.subscribe(inbox, receive))
          this.bus.publish(to, type.encode(message), { reply: inbox, headers })
        } catch (error) {
          settle(Effect.fail(Fault.from(error, this.sender)))
        }
        return Effect.sync(release)
      }),
    )
  }

  /** Sends a message that is answered by a stream; the caller reads it, or cancels it. */
  open<A>(type: MessageType<A, void, "stream">, to: string, message: A, options: SendOptions & { readonly windowFrames?: number }): Effect.Effect<StreamReader> {
    return Effect.map(this.#headers(options.deadlineMs ?? limits.requestDeadlineMs, options.epoch), (headers) =>
      openStream(this.bus, to, type.encode(message), { headers, hop: options.hop, windowFrames: options.windowFrames }),
    )
  }

  /** Answers an ask. */
  reply<A, R>(type: MessageType<A, R>, to: string, answer: R): void {
    const data = answer === undefined ? noBytes : type.encodeReply(answer)
    this.bus.publish(to, data, { headers: { [header.sender]: this.sender } })
  }

  #headers(budgetMs: number | undefined, toEpoch: number | undefined): Effect.Effect<Headers> {
    return Effect.map(currentTraceparent, (traceparent) => {
      const headers: Record<string, string> = { [header.version]: protocolVersion, [header.sender]: this.sender, [header.epoch]: String(this.epoch) }
      if (toEpoch !== undefined) headers[header.toEpoch] = String(toEpoch)
      if (budgetMs !== undefined) headers[header.budgetMs] = String(Math.round(budgetMs))
      if (traceparent !== undefined) headers[header.traceparent] = traceparent
      return headers
    })
  }
}
