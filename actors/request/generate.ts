/**
 * The life of one request: place -> reserve at decode -> prefill -> relay tokens. What fails and may be tried again is
 * placed again with the tokens so far, so that a dead worker costs time and not the answer.
 */
import { Deferred, Effect, Exit } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, providerName, spans } from "../../config/telemetry.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamReader } from "../runtime/stream-reader.ts"
import type { StreamWriter } from "../runtime/stream-writer.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { decodeDecodeFrame, Finish, Reserve, type TokenEvent, type Transfer } from "../messages/decode.ts"
import { packHashes } from "../messages/hashes.ts"
import { decodePrefillFrame, Prefill, type PromptScores } from "../messages/prefill.ts"
import { encodeGenerateEvent, Generate, type GenerateEvent, type GenerateMessage, type TokenLogprob } from "../messages/request.ts"
import { Place, Prefilled, Release, type Placement } from "../messages/scheduler.ts"
import { anyId, subject } from "../messages/subjects.ts"
import { packTokens } from "../messages/tokens.ts"
import type { Members } from "../presence/members.ts"
import { tokenLogprob } from "./choice-output.ts"
import type { Prepared, ServedModel } from "./prepare.ts"

export interface GenerateOptions {
  readonly link: Link
  readonly namespace: string
  readonly model: ServedModel
  readonly members: Members
}

/** Scored prompt tokens of one event: 20 alternatives each still fit a message. */
const scoresOfEvent = 128

