/**
 * The actor: a bounded mailbox and a loop inside a Scope. Messages are handled in order, one at a time; asks that may wait
 * and streams get a fibre each, of a bounded number. A bad message or a failed handler is answered with a fault and
 * harms nobody else; leaving the Scope answers what is queued and interrupts what runs. What an earlier incarnation asks, or
 * asks of one, is answered `stale`.
 */
import { Cause, Effect, Exit, FiberSet, Option, Queue, Result, Scope } from "effect"
import { limits } from "../../config/limits.ts"
import { header, protocolVersion, type Delivery, type Subscription } from "./bus.ts"
import { encodeFault, type MessageType } from "./codec.ts"
import { Fault } from "./fault.ts"
import { Fences } from "./fences.ts"
import type { Link } from "./link.ts"
import { StreamWriter } from "./stream-writer.ts"
import { spanOf } from "./trace-context.ts"

/** Where messages of one type are received, and what is done with them. */
export interface Handler {
  readonly subjects: ReadonlyArray<{ readonly subject: string; readonly queue?: string }>
  readonly concurrent: boolean
  readonly run: (delivery: Delivery, link: Link) => Effect.Effect<void>
}

type Places = Handler["subjects"]

/** A message that changes the actor's state, in order. */
export const onTell = <A>(type: MessageType<A, void, "tell">, subjects: Places, handle: (message: A) => Effect.Effect<void, Fault>): Handler => ({
  subjects,
  concurrent: false,
  run: (delivery, link) => Effect.flatMap(decoded(type, delivery), handle).pipe(Effect.catchCause((cause) => logCause(link, type, cause))),
})

/** A message that is answered once. `concurrent`: the answer may have to wait, so others go on meanwhile. */
export const onAsk = <A, R>(
  type: MessageType<A, R, "ask">,
  subjects: Places,
  handle: (message: A) => Effect.Effect<R, Fault>,
  options: { readonly concurrent?: boolean } = {},
): Handler => ({
  subjects,
  concurrent: options.concurrent ?? false,
  run: (delivery, link) =>
    Effect.flatMap(decoded(type, delivery), handle).pipe(
      withinBudget(delivery, link, type),
      Effect.flatMap((answer) => Effect.try({ try: () => delivery.reply !== undefined && link.reply(type, delivery.reply, answer), catch: (error) => Fault.from(error, link.sender) })),
      // Also when the actor leaves, which interrupts the handler: whoever asked is told.
      Effect.onExit((exit) => Effect.sync(() => Exit.isFailure(exit) && refuse(link, delivery, faultOf(exit.cause, link, type)))),
      Effect.catchCause(() => Effect.void),
    ),
})

/**
 * A message that is answered by a stream. The handler's fibre is interrupted when the reader cancels or dies; the stream
 * ends with the handler: normally, or with its fault.
 */
export const onStream = <A>(
  type: MessageType<A, void, "stream">,
  subjects: Places,
  handle: (message: A, writer: StreamWriter) => Effect.Effect<void, Fault>,
): Handler => ({
  subjects,
  concurrent: true,
  run: (delivery, link) =>
    Effect.suspend(() => {
      const writer = new StreamWriter(link.bus, delivery, link.sender)
      const closed = Effect.callback<never, Fault>((resume) => writer.onClose((fault) => fault !== undefined && resume(Effect.fail(fault))))
      return Effect.flatMap(decoded(type, delivery), (message) => handle(message, writer)).pipe(
        Effect.raceFirst(closed),
        withinBudget(delivery, link, type),
        Effect.onExit((exit) =>
          Effect.sync(() => {
            if (Exit.isSuccess(exit)) writer.end()
            else writer.fail(faultOf(exit.cause, link, type))
          }),
        ),
        Effect.catchCause(() => Effect.void),
      )
    }).pipe(Effect.catchCause((cause) => logCause(link, type, cause))),
})

/** A running actor. */
export interface Actor {
  /** Hears nothing more, or nothing that is asked of anyone of a queue group; what is here already goes on. */
  leave(what: "everything" | "queues"): void
}

