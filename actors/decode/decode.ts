/**
 * The decode actor: owns the reservations of a worker. A `Reserve` takes blocks, and its stream carries the tokens drawn
 * after the first; the stream's end, whoever ends it, frees them.
 */
import { Effect, type Scope } from "effect"
import { actor, onStream, onTell } from "../runtime/actor.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream.ts"
import { encodeReserved, encodeToken, Finish, Reserve, type SequenceMessage } from "../messages/decode.ts"
import { unpackHashes } from "../messages/hashes.ts"
import { subject } from "../messages/subjects.ts"
import { unpackTokens } from "../messages/tokens.ts"
import type { GenerationSpec } from "../engine/sequence.ts"
import type { Worker } from "../engine/worker.ts"

const generation = (id: string, message: SequenceMessage): GenerationSpec => ({
  id,
  requestId: message.requestId,
  hashRoot: unpackHashes(message.hashRoot)[0] ?? "",
  prompt: unpackTokens(message.prompt, "prompt"),
  delivered: message.delivered.map((tokens) => unpackTokens(tokens, "delivered")),
  choices: message.choices,
  finished: message.finished,
  sampling: message.sampling,
  maxTokens: message.maxTokens,
  stopTokens: new Set(message.stopTokens),
  suppressedTokens: message.suppressedTokens,
  logprobs: message.logprobs,
  promptLogprobs: message.promptLogprobs,
})

/** Runs the decode role of `worker` until the Scope closes. */
export const decodeActor = (options: { readonly link: Link; readonly cluster: string; readonly worker: Worker }): Effect.Effect<void, never, Scope.Scope> => {
  const { link, cluster, worker } = options

  const reserve = (message: SequenceMessage, writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.callback<void, Fault>((resume) => {
      const id = `${message.requestId}.${message.attempt}`
      if (message.formatId !== worker.formatId) {
        return resume(Effect.fail(new Fault({ code: "invalid_request", message: `${link.sender}: holds KV of format ${worker.formatId}, not ${message.formatId}`, hop: link.sender })))
      }
      try {
        worker.engine.reserve(generation(id, message), {
          reserved: (prefixTokens) => writer.write(encodeReserved({ id, worker: worker.id, epoch: worker.epoch, formatId: worker.formatId, prefixTokens })),
          token: (event) => writer.write(encodeToken(event)),
          ended: () => resume(Effect.void),
          failed: (fault) => resume(Effect.fail(fault)),
          writable: () => writer.writable,
        })
      } catch (error) {
        return resume(Effect.fail(Fault.from(error, link.sender)))
      }
      writer.onWritable(() => worker.engine.resume())
      return Effect.sync(() => worker.engine.cancel(id))
    })

  return actor(link, [
    onStream(Reserve, [{ subject: subject(cluster, "decode", worker.id, Reserve.verb) }], reserve),
    onTell(Finish, [{ subject: subject(cluster, "decode", worker.id, Finish.verb) }], ({ transferId, choice }) => Effect.sync(() => worker.engine.finish(transferId, choice))),
  ])
}
