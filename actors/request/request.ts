/**
 * The request actor: owns requests from their text to their text. It renders and tokenises, asks for a place, and turns
 * the tokens that come back into deltas. A later attempt at a request fences the earlier one. Where it is to leave, it gives
 * its requests back to their gateways, which go on elsewhere with what they have.
 */
import { Deferred, Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { actor, onAsk, onStream, onTell } from "../runtime/actor.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamWriter } from "../runtime/stream-writer.ts"
import { Detokenize, EndConversation, Generate, Tokenize, type GenerateMessage } from "../messages/request.ts"
import { anyId, subject } from "../messages/subjects.ts"
import { Drain, type Drained } from "../messages/worker.ts"
import type { Members } from "../presence/members.ts"
import { packTokens } from "../messages/tokens.ts"
import { generate } from "./generate.ts"
import { pinConversation } from "./pin-conversation.ts"
import { prepare, type ServedModel } from "./prepare.ts"

export interface RequestActorOptions {
  readonly link: Link
  readonly namespace: string
  readonly id: string
  readonly model: ServedModel
  /** Who serves, so that a request does not wait for a worker that is gone. */
  readonly members: Members
}

interface Served {
  readonly attempt: number
  readonly fence: Deferred.Deferred<never, Fault>
}

const pollMs = 10

/** Runs a request actor until the Scope closes; what it serves then is given back before anything else ends. */
export const requestActor = (options: RequestActorOptions): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function* () {
    const { link, namespace, id, model } = options
    const serving = new Map<string, Served>()
    const places = (verb: string) => [
      { subject: subject(namespace, "request", id, verb) },
      { subject: subject(namespace, "request", anyId, verb), queue: "request" },
    ]
    let leaving = false
    const fault = (code: "cancelled" | "invalid_request" | "moved", message: string, param?: string) => new Fault({ code, message: `${link.sender}: ${message}`, hop: link.sender, param })

    const serve = (message: GenerateMessage, writer: StreamWriter): Effect.Effect<void, Fault> =>
      Effect.gen(function* () {
        const { requestId, attempt } = message
        if (leaving) return yield* Effect.fail(fault("moved", "serves no more")) // it was on its way already
        const earlier = serving.get(requestId)
        if (earlier !== undefined && earlier.attempt >= attempt) return yield* Effect.fail(fault("invalid_request", `attempt ${earlier.attempt} of request ${requestId} is served already`))
        if (earlier !== undefined) yield* Deferred.fail(earlier.fence, fault("cancelled", `attempt ${attempt} of the request has taken over`))
        const served: Served = { attempt, fence: yield* Deferred.make<never, Fault>() }
        serving.set(requestId, served)
        const work = Effect.flatMap(
          Effect.try({ try: () => prepare(model, message), catch: (error) => Fault.from(error, link.sender) }),
          (request) => generate(options, message, request, writer),
        )
        yield* Effect.raceFirst(work, Deferred.await(served.fence)).pipe(
          Effect.ensuring(Effect.sync(() => void (serving.get(requestId) === served && serving.delete(requestId)))),
        )
      })

    const { tokenizer } = model
    const detokenize = (tokens: ReadonlyArray<number>) =>
      Effect.suspend(() => {
        const outside = tokens.find((token) => token >= tokenizer.vocabulary)
        if (outside !== undefined) return Effect.fail(fault("invalid_request", `tokens: ${outside} is not in 0 … ${tokenizer.vocabulary - 1}`, "tokens"))
        return Effect.succeed({ content: tokenizer.decode(tokens, { skipControl: false }) })
      })

    const running = yield* actor(link, [
      onStream(Generate, places(Generate.verb), serve),
      onTell(EndConversation, places(EndConversation.verb), ({ tenant, conversation }) => Effect.asVoid(Effect.forkDetach(pinConversation(options, { tenant, conversation, hashes: [], leaseMs: 0 })))),
      onAsk(Tokenize, places(Tokenize.verb), ({ content }) => Effect.try({ try: () => ({ tokens: packTokens(tokenizer.encode(content, { special: true })) }), catch: (error) => Fault.from(error, link.sender) })),
      onAsk(Detokenize, places(Detokenize.verb), ({ tokens }) => detokenize(tokens)),
      onAsk(Drain, [{ subject: subject(namespace, "request", id, Drain.verb) }], ({ deadlineMs }) => drain(deadlineMs), { concurrent: true }),
    ])
    const idle: Effect.Effect<void> = Effect.suspend(() => (serving.size === 0 ? Effect.void : Effect.andThen(Effect.sleep(pollMs), idle)))
    const drain = (deadlineMs: number) =>
      Effect.gen(function* () {
        leaving = true
        running.leave("queues") // first, or what is given back would come here again
        const untilMs = performance.now() + deadlineMs
        const given = [...serving.values()]
        // In half of the time at most, so that the others have the rest.
        const together = Math.max(limits.movesAtOnce, Math.ceil((given.length * limits.moveSpacingMs * 2) / deadlineMs))
        for (const [i, { fence }] of given.entries()) {
          if (i > 0 && i % together === 0) yield* Effect.sleep(limits.moveSpacingMs)
          yield* Deferred.fail(fence, fault("moved", "serves no more"))
        }
        yield* Effect.timeoutOrElse(idle, { duration: Math.max(0, untilMs - performance.now()), orElse: () => Effect.void })
        return { moved: given.length - serving.size, finished: 0, left: serving.size } satisfies Drained
      })
    yield* Effect.addFinalizer(() => drain(limits.leaveDeadlineMs))
  })
