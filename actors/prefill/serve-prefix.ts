/**
 * Sends blocks of this worker's pool to another worker that is to compute what follows them. They are held in the pool while
 * they are on their way; what is not here any more costs the other worker the computation and nothing else.
 */
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { unpackHashes } from "../messages/hashes.ts"
import { Get, type GetMessage } from "../messages/kv-store.ts"
import { subject } from "../messages/subjects.ts"
import type { KvLayout, Worker } from "../engine/worker.ts"
import { poolSource } from "../transfer/pool.ts"
import { TransferSender } from "../transfer/transfer-sender.ts"

export interface ServePrefixOptions {
  readonly link: Link
  readonly buses: Buses
  readonly namespace: string
  readonly worker: Pick<Worker, "id" | "engine" | "formatId" | "kv">
}

const same = (left: KvLayout, right: KvLayout): boolean =>
  left.dtype === right.dtype && left.blockTokens === right.blockTokens && left.layers === right.layers && left.layerBlockBytes === right.layerBlockBytes

/** The handler of `Get` for the pool's own blocks; what it has begun to send is given up when the Scope closes. */
export const servePrefix = ({ link, buses, namespace, worker }: ServePrefixOptions): Effect.Effect<(message: GetMessage) => Effect.Effect<{ readonly sent: boolean }>, never, Scope.Scope> =>
  Effect.gen(function* () {
    const open = new Set<TransferSender>()
    const fault = (code: "shutting_down" | "deadline_exceeded", message: string) => new Fault({ code, message: `${link.sender}: ${message}`, hop: link.sender })
    yield* Effect.addFinalizer(() => Effect.sync(() => open.forEach((sender) => sender.fail(fault("shutting_down", "is leaving")))))

    const send = ({ formatId, layout, hashes, transferId, firstBlock, creditBytes }: GetMessage): number => {
      if (formatId !== worker.formatId || !same(layout, worker.kv) || open.size >= limits.storeTransfers) return 0
      const wanted = unpackHashes(hashes)
      const held = worker.engine.hold(wanted)
      if (held.hashes.length < wanted.length) {
        held.release()
        return 0
      }
      const source = poolSource(worker.kv, held.at([...wanted.keys()], firstBlock))
      const sender = new TransferSender({ ...buses, namespace, transferId, source, creditBytes, hop: "prefill" })
      open.add(sender)
      // The other side may never say a word.
      const lapse = setTimeout(() => sender.fail(fault("deadline_exceeded", "the transfer was not used")), limits.storeTransferLeaseMs).unref()
      const ended = () => {
        clearTimeout(lapse)
        open.delete(sender)
        held.release()
      }
      sender.done.then(ended, ended)
      sender.send({ firstLayer: 0, layers: worker.kv.layers, firstBlock, blocks: wanted.length })
      sender.finish([])
      return wanted.length
    }

    const span = { kind: "server" as const, attributes: { ...messageAttributes(link, subject(namespace, "prefill", worker.id, Get.verb)), [attributes.worker]: worker.id } }
    return (message) =>
      Effect.sync(() => send(message)).pipe(
        Effect.tap((blocks) => Effect.annotateCurrentSpan(attributes.movedBlocks, blocks)),
        Effect.map((blocks) => ({ sent: blocks > 0 })),
        Effect.withSpan(spans.kvStoreGet, span),
      )
  })
