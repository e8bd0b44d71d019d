/**
 * The other stores of the cluster. What is asked of any store is asked of all of them by the one that answers, since a block
 * is put where the queue group sends it; what is asked of one by its id is about that one.
 */
import { Effect } from "effect"
import { limits } from "../../config/limits.ts"
import type { MessageType } from "../runtime/codec.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import { Put } from "../messages/kv-store.ts"
import { subject } from "../messages/subjects.ts"
import type { Members } from "../presence/members.ts"
import { TransferSender } from "../transfer/transfer-sender.ts"
import { bufferSource } from "./block-buffers.ts"
import type { PutBlock } from "./block-tiers.ts"
import type { StoredFormat } from "./formats.ts"

export interface PeersOptions {
  readonly link: Link
  readonly buses: Buses
  readonly namespace: string
  readonly id: string
  /** Absent where this is the only store. */
  readonly members: Pick<Members, "all"> | undefined
}

export class Peers {
  readonly #options: PeersOptions
  #turn = 0

  constructor(options: PeersOptions) {
    this.#options = options
  }

  get ids(): ReadonlyArray<string> {
    const { id, members } = this.#options
    return members === undefined ? [] : members.all.flatMap((member) => (member.kind === "kv-store" && member.id !== id ? [member.id] : []))
  }

  /** The answers of those that answer in time. */
  askAll<A, R>(type: MessageType<A, R, "ask">, message: A): Effect.Effect<ReadonlyArray<{ readonly id: string; readonly answer: R }>> {
    const { link, namespace } = this.#options
    const ask = (id: string) =>
      link.ask(type, subject(namespace, "kv-store", id, type.verb), message, { hop: `kv-store ${id}`, deadlineMs: limits.storePeerDeadlineMs }).pipe(
        Effect.map((answer) => [{ id, answer }]),
        Effect.orElseSucceed(() => []),
      )
    return Effect.map(Effect.forEach(this.ids, ask, { concurrency: "unbounded" }), (answers) => answers.flat())
  }

  /** Each time another one of them. */
  next(): string | undefined {
    return this.ids[this.#turn++ % this.ids.length]
  }

  /** Puts blocks into another store; what it has already it does not take. */
  copy(id: string, format: StoredFormat, blocks: ReadonlyArray<PutBlock>): Effect.Effect<void, Fault> {
    return Effect.suspend(() => {
      const { link, buses, namespace } = this.#options
      const hop = `kv-store ${id}`
      const message = { formatId: format.formatId, layout: format.layout, hashes: packHashes(blocks.map(({ hash }): BlockHash => hash)), depths: blocks.map(({ depth }) => depth) }
      return Effect.gen(function* () {
        const { wanted, transferId, creditBytes } = yield* link.ask(Put, subject(namespace, "kv-store", id, Put.verb), message, { hop })
        const sent = blocks.filter((_, i) => wanted[i] === true).map(({ bytes }) => bytes)
        if (sent.length === 0) return
        const sender = yield* Effect.acquireRelease(
          Effect.sync(() => new TransferSender({ ...buses, namespace, transferId, source: bufferSource(format.layout, sent, 0), creditBytes, hop })),
          (opened) => Effect.sync(() => opened.fail(new Fault({ code: "cancelled", message: `${link.sender}: is leaving`, hop: link.sender }))),
        )
        sent.forEach((_, place) => sender.send({ firstLayer: 0, layers: format.layout.layers, firstBlock: place, blocks: 1 }))
        sender.finish([])
        yield* Effect.tryPromise({ try: () => sender.done, catch: (error) => Fault.from(error, hop) })
      }).pipe(Effect.scoped)
    })
  }
}
