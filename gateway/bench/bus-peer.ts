/** The program of the other process of `bench bus`: it answers asks and counts messages. */
import { Effect, Exit, Schema, Scope } from "effect"
import type { NatsAddress } from "../../config/topology.ts"
import { inboxPrefix, subject, transferSubject } from "../../actors/messages/subjects.ts"
import { actor, onAsk } from "../../actors/runtime/actor.ts"
import type { Bus } from "../../actors/runtime/bus.ts"
import { defineAsk } from "../../actors/runtime/codec.ts"
import { Link } from "../../actors/runtime/link.ts"
import { NatsBus } from "../../actors/runtime/nats-bus.ts"

export const namespace = "bench"
export const Ping = defineAsk("ping", Schema.Struct({ number: Schema.Int }), Schema.Struct({ number: Schema.Int }))
export const pingSubject = subject(namespace, "request", "peer", Ping.verb)
export const countedSubject = transferSubject(namespace, "messages", "chunk")

export interface BusOrder {
  readonly nats: NatsAddress
}

/** Answers pings, and says on `progress` when as many messages have come as the last one's text says. */
export const serveBus = (bus: Bus): Effect.Effect<void, never, Scope.Scope> =>
  Effect.gen(function* () {
    yield* actor(new Link(bus, "peer", 1), [onAsk(Ping, [{ subject: pingSubject }], (message) => Effect.succeed(message))])
    let came = 0
    bus.subscribe(countedSubject, ({ data }) => {
      came++
      if (data[0] === 0) return
      bus.publish(transferSubject(namespace, "messages", "progress"), new Uint8Array(Uint32Array.of(came).buffer))
      came = 0
    })
  })

export const connectBus = (nats: NatsAddress, id: string): Promise<NatsBus> => NatsBus.connect({ ...nats, name: `bench ${id}`, inboxPrefix: inboxPrefix(namespace, "gateway", id) })

/** For the program below: serves until the process ends. */
export const serveOverNats = async ({ nats }: BusOrder): Promise<void> => {
  const bus = await connectBus(nats, "peer")
  const scope = Effect.runSync(Scope.make())
  await Effect.runPromise(Scope.provide(serveBus(bus), scope))
  process.once("exit", () => void Effect.runFork(Scope.close(scope, Exit.void)))
  await bus.flush()
}