/** Runs an actor until its Scope closes. */
export const actor = (link: Link, handlers: ReadonlyArray<Handler>): Effect.Effect<Actor, never, Scope.Scope> =>
  Effect.gen(function* () {
    const mailbox = yield* Queue.bounded<{ readonly handler: Handler; readonly delivery: Delivery }>(limits.mailboxMessages)
    const running = yield* FiberSet.make<void>()
    const leaving = new Fault({ code: "shutting_down", message: `${link.sender}: is leaving`, hop: link.sender, retryAfterMs: limits.retryAfterMs })
    const fences = new Fences()
    const subscriptions: Array<{ readonly subscription: Subscription; readonly isQueue: boolean }> = []
    const crowded = new Fault({ code: "overloaded", message: `${link.sender}: too many messages`, hop: link.sender, retryAfterMs: limits.retryAfterMs })

    yield* Effect.addFinalizer(() =>
      Effect.map(Queue.clear(mailbox), (queued) => {
        for (const { delivery } of queued) refuse(link, delivery, leaving)
      }),
    )
    const step = Effect.gen(function* () {
      const { handler, delivery } = yield* Queue.take(mailbox)
      const work = handler.run(delivery, link).pipe(withCallersTrace(delivery))
      if (!handler.concurrent) return yield* work
      if ((yield* FiberSet.size(running)) >= limits.actorStreams) return refuse(link, delivery, crowded)
      yield* FiberSet.run(running, work)
    })
    yield* Effect.forkScoped(Effect.forever(step))
    for (const handler of handlers) {
      for (const { subject, queue } of handler.subjects) {
        const subscription = yield* Effect.acquireRelease(
          Effect.sync(() =>
            link.bus.subscribe(
              subject,
              (delivery) => {
                const version = delivery.headers[header.version]
                if (version !== protocolVersion) {
                  refuse(link, delivery, new Fault({ code: "invalid_request", message: `${link.sender}: speaks protocol version ${protocolVersion}, not ${version ?? "none"}`, hop: link.sender }))
                } else if (!isForMe(link, delivery, fences)) {
                  return
                } else if (!Queue.offerUnsafe(mailbox, { handler, delivery })) refuse(link, delivery, crowded)
              },
              queue === undefined ? {} : { queue },
            ),
          ),
          (subscribed) => Effect.sync(() => subscribed.unsubscribe()),
        )
        subscriptions.push({ subscription, isQueue: queue !== undefined })
      }
    }
    const leave = (subscription: Subscription) => (subscription.drain === undefined ? subscription.unsubscribe() : subscription.drain())
    return { leave: (what) => subscriptions.forEach(({ subscription, isQueue }) => (isQueue || what === "everything") && leave(subscription)) }
  })

/** Whether a message is from a living incarnation to this one; one that is not is answered `stale`, by the hop that is over. */
const isForMe = (link: Link, delivery: Delivery, fences: Fences): boolean => {
  const { headers, reply } = delivery
  const stale = (hop: string, message: string) => refuse(link, delivery, new Fault({ code: "stale", message: `${link.sender}: ${message}`, hop }))
  const meant = headers[header.toEpoch]
  // A later incarnation hears it too.
  if (meant !== undefined && Number(meant) > link.epoch) return false
  if (meant !== undefined && Number(meant) < link.epoch) {
    stale(link.sender, `epoch ${meant} is over, this is ${link.epoch}`)
    return false
  }
  // What is told names its incarnation itself, or is true whoever says it.
  if (reply === undefined || !fences.isStale(headers, performance.now())) return true
  const sender = headers[header.sender]!
  stale(sender, `epoch ${headers[header.epoch]} of ${sender} is over`)
  return false
}

const decoded = <A>(type: MessageType<A, unknown>, delivery: Delivery): Effect.Effect<A, Fault> =>
  Effect.try({ try: () => type.decode(delivery.data), catch: (error) => Fault.from(error, type.verb) })

const withinBudget =
  (delivery: Delivery, link: Link, type: { readonly verb: string }) =>
  <A, R>(work: Effect.Effect<A, Fault, R>): Effect.Effect<A, Fault, R> => {
    const stated = Number(delivery.headers[header.budgetMs])
    const budgetMs = Number.isFinite(stated) ? Math.min(Math.max(stated, 0), limits.requestDeadlineMs) : limits.requestDeadlineMs
    const late = new Fault({ code: "deadline_exceeded", message: `${link.sender}: ${type.verb}: not done within ${budgetMs} ms`, hop: link.sender })
    return Effect.timeoutOrElse(work, { duration: budgetMs, orElse: () => Effect.fail(late) })
  }

const withCallersTrace = (delivery: Delivery) => {
  const caller = spanOf(delivery.headers[header.traceparent])
  return <A, E>(work: Effect.Effect<A, E>) => (caller === undefined ? work : Effect.withParentSpan(work, caller))
}

const refuse = (link: Link, delivery: Delivery, fault: Fault): void => {
  if (delivery.reply === undefined) return
  try {
    link.bus.publish(delivery.reply, encodeFault(fault), { headers: { [header.sender]: link.sender, [header.fault]: fault.code } })
  } catch {
    // The bus is closed: the asker's own deadline tells it.
  }
}

const faultOf = (cause: Cause.Cause<Fault>, link: Link, type: { readonly verb: string }): Fault => {
  const fault = Cause.findErrorOption(cause)
  if (Option.isSome(fault)) return fault.value
  if (Cause.hasInterruptsOnly(cause)) return new Fault({ code: "shutting_down", message: `${link.sender}: stopped`, hop: link.sender, retryAfterMs: limits.retryAfterMs })
  console.error(`${link.sender}: ${type.verb}: ${Cause.pretty(cause)}`)
  return Fault.from(undefined, link.sender)
}

const logCause = (link: Link, type: { readonly verb: string }, cause: Cause.Cause<Fault>): Effect.Effect<void> =>
  Effect.sync(() => void (Cause.hasInterruptsOnly(cause) || console.error(`${link.sender}: ${type.verb}: ${Result.match(Cause.findError(cause), { onSuccess: (fault) => fault.message, onFailure: Cause.pretty })}`)))
