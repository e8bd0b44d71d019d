/**
 * The prefill actor: computes prompts into the reservations that decode has opened. It looks for the longest prefix that
 * is known anywhere first, computes the rest, and sends the first token of each choice itself.
 */
import { Effect, type Scope } from "effect"
import { actor, onAsk, onStream } from "../runtime/actor.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream.ts"
import { packHashes } from "../messages/hashes.ts"
import { encodePrefillFrame, KvDump, Prefill, type PrefillMessage } from "../messages/prefill.ts"
import { subject } from "../messages/subjects.ts"
import type { Worker } from "../engine/worker.ts"
import { fetchPrefix } from "./fetch-prefix.ts"

export interface PrefillActorOptions {
  readonly link: Link
  readonly cluster: string
  readonly worker: Worker
  /** Id of the next KV event of the worker. */
  readonly nextEventId: () => number
}

/** Runs the prefill role of `worker` until the Scope closes. */
export const prefillActor = (options: PrefillActorOptions): Effect.Effect<void, never, Scope.Scope> => {
  const { link, cluster, worker } = options
  const { engine } = worker

  const prefill = ({ transfer }: PrefillMessage, writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.gen(function* () {
      // Both roles of one worker share its pool, so that the transfer is the reservation's block table itself.
      if (transfer.worker !== worker.id || transfer.epoch !== worker.epoch) {
        return yield* Effect.fail(new Fault({ code: "unavailable", message: `${link.sender}: cannot reach the blocks of ${transfer.worker} (epoch ${transfer.epoch})`, hop: link.sender }))
      }
      yield* fetchPrefix({ link, cluster, worker, transferId: transfer.id })
      yield* compute(transfer.id, writer)
    }).pipe(Effect.withSpan("prefill.run"))

  const compute = (id: string, writer: StreamWriter): Effect.Effect<void, Fault> =>
    Effect.callback<void, Fault>((resume) => {
      try {
        engine.prefill(id, {
          scores: (scores) => writer.write(encodePrefillFrame({ type: "scores", scores })),
          token: (event) => writer.write(encodePrefillFrame({ type: "token", event })),
          done: (cachedTokens, computedTokens) => {
            writer.write(encodePrefillFrame({ type: "done", cachedTokens, computedTokens }))
            resume(Effect.void)
          },
          failed: (fault) => resume(Effect.fail(fault)),
        })
      } catch (error) {
        resume(Effect.fail(Fault.from(error, link.sender)))
      }
      return Effect.sync(() => engine.cancel(id))
    })

  const dump = () => Effect.sync(() => ({ nextEventId: options.nextEventId(), hashes: packHashes(engine.blocks.knownHashes()) }))

  return actor(link, [
    onStream(Prefill, [{ subject: subject(cluster, "prefill", worker.id, Prefill.verb) }], prefill),
    onAsk(KvDump, [{ subject: subject(cluster, "prefill", worker.id, KvDump.verb) }], dump),
  ])
}
