/**
 * `bench bus`: how long an ask takes from actor to actor and back, and how many messages a second get from a publisher to a
 * subscriber: over a nats-server between two processes, and over memory inside one, as `up` has it.
 */
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import { superviseNatsServer } from "../../actors/node/nats-server.ts"
import { inboxPrefix, transferSubject } from "../../actors/messages/subjects.ts"
import { BridgeBus } from "../../actors/runtime/bridge-bus.ts"
import type { Bus } from "../../actors/runtime/bus.ts"
import { Link } from "../../actors/runtime/link.ts"
import { NatsBus } from "../../actors/runtime/nats-bus.ts"
import { namespace, connectBus, countedSubject, Ping, pingSubject, serveBus, type BusOrder } from "./bus-peer.ts"
import { median, quantile, rounded } from "./figures.ts"
import { table } from "../table.ts"
import { peerProcess } from "./peer.ts"
import { TimeBudget } from "./time-budget.ts"

/** Fewer where they would take too long. */
const rounds = 7
const leastRounds = 3
const asksOfRound = 1_000
const messagesOfRound = 50_000
const messageBytes = 128
/** The server is waited for this often, since a client that is only told to send keeps everything. */
const flushEvery = 10_000

export interface BusFigures {
  /** Microseconds of an ask. */
  readonly roundTripP50Us: number
  readonly roundTripP99Us: number
  readonly messagesPerS: number
}

const roundTrips = async (bus: Bus): Promise<Array<number>> => {
  const link = new Link(bus, "bench", 1)
  const tookUs: Array<number> = []
  for (let number = 0; number < asksOfRound; number++) {
    const startedAtMs = performance.now()
    await Effect.runPromise(link.ask(Ping, pingSubject, { number }, { hop: "peer" }))
    tookUs.push((performance.now() - startedAtMs) * 1000)
  }
  return tookUs
}

const messagesPerS = async (bus: Bus): Promise<number> => {
  const message = new Uint8Array(messageBytes)
  const counted = new Promise<number>((resolve) => {
    const subscription = bus.subscribe(transferSubject(namespace, "messages", "progress"), ({ data }) => {
      subscription.unsubscribe()
      resolve(new DataView(data.buffer, data.byteOffset).getUint32(0, true))
    })
  })
  const startedAtMs = performance.now()
  for (let sent = 1; sent < messagesOfRound; sent++) {
    bus.publish(countedSubject, message)
    if (sent % flushEvery === 0) await (bus instanceof NatsBus ? bus.flush() : undefined)
  }
  bus.publish(countedSubject, message.slice().fill(1))
  const came = await counted
  return (came * 1000) / (performance.now() - startedAtMs)
}

const measure = async (buses: ReadonlyArray<Bus>, time: TimeBudget): Promise<ReadonlyArray<BusFigures>> => {
  const rows = buses.map(() => ({ p50: [] as Array<number>, p99: [] as Array<number>, rates: [] as Array<number> }))
  for (let round = 0; round <= rounds && (round <= leastRounds || time.leftMs > 0); round++) {
    for (const [i, bus] of buses.entries()) {
      const tookUs = await roundTrips(bus)
      const rate = await messagesPerS(bus)
      if (round === 0) continue // code is being compiled
      rows[i]!.p50.push(quantile(tookUs, 0.5))
      rows[i]!.p99.push(quantile(tookUs, 0.99))
      rows[i]!.rates.push(rate)
    }
  }
  return rows.map(({ p50, p99, rates }) => ({ roundTripP50Us: rounded(median(p50)), roundTripP99Us: rounded(median(p99)), messagesPerS: Math.round(median(rates)) }))
}

const program = fileURLToPath(new URL("./bus-process.ts", import.meta.url))

/** Measures both. */
export const busFigures: Effect.Effect<{ readonly nats: BusFigures; readonly memory: BusFigures }, Error, Scope.Scope> = Effect.gen(function* () {
  const time = new TimeBudget()
  const server = yield* superviseNatsServer()
  const nats = { url: server.url, token: server.token }
  const peer = yield* peerProcess<BusOrder, void>(program)
  yield* Effect.promise(() => peer.ask({ nats }))
  const overNats = yield* Effect.acquireRelease(Effect.promise(() => connectBus(nats, "bench")), (bus) => Effect.promise(() => bus.close()))
  const inMemory = new BridgeBus({ inboxPrefix: inboxPrefix(namespace, "gateway", "bench") })
  yield* serveBus(inMemory)
  const [first, second] = yield* Effect.promise(() => measure([overNats, inMemory], time))
  return { nats: first!, memory: second! }
})

export const busTable = ({ nats, memory }: Effect.Success<typeof busFigures>): string => {
  const row = (name: string, { roundTripP50Us, roundTripP99Us, messagesPerS: rate }: BusFigures) => [name, `${roundTripP50Us} us`, `${roundTripP99Us} us`, String(rate)]
  return table([["bus", "ask p50", "ask p99", `messages/s (${messageBytes} bytes)`], row("nats, two processes", nats), row("memory", memory)])
}
