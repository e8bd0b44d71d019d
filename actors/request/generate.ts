/**
 * The life of one request: place -> reserve at decode -> prefill -> relay tokens. What fails and may be tried again is
 * placed again with the tokens so far, so that a dead worker costs time and not the answer; what a worker gives away goes on
 * elsewhere at once, with the KV that it has left there.
 */
import { Effect, Exit } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes, providerName, spans } from "../../config/telemetry.ts"
import { Fault } from "../runtime/fault.ts"
import type { Link } from "../runtime/link.ts"
import type { StreamReader } from "../runtime/stream-reader.ts"
import type { StreamWriter } from "../runtime/stream-writer.ts"
import { messageAttributes } from "../runtime/trace-context.ts"
import { decodeDecodeFrame, Finish, Reserve, type Transfer } from "../messages/decode.ts"
import { packHashes } from "../messages/hashes.ts"
import { Prefill } from "../messages/prefill.ts"
import { Generate, type GenerateMessage } from "../messages/request.ts"
import { Place, Prefilled, Release, type Placement } from "../messages/scheduler.ts"
import { anyId, subject } from "../messages/subjects.ts"
import type { Members } from "../presence/members.ts"
import { pinConversation } from "./pin-conversation.ts"
import type { Prepared, ServedModel } from "./prepare.ts"
import { Recovery } from "./recovery.ts"
import { Relay } from "./relay.ts"

export interface GenerateOptions {
  readonly link: Link
  readonly namespace: string
  readonly model: ServedModel
  readonly members: Members
}

