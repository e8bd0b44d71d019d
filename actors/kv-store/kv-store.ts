/**
 * The KV-store actor: keeps blocks by format and hash, so that a prefix that has left every pool is fetched, not computed.
 * Blocks come and go by transfer; what has come only in part is never seen.
 */
import { randomUUID } from "node:crypto"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { actor, onAsk } from "../runtime/actor.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { unpackHashes } from "../messages/hashes.ts"
import { Get, Have, Put, type BlocksMessage } from "../messages/kv-store.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { KvLayout } from "../engine/worker.ts"
import { TransferReceiver } from "../transfer/transfer-receiver.ts"
import { TransferSender } from "../transfer/transfer-sender.ts"
import { BlockCache } from "./block-cache.ts"
import { bufferSink, bufferSource } from "./block-buffers.ts"

export interface KvStoreOptions {
  readonly link: Link
  readonly buses: Buses
  readonly cluster: string
  readonly id: string
  readonly memoryBytes: number
}

type GetMessage = BlocksMessage & { readonly layout: KvLayout; readonly transferId: string; readonly firstBlock: number; readonly creditBytes: number }
type PutMessage = BlocksMessage & { readonly layout: KvLayout }

const textOf = ({ layers, layerBlockBytes, dtype, blockTokens }: KvLayout): string => `${layers} layers of ${layerBlockBytes} bytes (${dtype}, ${blockTokens} tokens)`

/** Runs a KV store until the Scope closes. */
export const kvStoreActor = ({ link, buses, cluster, id, memoryBytes }: KvStoreOptions): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function* () {
    const cache = new BlockCache(memoryBytes)
    const coming = new Set<string>() // keys that an open put brings: what prefill and decode both have is sent once
    const layouts = new Map<string, KvLayout>() // by format, the one that was put longest ago first
    const open = new Set<{ readonly fail: (fault: Fault) => void }>() // transfers, both ways
    const places = (verb: string) => [
      { subject: subject(cluster, "kv-store", id, verb) },
      { subject: subject(cluster, "kv-store", anyId, verb), queue: "kv-store" },
    ]
    const keys = ({ formatId, hashes }: BlocksMessage) => unpackHashes(hashes).map((hash) => `${formatId}/${hash}`)
    const layoutFault = ({ formatId, layout }: PutMessage): Fault | undefined => {
      const known = layouts.get(formatId)
      if (known === undefined || textOf(known) === textOf(layout)) return undefined
      return new Fault({ code: "invalid_request", message: `${link.sender}: format ${formatId} has blocks of ${textOf(known)}, not of ${textOf(layout)}`, hop: link.sender })
    }
    /** A format's first put says how its blocks are laid out. */
    const remember = ({ formatId, layout }: PutMessage): void => {
      layouts.delete(formatId)
      layouts.set(formatId, layout)
      if (layouts.size > limits.storeFormats) layouts.delete(layouts.keys().next().value!)
    }
    const leaving = new Fault({ code: "shutting_down", message: `${link.sender}: is leaving`, hop: link.sender })
    yield* Effect.addFinalizer(() => Effect.sync(() => open.forEach((transfer) => transfer.fail(leaving))))

    const track = (transfer: TransferReceiver | TransferSender): void => {
      open.add(transfer)
      // The other side may never say a word.
      const lapse = setTimeout(() => transfer.fail(new Fault({ code: "deadline_exceeded", message: `${link.sender}: the transfer was not used`, hop: link.sender })), limits.storeTransferLeaseMs)
      const ended = () => {
        clearTimeout(lapse)
        open.delete(transfer)
      }
      transfer.done.then(ended, ended)
    }

    const get = (message: GetMessage) =>
      Effect.suspend(() => {
        const wrong = layoutFault(message)
        if (wrong !== undefined) return Effect.fail(wrong)
        const { layout, transferId, firstBlock, creditBytes } = message
        const blockBytes = layout.layers * layout.layerBlockBytes
        const blocks = keys(message).flatMap((key) => cache.get(key) ?? [])
        const whole = blocks.length > 0 && blocks.length === unpackHashes(message.hashes).length && blocks.every((block) => block.byteLength === blockBytes)
        if (!whole || open.size >= limits.storeTransfers) return Effect.succeed({ sent: false })
        const sender = new TransferSender({ ...buses, cluster, transferId, source: bufferSource(layout, blocks, firstBlock), creditBytes, hop: "prefill" })
        track(sender)
        blocks.forEach((_, i) => sender.send({ firstLayer: 0, layers: layout.layers, firstBlock: firstBlock + i, blocks: 1 }))
        sender.finish([])
        return Effect.succeed({ sent: true })
      }).pipe(
        Effect.tap(({ sent }) => Effect.annotateCurrentSpan(attributes.movedBlocks, sent ? unpackHashes(message.hashes).length : 0)),
        Effect.withSpan(spans.kvStoreGet, { kind: "server", attributes: messageAttributes(link, subject(cluster, "kv-store", anyId, Get.verb)) }),
      )

    const put = (message: PutMessage) =>
      Effect.suspend(() => {
        const wrong = layoutFault(message)
        if (wrong !== undefined) return Effect.fail(wrong)
        const { layout } = message
        const named = keys(message)
        const blockBytes = layout.layers * layout.layerBlockBytes
        const room = open.size < limits.storeTransfers && named.length <= limits.storeBatchBlocks
        const wanted = named.map((key) => {
          const wants = room && cache.get(key) === undefined && !coming.has(key) && cache.reserve(blockBytes)
          if (wants) coming.add(key)
          return wants
        })
        const keep = named.filter((_, i) => wanted[i])
        const transferId = randomUUID().replaceAll("-", "")
        if (keep.length > 0) {
          remember(message)
          const blocks = keep.map(() => new Uint8Array(blockBytes))
          const receiver = new TransferReceiver({ ...buses, cluster, transferId, sink: bufferSink(layout, blocks), firstBlock: 0, blocks: keep.length, creditBytes: limits.kvWindowBytes, hop: "a worker" })
          track(receiver)
          const ended = () => {
            cache.release(keep.length * blockBytes)
            for (const key of keep) coming.delete(key)
          }
          receiver.done.then(() => {
            ended()
            keep.forEach((key, i) => cache.put(key, blocks[i]!))
          }, ended) // blocks that did not come stay unknown, which costs a later miss
        }
        return Effect.succeed({ wanted, transferId, creditBytes: limits.kvWindowBytes })
      }).pipe(
        Effect.tap(({ wanted }) => Effect.annotateCurrentSpan(attributes.movedBlocks, wanted.filter(Boolean).length)),
        Effect.withSpan(spans.kvStorePut, { kind: "server", attributes: messageAttributes(link, subject(cluster, "kv-store", anyId, Put.verb)) }),
      )

    yield* actor(link, [
      onAsk(Have, places(Have.verb), (message) => Effect.sync(() => ({ present: keys(message).map((key) => cache.has(key)) }))),
      onAsk(Get, places(Get.verb), get),
      onAsk(Put, places(Put.verb), put),
    ])
  })
