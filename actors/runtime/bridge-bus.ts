/**
 * The bus of a process that may be alone or one of several, and changes between the two while it is used. Detached it is a
 * memory bus. Attached to an uplink, what is published goes over that, and comes back to who is subscribed here, so that
 * queue groups span processes. Answers and streams between actors of this process always stay in it: they know nothing of
 * an attach or a detach.
 */
import { randomBytes } from "node:crypto"
import { limits } from "../../config/limits.ts"
import type { Bus, Delivery, PublishOptions, Subscription } from "./bus.ts"
import { Fault } from "./fault.ts"
import { MemoryBus } from "./memory-bus.ts"

/** A bus to other processes, with what a bridge needs beyond the others: `NatsBus` has it. */
export interface Uplink extends Bus {
  /** Receives what is sent to any subject that begins with `prefix` and a point. */
  subscribeBelow(prefix: string, handler: (delivery: Delivery) => void): Subscription
  /** Resolves when all that was published, subscribed and drained before has been taken, and what of it comes here has come. */
  flush(): Promise<void>
}

export interface BridgeBusOptions {
  /** Where answers come in over an uplink: `inboxPrefix` of actors/messages/subjects.ts. */
  readonly inboxPrefix: string
  readonly maxPayloadBytes?: number
}

interface Mirrored {
  readonly subject: string
  readonly handler: (delivery: Delivery) => void
  readonly options: { readonly queue?: string }
  remote: Subscription | undefined
}

type Message = readonly [subject: string, data: Uint8Array, options: PublishOptions | undefined]

const hop = "bus bridge"

export class BridgeBus extends MemoryBus {
  readonly #inboxPrefix: string
  readonly #mirrored = new Set<Mirrored>()
  #inboxCount = 0
  /** Has the subscriptions of this process. */
  #mirror: Uplink | undefined
  /** Gets what is published. */
  #uplink: Uplink | undefined
  /** What is published while the last messages come back from an uplink that is given up: it must not overtake them. */
  #held: Array<Message> | undefined
  #ofUplink: ReadonlyArray<Subscription> = []
  #change: Promise<void> = Promise.resolve()

  constructor({ inboxPrefix, maxPayloadBytes }: BridgeBusOptions) {
    super(maxPayloadBytes === undefined ? {} : { maxPayloadBytes })
    // Two buses of one process, or two lives of it, must not get each other's answers.
    this.#inboxPrefix = `${inboxPrefix}.${randomBytes(6).toString("hex")}`
  }

  /** Of what it is now: other processes can be reached under "nats" only. */
  override get name(): string {
    return this.#uplink?.name ?? super.name
  }

  get attached(): boolean {
    return this.#uplink !== undefined
  }

  /** The smaller of this process's and the uplink's. */
  override get maxPayloadBytes(): number {
    return this.#uplink === undefined ? super.maxPayloadBytes : Math.min(super.maxPayloadBytes, this.#uplink.maxPayloadBytes)
  }

  override publish(subject: string, data: Uint8Array, options?: PublishOptions): void {
    if ((this.#uplink === undefined && this.#held === undefined) || this.#isInbox(subject)) return super.publish(subject, data, options)
    this.admit(subject, data, options?.headers ?? {})
    if (this.#held !== undefined) this.#held.push([subject, data, options])
    else this.#uplink!.publish(subject, data, options)
  }

  override subscribe(subject: string, handler: (delivery: Delivery) => void, options: { readonly queue?: string } = {}): Subscription {
    const local = super.subscribe(subject, handler, options)
    if (this.#isInbox(subject)) return local
    const mirrored: Mirrored = { subject, handler, options, remote: undefined }
    try {
      mirrored.remote = this.#mirror?.subscribe(subject, handler, options)
    } catch (error) {
      local.unsubscribe()
      throw error
    }
    this.#mirrored.add(mirrored)
    const leave = (end: (remote: Subscription) => void) => {
      local.unsubscribe()
      this.#mirrored.delete(mirrored)
      if (mirrored.remote !== undefined) end(mirrored.remote)
    }
    return { unsubscribe: () => leave((remote) => remote.unsubscribe()), drain: () => leave((remote) => (remote.drain ?? remote.unsubscribe)()) }
  }

  /** Unique over the life of the process, attached or not. */
  override inbox(): string {
    return `${this.#inboxPrefix}.${++this.#inboxCount}`
  }

  /**
   * Joins other processes over a connected uplink, which stays its maker's to close, after `detach` or `close`. From when it
   * resolves on, what is published reaches them. Rejects with a Fault, and stays as it was, where the uplink does not answer.
   */
  attach(uplink: Uplink): Promise<void> {
    return this.#next(async () => {
      if (this.#uplink !== undefined) throw new Fault({ code: "invalid_request", message: "attach: there is an uplink already; detach it first", hop })
      this.#mirror = uplink
      try {
        this.#ofUplink = [uplink.subscribeBelow(this.#inboxPrefix, (delivery) => this.deliver(delivery)), uplink.onDisconnect(() => this.lost())]
        for (const mirrored of this.#mirrored) mirrored.remote = uplink.subscribe(mirrored.subject, mirrored.handler, mirrored.options)
        await answered(uplink)
      } catch (error) {
        this.#dropMirror()
        throw Fault.from(error, hop)
      }
      this.#uplink = uplink
    })
  }

  /** Is alone again once it resolves: all that was published or sent here before has been delivered. */
  detach(): Promise<void> {
    return this.#next(() => this.#detach())
  }

  /** Detaches, and delivers what is on its way. */
  override close(): Promise<void> {
    return this.#next(async () => {
      await this.#detach()
      await super.close()
    })
  }

  async #detach(): Promise<void> {
    const uplink = this.#uplink
    if (uplink === undefined) return
    this.#uplink = undefined
    this.#mirror = undefined
    this.#held = []
    // What others have sent here comes before the answer, as what was published here does.
    for (const subscription of [...this.#ofUplink, ...Array.from(this.#mirrored, ({ remote }) => remote)]) subscription?.drain?.()
    // Without an answer the connection is lost, and all that was on its way with it: who waited for that has been told.
    await answered(uplink).catch(() => {})
    this.#dropMirror()
    const held = this.#held
    this.#held = undefined
    for (const message of held) super.publish(...message)
  }

  #dropMirror(): void {
    for (const subscription of this.#ofUplink) subscription.unsubscribe()
    for (const mirrored of this.#mirrored) {
      mirrored.remote?.unsubscribe()
      mirrored.remote = undefined
    }
    this.#ofUplink = []
    this.#mirror = undefined
  }

  #isInbox(subject: string): boolean {
    return subject.startsWith(this.#inboxPrefix)
  }

  /** One change after the other. */
  #next(change: () => Promise<void>): Promise<void> {
    const done = this.#change.then(change)
    this.#change = done.catch(() => {})
    return done
  }
}

const answered = async (uplink: Uplink): Promise<void> => {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_, reject) => {
    const fault = new Fault({ code: "deadline_exceeded", message: `${uplink.name}: no answer within ${limits.busDrainDeadlineMs} ms`, hop })
    timer = setTimeout(() => reject(fault), limits.busDrainDeadlineMs)
  })
  await Promise.race([uplink.flush(), late]).finally(() => clearTimeout(timer))
}