/** Serves one request into `writer`; fails with the Fault that the client gets. */
export const generate = (options: GenerateOptions, message: GenerateMessage, request: Prepared, writer: StreamWriter): Effect.Effect<void, Fault> =>
  Effect.gen(function* () {
    const { link, namespace, model, members } = options
    const { requestId, choices } = message
    const recovery = new Recovery(link.sender, message.attempt)
    const relay = new Relay({
      sender: link.sender,
      tokenizer: model.tokenizer,
      message,
      request,
      writer,
      onToken: () => recovery.progressed(),
      onStopped: ({ worker, id: transferId, epoch }, choice) => void Effect.runFork(Effect.ignore(link.tell(Finish, subject(namespace, "decode", worker, Finish.verb), { transferId, choice }, { epoch }))),
    })
    const scheduler = (verb: string) => subject(namespace, "scheduler", anyId, verb)
    const key = () => ({ requestId, attempt: recovery.attempt })
    const delivered = () => Math.max(0, ...request.outputs.map(({ tokens }) => tokens.length))

    const place = Effect.gen(function* () {
      const begun = recovery.attempt > 0 || delivered() > 0
      const tokens = request.prompt.length + delivered()
      const movedFrom = delivered() > 0 ? recovery.movedFrom : undefined
      const asked = { ...key(), tokens, hashes: packHashes(request.chain()), choices, maxTokens: request.maxTokens, exclude: recovery.exclude, begun, movedFrom }
      const placement = yield* link.ask(Place, scheduler(Place.verb), asked, { hop: "scheduler", deadlineMs: limits.placementDeadlineMs })
      if (placement.epoch < members.latestEpoch("scheduler")) return yield* Effect.fail(new Fault({ code: "stale", message: `scheduler: epoch ${placement.epoch} is over`, hop: "scheduler" }))
      // The worker that gives it away has all of its full blocks, and the scheduler may not have heard of the last ones.
      const blocks = Math.floor((tokens - 1) / model.blockTokens)
      return movedFrom === undefined || blocks === 0 ? placement : { ...placement, holder: { worker: movedFrom, blocks } }
    })

    const run = (placement: Placement, attempt: number) =>
      Effect.gen(function* () {
        const sequence = { ...request.sequence(attempt), promptLogprobs: relay.wantsScores }
        // Choices that have parted already have KV of their own each: decode computes these itself.
        const parted = choices > 1 && delivered() > 0
        const prefillWorker = parted ? placement.decode : placement.prefill
        const epochOf = (worker: string) => (worker === placement.decode ? placement.epochs.decode : placement.epochs.prefill)
        const decode = yield* opened(link.open(Reserve, subject(namespace, "decode", placement.decode, Reserve.verb), { ...sequence, prefillWorker }, { hop: `decode ${placement.decode}`, epoch: placement.epochs.decode }))
        const transfer = yield* plain(() => reserved(decode))
        let isBegun = false
        let onBegun = () => {}
        const begun = new Promise<void>((resolve) => (onBegun = resolve)).then(() => void (isBegun = true))
        const prefillOn = (worker: string) =>
          Effect.gen(function* () {
            const stream = yield* opened(link.open(Prefill, subject(namespace, "prefill", worker, Prefill.verb), { sequence, transfer, holder: placement.holder }, { hop: `prefill ${worker}`, epoch: epochOf(worker) }))
            yield* plain(() => relay.prefill(stream, transfer, onBegun))
          }).pipe(whileServing(members, worker), Effect.scoped)
        // Where decode has its tokens and knows the reservation no more, it has ended: its own stream tells how.
        const unlessOver = (late: Fault) => (isBegun && (late.code === "unavailable" || late.code === "stale") ? Effect.void : Effect.fail(late))
        // A prefill that fails elsewhere, even after its first tokens, is decode's own to do: its reservation stands.
        const prefilled = prefillOn(prefillWorker).pipe(
          Effect.catch((fault) => (fault.retryable && prefillWorker !== transfer.worker ? Effect.catch(prefillOn(transfer.worker), unlessOver) : Effect.fail(fault))),
        )
        const told = Effect.andThen(Effect.promise(() => begun), link.tell(Prefilled, scheduler(Prefilled.verb), { requestId, attempt }))
        yield* Effect.raceFirst(Effect.andThen(Effect.all([prefilled, told], { concurrency: "unbounded" }), Effect.never), plain(() => relay.decode(decode, transfer, begun)))
      }).pipe(whileServing(members, placement.decode), Effect.scoped, Effect.tapError((fault) => Effect.sync(() => recovery.failedAt(placement.decode, fault))))

    const attempt = Effect.suspend(() => {
      const placed = key()
      const work = Effect.flatMap(place, (placement) => {
        recovery.placements++
        return run(placement, placed.attempt)
      })
      return Effect.onExit(work, () => Effect.ignore(link.tell(Release, scheduler(Release.verb), placed)))
    })

    while (!relay.finished) {
      const outcome = yield* Effect.exit(attempt)
      if (Exit.isSuccess(outcome)) break
      const fault = yield* Effect.flip(Effect.failCause(outcome.cause))
      const delayMs = recovery.delayMs(fault, performance.now())
      if (delayMs === undefined) return yield* Effect.fail(fault)
      yield* Effect.sleep(delayMs)
    }
    const usage = relay.done()
    yield* Effect.annotateCurrentSpan({
      [attributes.placements]: recovery.placements,
      [attributes.usageInputTokens]: usage.promptTokens,
      [attributes.usageOutputTokens]: usage.completionTokens,
      [attributes.usageCachedInputTokens]: usage.cachedTokens,
      [attributes.responseFinishReasons]: request.outputs.map(({ finish }) => finish ?? "length"),
    })
    const { tenant, conversation } = message
    if (conversation !== undefined) Effect.runFork(pinConversation(options, { tenant, conversation, hashes: request.filled(), leaseMs: limits.conversationPinMs }))
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

const reserved = async (stream: StreamReader): Promise<Transfer> => {
  const frame = await stream.next()
  const first = frame === undefined ? undefined : decodeDecodeFrame(frame)
  if (first?.type !== "reserved") throw new Fault({ code: "internal", message: "decode: the reservation did not come first", hop: "decode" })
  return first.transfer
}

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
