/**
 * The decode actor: owns the reservations of a worker. A `Reserve` takes blocks, opens a transfer where another worker
 * computes their KV, and its stream carries the tokens drawn after the first; its end, whoever ends it, frees everything.
 */
import { randomUUID } from "node:crypto"
import { hostname } from "node:os"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, spans } from "../../config/telemetry.ts"
import { actor, onStream, onTell } from "../runtime/actor.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream-writer.ts"
import { currentTraceparent, messageAttributes } from "../runtime/trace-context.ts"
import { decodeToken, encodeReserved, encodeToken, Finish, Reserve, type SequenceMessage } from "../messages/decode.ts"
import { subject } from "../messages/subjects.ts"
import { generationOf } from "../engine/generation.ts"
import type { Worker } from "../engine/worker.ts"
import { poolSink } from "../transfer/pool.ts"
import { TransferReceiver } from "../transfer/transfer-receiver.ts"

export interface DecodeActorOptions {
  readonly link: Link
  readonly buses: Buses
  readonly namespace: string
  readonly worker: Worker
}

/** Runs the decode role of `worker` until the Scope closes. */
export const decodeActor = (options: DecodeActorOptions): Effect.Effect<void, never, Scope.Scope> => {
  const { link, buses, namespace, worker } = options
  const { engine, formatId } = worker

  const place = subject(namespace, "decode", worker.id, Reserve.verb)
  const spanAttributes = { ...messageAttributes(link, place), [attributes.worker]: worker.id }

  const reserve = (message: SequenceMessage, writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.flatMap(currentTraceparent, (trace) => decode(message, writer, trace))

  const decode = (message: SequenceMessage, writer: StreamWriter, trace: string | undefined): Effect.Effect<void, Fault> => {
    let drawn = 0
    let held = 0
    return Effect.callback<void, Fault>((resume) => {
      if (message.formatId !== formatId) {
        return resume(Effect.fail(new Fault({ code: "invalid_request", message: `${link.sender}: holds KV of format ${formatId}, not ${message.formatId}`, hop: link.sender })))
      }
      if (!worker.roles.includes("decode")) return resume(Effect.fail(new Fault({ code: "moved", message: `${link.sender}: decodes no more`, hop: link.sender })))
      const id = randomUUID().replaceAll("-", "")
      const stopReceiving = () => worker.receiving.get(id)?.stop()
      const fail = (fault: Fault) => {
        stopReceiving()
        resume(Effect.fail(fault))
        engine.cancel(id)
      }
      try {
        engine.reserve(generationOf(id, message, trace), {
          reserved: (prefixTokens) => {
            held = prefixTokens
            try {
              if (message.prefillWorker !== undefined && message.prefillWorker !== worker.id) receive(id, prefixTokens, message.prefillWorker, fail)
            } catch (error) {
              return fail(Fault.from(error, link.sender))
            }
            writer.write(encodeReserved({ id, worker: worker.id, epoch: worker.epoch, formatId, prefixTokens, creditBytes: limits.kvWindowBytes, node: hostname() }))
          },
          token: (event) => {
            drawn++
            writer.write(encodeToken(event))
          },
          ended: () => {
            stopReceiving()
            resume(Effect.void)
          },
          failed: (fault) => {
            stopReceiving()
            resume(Effect.fail(fault))
          },
          writable: () => writer.writable,
        })
      } catch (error) {
        return resume(Effect.fail(Fault.from(error, link.sender)))
      }
      writer.onWritable(() => engine.resume())
      return Effect.sync(() => {
        stopReceiving()
        engine.cancel(id)
      })
    }).pipe(
      Effect.ensuring(Effect.suspend(() => Effect.annotateCurrentSpan({ [attributes.heldTokens]: held, [attributes.drawnTokens]: drawn }))),
      Effect.withSpan(spans.decodeRun, { kind: "server", attributes: { ...spanAttributes, [attributes.requestId]: message.requestId, [attributes.attempt]: message.attempt } }),
    )
  }

  /**
   * Waits for KV of the blocks after the prefix. A transfer that fails is the request actor's to hear of, from prefill, and to
   * have computed here; `fail` ends the reservation where its KV cannot be used, or nobody comes to compute it.
   */
  const receive = (id: string, prefixTokens: number, from: string, fail: (fault: Fault) => void): void => {
    const firstBlock = prefixTokens / worker.kv.blockTokens
    const receiver = new TransferReceiver({
      ...buses,
      namespace,
      transferId: id,
      sink: poolSink(worker.kv, engine.reserved(id)),
      firstBlock,
      blocks: engine.neededBlocks(id) - firstBlock,
      creditBytes: limits.kvWindowBytes,
      hop: `prefill ${from}`,
    })
    let orphaned: NodeJS.Timeout | undefined
    const stop = () => {
      worker.receiving.delete(id)
      clearTimeout(orphaned)
      receiver.fail(new Fault({ code: "cancelled", message: `${link.sender}: its KV is not wanted from elsewhere any more`, hop: link.sender }))
    }
    worker.receiving.set(id, { prefixTokens, first: undefined, stop })
    receiver.done.then(
      ({ first }) => {
        if (!worker.receiving.has(id)) return
        try {
          engine.adopt(id, first.map(decodeToken))
          // The receiver stays a while, for a sender that has not heard of its success.
          worker.receiving.set(id, { prefixTokens, first, stop: () => void worker.receiving.delete(id) })
        } catch (error) {
          fail(Fault.from(error, link.sender))
        }
      },
      (fault: Fault) => {
        if (worker.receiving.has(id)) orphaned = setTimeout(() => fail(fault), limits.kvSilenceMs).unref()
      },
    )
  }

  return actor(link, [
    onStream(Reserve, [{ subject: place }], reserve),
    onTell(Finish, [{ subject: subject(namespace, "decode", worker.id, Finish.verb) }], ({ transferId, choice }) => Effect.sync(() => engine.finish(transferId, choice))),
  ])
}
