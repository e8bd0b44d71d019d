/**
 * A cluster's bucket in JetStream: a key-value stream of the NATS server, which keeps it over its own restarts. It has a
 * connection of its own, so that a lease is renewed whatever else is on its way.
 */
import { jetstream, JetStreamApiCodes, JetStreamApiError } from "@nats-io/jetstream"
import { Kvm, type KV } from "@nats-io/kv"
import type { NatsConnection } from "@nats-io/transport-node"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import type { Subscription } from "./bus.ts"
import type { BucketEntry, ClusterBucket } from "./cluster-bucket.ts"
import { Fault } from "./fault.ts"
import { Backoff, connectNats, NatsConnectError } from "./nats-connect.ts"

export interface NatsBucketOptions extends NatsAddress {
  /** Shown in the server's monitoring. */
  readonly name: string
  /** Letters, digits, - and _. */
  readonly bucket: string
  /** Where answers come in. */
  readonly inboxPrefix: string
}

/** Earlier values of a key that the server keeps, for people. */
const history = 8

const hop = "bucket"

export class NatsBucket implements ClusterBucket {
  readonly #connection: NatsConnection
  readonly #kv: KV
  readonly #bucket: string
  #closed = false

  private constructor(connection: NatsConnection, kv: KV, bucket: string) {
    this.#connection = connection
    this.#kv = kv
    this.#bucket = bucket
  }

  /**
   * Opens the bucket, and makes it where there is none.
   * @throws NatsConnectError: one sentence with what to do
   */
  static async connect(options: NatsBucketOptions): Promise<NatsBucket> {
    const { bucket, name, inboxPrefix } = options
    const connection = await connectNats(options, name, new Backoff(), inboxPrefix)
    try {
      // Read from the server that takes the writes: others may be behind.
      const kv = await new Kvm(jetstream(connection, { timeout: limits.askDeadlineMs })).create(bucket, { history, allow_direct: false })
      return new NatsBucket(connection, kv, bucket)
    } catch (error) {
      await connection.close().catch(() => {})
      const { message } = error as Error
      const why = /jetstream|no responders/i.test(message) ? "the server has no JetStream, which keeps what a cluster wants: start nats-server with -js" : `the bucket ${bucket} cannot be opened: ${message}`
      throw new NatsConnectError(`${options.url}: ${why}`)
    }
  }

  async get(key: string): Promise<BucketEntry | undefined> {
    const entry = await this.#attempt(`get ${key}`, () => this.#kv.get(key))
    return entry === null || entry.operation !== "PUT" ? undefined : { value: entry.value, revision: entry.revision }
  }

  put(key: string, value: Uint8Array, revision: number): Promise<number | undefined> {
    return this.#attempt(`put ${key}`, async () => {
      try {
        return await this.#kv.put(key, value, { previousSeq: revision, timeout: limits.askDeadlineMs })
      } catch (error) {
        if (error instanceof JetStreamApiError && conflicts.has(error.code)) return undefined
        throw error
      }
    })
  }

  /**
   * Asks again and again, and at once when somebody is heard to write: what a consumer of the stream would tell is not needed
   * here, and there is nothing in the server to lose.
   */
  watch(key: string, handler: (entry: BucketEntry) => void): Subscription {
    let told = 0
    let asking = false
    const look = async (): Promise<void> => {
      if (asking || this.#closed) return
      asking = true
      const entry = await this.get(key).catch(() => undefined)
      asking = false
      if (entry === undefined || entry.revision <= told || stopped) return
      told = entry.revision
      handler(entry)
    }
    let stopped = false
    const timer = setInterval(() => void look(), limits.bucketPollMs)
    // The server hands a write to the stream and to us in the same moment; a look that comes too early is made up for.
    const heard = this.#connection.subscribe(`$KV.${this.#bucket}.${key}`, { callback: () => void look() })
    void look()
    return {
      unsubscribe: () => {
        stopped = true
        clearInterval(timer)
        if (!heard.isClosed()) heard.unsubscribe()
      },
    }
  }

  async close(): Promise<void> {
    this.#closed = true
    await this.#connection.close()
  }

  async #attempt<A>(what: string, run: () => Promise<A>): Promise<A> {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => (timer = setTimeout(() => reject(new Error(`no answer within ${limits.askDeadlineMs} ms`)), limits.askDeadlineMs)))
    try {
      if (this.#closed) throw new Error("it is closed")
      return await Promise.race([run(), late])
    } catch (error) {
      throw new Fault({ code: "unavailable", message: `${hop} ${this.#bucket}: ${what}: ${error instanceof Error ? error.message : String(error)}`, hop })
    } finally {
      clearTimeout(timer)
    }
  }
}

/** Another revision is the last one. */
const conflicts: ReadonlySet<number> = new Set([JetStreamApiCodes.StreamWrongLastSequence, JetStreamApiCodes.StreamWrongLastSequenceUnknown])
