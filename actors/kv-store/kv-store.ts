/**
 * The KV-store actor: keeps blocks by format and hash, in memory and on disk, so that a prefix that has left every pool is
 * fetched, not computed. Blocks come and go by transfer; what has come only in part is never seen.
 */
import { randomUUID } from "node:crypto"
import { Effect, FiberSet, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { actor, onAsk } from "../runtime/actor.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { packHashes, unpackHashes, type BlockHash } from "../messages/hashes.ts"
import { Get, Have, Pin, Put, type BlocksMessage } from "../messages/kv-store.ts"
import type { StorePresence } from "../messages/presence.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Members } from "../presence/members.ts"
import { TransferReceiver } from "../transfer/transfer-receiver.ts"
import { TransferSender } from "../transfer/transfer-sender.ts"
import { attachDisk } from "./attach-disk.ts"
import { bufferSink, bufferSource } from "./block-buffers.ts"
import { BlockTiers, type PutBlock } from "./block-tiers.ts"
import { evictions, type EvictionName } from "./eviction.ts"
import { Formats, type StoredFormat } from "./formats.ts"
import { Peers } from "./peers.ts"
import { blockKey } from "./shelves.ts"

export interface KvStoreOptions {
  readonly link: Link
  readonly buses: Buses
  readonly namespace: string
  readonly id: string
  readonly memoryBytes: number
  /** `lru` where absent. */
  readonly eviction?: EvictionName
  readonly disk?: { readonly folder: string; readonly bytes: number } | undefined
  /** Where there are several stores: who serves. */
  readonly members?: Pick<Members, "all"> | undefined
}

export interface RunningStore {
  /** What an operator sees of its tiers now. */
  readonly figures: () => StorePresence
  /** Whether blocks wait to be written to disk. */
  readonly isWriting: () => boolean
}

type HaveMessage = BlocksMessage & { readonly toFetch?: boolean | undefined }
type GetMessage = BlocksMessage & StoredFormat & { readonly transferId: string; readonly firstBlock: number; readonly creditBytes: number }
type PutMessage = BlocksMessage & StoredFormat & { readonly depths?: ReadonlyArray<number> | undefined }
type PinMessage = BlocksMessage & { readonly owner: string; readonly tenant: string; readonly leaseMs: number }

/** Runs a KV store until the Scope closes. */
export const kvStoreActor = (options: KvStoreOptions): Effect.Effect<RunningStore, never, Scope.Scope> =>
  Effect.gen(function* () {
    const { link, buses, namespace, id, memoryBytes, disk } = options
    const eviction = evictions[options.eviction ?? "lru"]
    const tiers = new BlockTiers({ memoryBytes, eviction })
    if (disk !== undefined) yield* attachDisk(tiers, { folder: disk.folder, capacityBytes: disk.bytes, eviction, pinOf: (key) => tiers.pins.of(key), warn: (message) => console.error(`${link.sender}: ${message}`) })
    const peers = new Peers({ link, buses, namespace, id, members: options.members })
    const formats = new Formats(link.sender)
    const coming = new Set<string>() // keys that an open put brings: what prefill and decode both have is sent once
    const open = new Set<{ readonly fail: (fault: Fault) => void }>() // transfers, both ways
    const copies = yield* FiberSet.make<void>()
    const here = (verb: string) => [{ subject: subject(namespace, "kv-store", id, verb) }]
    const anywhere = (verb: string) => [{ subject: subject(namespace, "kv-store", anyId, verb), queue: "kv-store" }]
    const keys = ({ formatId, hashes }: BlocksMessage) => unpackHashes(hashes).map((hash) => blockKey(formatId, hash))
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

    const haveHere = (message: HaveMessage) => {
      const named = keys(message)
      const present = named.map((key) => tiers.has(key))
      return { present, at: present.map((is) => (is ? id : "")), onDisk: named.map((key) => tiers.isOnDiskOnly(key)), coming: named.map((key) => coming.has(key)) }
    }

    const haveAnywhere = (message: HaveMessage) =>
      Effect.gen(function* () {
        const { present, at, onDisk } = haveHere(message)
        const absent = present.flatMap((is, i) => (is ? [] : [i]))
        const hashes = unpackHashes(message.hashes)
        const answers = absent.length === 0 ? [] : yield* peers.askAll(Have, { formatId: message.formatId, hashes: packHashes(absent.map((i) => hashes[i]!)) })
        for (const { id: peer, answer } of answers) {
          absent.forEach((i, place) => {
            if (answer.present[place] !== true) return
            at[i] = peer
            onDisk[i] = answer.onDisk?.[place] === true
          })
        }
        if (message.toFetch === true) tiers.missed(at.filter((store) => store === "").length)
        return { present: at.map((store) => store !== ""), at, onDisk }
      })

    /** Blocks that many have asked for are copied to another store: then two can send them, and one may be lost. */
    const copyHot = (format: StoredFormat, hashes: ReadonlyArray<BlockHash>) =>
      Effect.gen(function* () {
        const peer = peers.next()
        const hot = hashes.filter((hash) => tiers.uses(blockKey(format.formatId, hash)) % limits.storeHotUses === 0)
        const taken = peer === undefined || (yield* FiberSet.size(copies)) > 0 ? undefined : tiers.take(format, hot)
        if (peer === undefined || taken === undefined) return
        const copy = Effect.gen(function* () {
          for (let from = 0; from < hot.length; from += limits.storeBatchBlocks) {
            const blocks: Array<PutBlock> = []
            for (const [i, hash] of hot.slice(from, from + limits.storeBatchBlocks).entries()) {
              const bytes = yield* Effect.promise(() => taken.block(from + i))
              if (bytes !== undefined) blocks.push({ hash, depth: tiers.depth(blockKey(format.formatId, hash)), bytes })
            }
            yield* peers.copy(peer, format, blocks)
          }
        })
        yield* FiberSet.run(copies, Effect.ignore(copy).pipe(Effect.ensuring(Effect.sync(taken.release))))
      })

    const get = (message: GetMessage) =>
      Effect.gen(function* () {
        const { layout, transferId, firstBlock, creditBytes, formatId } = message
        yield* formats.check(message)
        const hashes = unpackHashes(message.hashes)
        const taken = open.size < limits.storeTransfers ? tiers.take({ formatId, layout }, hashes) : undefined
        if (taken !== undefined) tiers.use(keys(message))
        yield* Effect.annotateCurrentSpan(attributes.movedBlocks, taken === undefined ? 0 : hashes.length)
        if (taken === undefined) return { sent: false }
        const blocks: Array<Uint8Array> = []
        const sender = new TransferSender({ ...buses, namespace, transferId, source: bufferSource(layout, blocks, firstBlock), creditBytes, hop: "prefill" })
        track(sender)
        sender.done.then(taken.release, taken.release)
        void (async () => {
          for (const [i, reading] of hashes.map((_, i) => taken.block(i)).entries()) {
            const block = await reading
            if (block === undefined) return sender.fail(new Fault({ code: "unavailable", message: `${link.sender}: a block is damaged`, hop: link.sender }))
            blocks.push(block)
            sender.send({ firstLayer: 0, layers: layout.layers, firstBlock: firstBlock + i, blocks: 1 })
          }
          sender.finish([])
        })()
        yield* copyHot({ formatId, layout }, hashes)
        return { sent: true }
      }).pipe(Effect.withSpan(spans.kvStoreGet, { kind: "server", attributes: messageAttributes(link, subject(namespace, "kv-store", anyId, Get.verb)) }))

    const put = (message: PutMessage, alone: boolean) =>
      Effect.gen(function* () {
        const { layout, formatId } = message
        yield* formats.check(message)
        const named = keys(message)
        const hashes = unpackHashes(message.hashes)
        const blockBytes = layout.layers * layout.layerBlockBytes
        const room = open.size < limits.storeTransfers && named.length <= limits.storeBatchBlocks
        const isHere = tiers.use(named)
        const asked = named.flatMap((key, i) => {
          if (!room || isHere[i] === true || coming.has(key) || !tiers.memory.reserve(blockBytes)) return []
          coming.add(key)
          return [i]
        })
        const ended = (i: number) => {
          coming.delete(named[i]!)
          tiers.memory.release(blockBytes)
        }
        const askOthers = peers.askAll(Have, { formatId, hashes: packHashes(asked.map((i) => hashes[i]!)) }).pipe(Effect.onInterrupt(() => Effect.sync(() => asked.forEach(ended))))
        const others = alone || asked.length === 0 ? [] : yield* askOthers
        // Of two that are offered the same at once, one takes it.
        const isElsewhere = (place: number) => others.some(({ id: peer, answer }) => answer.present[place] === true || (answer.coming?.[place] === true && peer < id))
        const keep = asked.filter((_, place) => !isElsewhere(place))
        asked.forEach((i, place) => isElsewhere(place) && ended(i))
        yield* Effect.annotateCurrentSpan(attributes.movedBlocks, keep.length)
        const transferId = randomUUID().replaceAll("-", "")
        if (keep.length > 0) {
          formats.remember(message)
          const blocks = keep.map((i) => ({ hash: hashes[i]!, depth: message.depths?.[i] ?? 0, bytes: new Uint8Array(blockBytes) }))
          const sink = bufferSink(layout, blocks.map(({ bytes }) => bytes))
          const receiver = new TransferReceiver({ ...buses, namespace, transferId, sink, firstBlock: 0, blocks: keep.length, creditBytes: limits.kvWindowBytes, hop: "a worker" })
          track(receiver)
          const whole = () => {
            keep.forEach(ended)
            tiers.put({ formatId, layout }, blocks)
          }
          receiver.done.then(whole, () => keep.forEach(ended)) // blocks that did not come stay unknown, which costs a later miss
        }
        return { wanted: named.map((_, i) => keep.includes(i)), transferId, creditBytes: limits.kvWindowBytes }
      }).pipe(Effect.withSpan(spans.kvStorePut, { kind: "server", attributes: messageAttributes(link, subject(namespace, "kv-store", anyId, Put.verb)) }))

    const pinHere = (message: PinMessage) => ({ pinned: tiers.pin(message.owner, message.tenant, keys(message), message.leaseMs === 0 ? 0 : performance.now() + message.leaseMs) })
    const pinAnywhere = (message: PinMessage) =>
      Effect.map(peers.askAll(Pin, message), (answers) => ({ pinned: pinHere(message).pinned.map((is, i) => is || answers.some(({ answer }) => answer.pinned[i] === true)) }))

    const waits = { concurrent: true }
    yield* actor(link, [
      onAsk(Have, here(Have.verb), (message) => Effect.sync(() => haveHere(message))),
      onAsk(Have, anywhere(Have.verb), haveAnywhere, waits),
      onAsk(Get, [...here(Get.verb), ...anywhere(Get.verb)], get),
      onAsk(Put, here(Put.verb), (message) => put(message, true)),
      onAsk(Put, anywhere(Put.verb), (message) => put(message, false), waits),
      onAsk(Pin, here(Pin.verb), (message) => Effect.sync(() => pinHere(message))),
      onAsk(Pin, anywhere(Pin.verb), pinAnywhere, waits),
    ])
    return { figures: () => tiers.figures, isWriting: () => tiers.disk?.isWriting === true }
  })