/** Serves one request into `writer`; fails with the Fault that the client gets. */
export const generate = (options: GenerateOptions, message: GenerateMessage, request: Prepared, writer: StreamWriter): Effect.Effect<void, Fault> =>
  Effect.gen(function* () {
    const { link, namespace, model, members } = options
    const { outputs } = request
    const finished = () => outputs.every(({ finish }) => finish !== undefined)
    let exclude: ReadonlyArray<string> = []
    let placements = 0
    let cachedTokens: number | undefined
    let failingSinceMs: number | undefined

    const emit = (event: GenerateEvent): void => writer.write(encodeGenerateEvent(event))
    const announce = (cached: number): void => {
      if (cachedTokens !== undefined) return // told by an earlier placement
      cachedTokens = cached
      emit({ type: "prompt", tokens: packTokens(request.prompt), text: request.text, cachedTokens: cached })
    }
    const push = (event: TokenEvent, transfer: Transfer): void => {
      const output = outputs[event.choice]
      if (output === undefined || output.finish !== undefined) return
      if (event.index < output.tokens.length && output.tokens[event.index] === event.token) return // drawn again after a prefill that failed late
      if (event.index !== output.tokens.length) throw new Fault({ code: "internal", message: `${link.sender}: token ${event.index} of choice ${event.choice} came in place of ${output.tokens.length}`, hop: link.sender })
      emit(output.push(event))
      // A stop string is seen here only; decode goes on with the other choices.
      if (event.finish === "" && output.finish !== undefined && !finished()) {
        const { worker, id: transferId } = transfer
        Effect.runFork(Effect.ignore(link.tell(Finish, subject(namespace, "decode", worker, Finish.verb), { transferId, choice: event.choice })))
      }
    }

    const attempt = (key: { readonly requestId: string; readonly attempt: number }) =>
      Effect.gen(function* () {
        const sequence = request.sequence(key.attempt)
        const delivered = Math.max(0, ...outputs.map(({ tokens }) => tokens.length))
        const placement: Placement = yield* link.ask(
          Place,
          subject(namespace, "scheduler", anyId, Place.verb),
          { ...key, tokens: request.prompt.length + delivered, hashes: packHashes(request.hashes), choices: message.choices, maxTokens: request.maxTokens, exclude },
          { hop: "scheduler", deadlineMs: limits.placementDeadlineMs },
        )
        placements++
        yield* Effect.gen(function* () {
          // Choices that have parted already have KV of their own each: decode computes these itself.
          const parted = message.choices > 1 && delivered > 0
          const prefillWorker = parted ? placement.decode : placement.prefill
          const decode = yield* opened(link.open(Reserve, subject(namespace, "decode", placement.decode, Reserve.verb), { ...sequence, prefillWorker }, { hop: `decode ${placement.decode}` }))
          const transfer = yield* plain(() => reserved(decode))
          const prefillOn = (worker: string) =>
            Effect.gen(function* () {
              const stream = yield* opened(link.open(Prefill, subject(namespace, "prefill", worker, Prefill.verb), { sequence, transfer, holder: placement.holder }, { hop: `prefill ${worker}` }))
              yield* plain(() => relayPrefill(stream, transfer, () => Deferred.doneUnsafe(begun, Effect.void)))
            }).pipe(whileServing(members, worker), Effect.scoped)
          const begun = yield* Deferred.make<void>()
          // Where decode has its tokens and knows the reservation no more, it has ended: its own stream tells how.
          const unlessOver = (late: Fault) => Effect.flatMap(Deferred.isDone(begun), (isBegun) => (isBegun && late.code === "unavailable" ? Effect.void : Effect.fail(late)))
          // A prefill that fails elsewhere, even after its first tokens, is decode's own to do: its reservation stands.
          const prefilled = prefillOn(prefillWorker).pipe(
            Effect.catch((fault) => (fault.retryable && prefillWorker !== transfer.worker ? Effect.catch(prefillOn(transfer.worker), unlessOver) : Effect.fail(fault))),
          )
          const relayed = Deferred.await(begun).pipe(
            Effect.andThen(link.tell(Prefilled, subject(namespace, "scheduler", anyId, Prefilled.verb), key)),
            Effect.andThen(plain(() => relayTokens(decode, transfer))),
          )
          yield* Effect.raceFirst(Effect.andThen(prefilled, Effect.never), relayed)
        }).pipe(whileServing(members, placement.decode), Effect.scoped, Effect.tapError(() => Effect.sync(() => void (exclude = [...exclude, placement.decode]))))
      }).pipe(Effect.onExit(() => Effect.ignore(link.tell(Release, subject(namespace, "scheduler", anyId, Release.verb), key))))

    const reserved = async (stream: StreamReader): Promise<Transfer> => {
      const frame = await stream.next()
      const first = frame === undefined ? undefined : decodeDecodeFrame(frame)
      if (first?.type !== "reserved") throw new Fault({ code: "internal", message: "decode: the reservation did not come first", hop: "decode" })
      return first.transfer
    }

    const relayPrefill = async (stream: StreamReader, transfer: Transfer, onBegun: () => void): Promise<void> => {
      const first: Array<TokenEvent> = []
      if (message.promptLogprobs) announce(0)
      if (message.promptLogprobs && scored === 0) emitScores([{ ...tokenLogprob(model.tokenizer, { token: request.prompt[0]!, logprob: 0, topTokens: [], topLogprobs: [] }), logprob: null }])
      // The stream goes on until the KV has arrived, which nobody has to wait for.
      for await (const bytes of stream) {
        const frame = decodePrefillFrame(bytes)
        if (frame.type === "token") first.push(frame.event)
        else if (frame.type === "scores") emitScores(scoresFrom(frame.scores))
        else {
          announce(frame.cachedTokens)
          for (const event of first) push(event, transfer)
          onBegun()
        }
        if (!writer.writable) await writer.untilWritable()
      }
    }

    let scored = 0 // prompt tokens that the client has the scores of
    const scoresFrom = (scores: PromptScores): Array<TokenLogprob> => {
      const { position, width, logprobs, topTokens, topLogprobs } = scores
      return Array.from(logprobs, (logprob, i) => ({ i, logprob }))
        .slice(Math.max(0, scored - position))
        .map(({ i, logprob }) => {
          const tops = (array: Int32Array | Float32Array) => Array.from(array.subarray(i * width, (i + 1) * width))
          return tokenLogprob(model.tokenizer, { token: request.prompt[position + i]!, logprob, topTokens: tops(topTokens), topLogprobs: tops(topLogprobs) })
        })
    }
    const emitScores = (logprobs: ReadonlyArray<TokenLogprob>): void => {
      for (let from = 0; from < logprobs.length; from += scoresOfEvent) emit({ type: "scores", logprobs: logprobs.slice(from, from + scoresOfEvent) })
      scored += logprobs.length
    }

    /** Once a token: plain code, paused while the client is behind, which in turn pauses decode. */
    const relayTokens = async (stream: StreamReader, transfer: Transfer): Promise<void> => {
      if (finished()) return
      for await (const bytes of stream) {
        const frame = decodeDecodeFrame(bytes)
        if (frame.type === "token") push(frame.event, transfer)
        if (finished()) return
        failingSinceMs = undefined
        if (!writer.writable) await writer.untilWritable()
      }
      if (!finished() && request.maxTokens > 0) throw new Fault({ code: "disconnected", message: `decode ${transfer.worker}: ended before the answer`, hop: `decode ${transfer.worker}` })
    }

    for (let tries = 0; !finished(); tries++) {
      const key = { requestId: message.requestId, attempt: message.attempt * limits.placementAttempts + placements }
      const outcome = yield* Effect.exit(attempt(key))
      if (Exit.isSuccess(outcome)) break
      const fault = yield* Effect.flip(Effect.failCause(outcome.cause))
      const nowMs = performance.now()
      failingSinceMs ??= nowMs
      // Where nobody serves now, a worker may be on its way back: that costs time, but none of the placements.
      const last = placements >= limits.placementAttempts || nowMs - failingSinceMs > limits.recoveryDeadlineMs
      if (last || !fault.retryable || fault.code === "overloaded") return yield* Effect.fail(fault)
      yield* Effect.sleep(Math.min(limits.restartDelayMs * 2 ** tries, limits.heartbeatIntervalMs))
    }
    if (cachedTokens === undefined) announce(0)
    // A choice of no tokens has no delta of its own to finish it.
    if (request.maxTokens === 0) for (const { choice } of outputs) emit({ type: "delta", choice, text: "", tokens: [], logprobs: undefined, finish: "length" })
    const completionTokens = outputs.reduce((sum, { tokens }) => sum + tokens.length, 0)
    yield* Effect.annotateCurrentSpan({
      [attributes.placements]: placements,
      [attributes.usageInputTokens]: request.prompt.length,
      [attributes.usageOutputTokens]: completionTokens,
      [attributes.usageCachedInputTokens]: cachedTokens ?? 0,
      [attributes.responseFinishReasons]: outputs.map(({ finish }) => finish ?? "length"),
    })
    // Whoever would have the KV store hold a live conversation's blocks for a while asks it here: those of the prompt and of the
    // answer, but for its last token, whose KV was never computed.
    emit({ type: "done", usage: { promptTokens: request.prompt.length, completionTokens, cachedTokens: cachedTokens ?? 0 } })
  }).pipe(
    Effect.withSpan(spans.requestGenerate, {
      kind: "server",
      attributes: {
        ...messageAttributes(options.link, subject(options.namespace, "request", anyId, Generate.verb)),
        [attributes.operationName]: message.prompt.kind === "chat" ? "chat" : "text_completion",
        [attributes.providerName]: providerName,
        [attributes.requestMaxTokens]: request.maxTokens,
        [attributes.requestId]: message.requestId,
        [attributes.attempt]: message.attempt,
      },
    }),
  )

/** Fails work with a worker that leaves, falls silent or is restarted, without waiting for its stream to fall silent. */
const whileServing =
  (members: Members, worker: string) =>
  <A, R>(work: Effect.Effect<A, Fault, R>): Effect.Effect<A, Fault, R> =>
    Effect.raceFirst(
      work,
      Effect.callback<never, Fault>((resume) => {
        const stop = members.onGone((kind, id) => {
          if (kind === "worker" && id === worker) resume(Effect.fail(new Fault({ code: "disconnected", message: `worker ${worker} is gone`, hop: `worker ${worker}` })))
        })
        return Effect.sync(stop)
      }),
    )

/** A stream that is cancelled when the scope closes, whether it has ended or not. */
const opened = (open: Effect.Effect<StreamReader>) =>
  Effect.acquireRelease(open, (stream) => Effect.sync(() => stream.cancel("the request is over")))

const plain = <A>(run: () => Promise<A>): Effect.Effect<A, Fault> => Effect.tryPromise({ try: run, catch: (error) => Fault.from(error, "request") })
