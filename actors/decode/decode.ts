/**
 * The decode actor: owns the reservations of a worker. A `Reserve` takes blocks, opens a transfer where another worker
 * computes their KV, and its stream carries the tokens drawn after the first; its end, whoever ends it, frees everything.
 */
import { randomUUID } from "node:crypto"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { actor, onStream, onTell } from "../runtime/actor.ts"
import type { Buses } from "../runtime/bus.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream.ts"
import { decodeToken, encodeReserved, encodeToken, Finish, Reserve, type SequenceMessage } from "../messages/decode.ts"
import { subject } from "../messages/subjects.ts"
import { generationOf } from "../engine/generation.ts"
import type { Worker } from "../engine/worker.ts"
import { poolSink } from "../transfer/pool.ts"
import { TransferReceiver } from "../transfer/transfer-receiver.ts"

export interface DecodeActorOptions {
  readonly link: Link
  readonly buses: Buses
  readonly cluster: string
  readonly worker: Worker
}

/** Runs the decode role of `worker` until the Scope closes. */
export const decodeActor = (options: DecodeActorOptions): Effect.Effect<void, never, Scope.Scope> => {
  const { link, buses, cluster, worker } = options
  const { engine, formatId } = worker

  const reserve = (message: SequenceMessage, writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.callback<void, Fault>((resume) => {
      if (message.formatId !== formatId) {
        return resume(Effect.fail(new Fault({ code: "invalid_request", message: `${link.sender}: holds KV of format ${formatId}, not ${message.formatId}`, hop: link.sender })))
      }
      const id = randomUUID().replaceAll("-", "")
      const stopReceiving = () => worker.receiving.get(id)?.()
      try {
        engine.reserve(generationOf(id, message), {
          reserved: (prefixTokens) => {
            if (message.prefillWorker !== undefined && message.prefillWorker !== worker.id) receive(id, prefixTokens, message.prefillWorker)
            writer.write(encodeReserved({ id, worker: worker.id, epoch: worker.epoch, formatId, prefixTokens, creditBytes: limits.kvWindowBytes }))
          },
          token: (event) => writer.write(encodeToken(event)),
          ended: () => resume(Effect.void),
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
    }).pipe(Effect.withSpan("decode.run", { attributes: { "penstock.worker": worker.id } }))

  /** Waits for KV of the blocks after the prefix. A transfer that fails is the request actor's to hear of, from prefill. */
  const receive = (id: string, prefixTokens: number, from: string): void => {
    const firstBlock = prefixTokens / worker.kv.blockTokens
    const receiver = new TransferReceiver({
      ...buses,
      cluster,
      transferId: id,
      sink: poolSink(worker, id),
      firstBlock,
      blocks: engine.neededBlocks(id) - firstBlock,
      creditBytes: limits.kvWindowBytes,
      hop: `prefill ${from}`,
    })
    worker.receiving.set(id, () => {
      worker.receiving.delete(id)
      receiver.close()
    })
    receiver.done.then(
      ({ first }) => {
        if (worker.receiving.delete(id)) engine.adopt(id, first.map(decodeToken))
      },
      () => worker.receiving.delete(id),
    )
  }

  return actor(link, [
    onStream(Reserve, [{ subject: subject(cluster, "decode", worker.id, Reserve.verb) }], reserve),
    onTell(Finish, [{ subject: subject(cluster, "decode", worker.id, Finish.verb) }], ({ transferId, choice }) => Effect.sync(() => engine.finish(transferId, choice))),
  ])
}
