/** KV from one process's pool to another's, next to messages of the same size that nobody fills or reads. */
import { randomBytes } from "node:crypto"
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import { superviseNatsServer } from "../../actors/node/nats-server.ts"
import { kvChunkHeaderBytes } from "../../actors/messages/kv-chunk.ts"
import { poolSource } from "../../actors/transfer/pool.ts"
import { TransferSender } from "../../actors/transfer/transfer-sender.ts"
import { median, rounded } from "./figures.ts"
import { chunkBlocks, namespace, connectPool, openPool, poolId, transferBlocks, type KvOrder, type Pool } from "./kv-peer.ts"
import { peerProcess, type Peer } from "./peer.ts"
import type { TimeBudget } from "./time-budget.ts"

/** Fewer where they would take too long. */
const rounds = 30
const leastRounds = 5
const warmUpRounds = 3
/** Of the bench's time. */
const share = 0.25

export interface Throughput {
  readonly mbPerS: number
  readonly rawMbPerS: number
  readonly ratio: number
}

type Buses = Awaited<ReturnType<typeof connectPool>>
type Process = Peer<KvOrder, number | undefined>

const transfer = async (pool: Pool, buses: Buses, receiver: Process): Promise<number> => {
  const transferId = randomBytes(16).toString("hex")
  await receiver.ask({ type: "receive", transferId })
  const startedAtMs = performance.now()
  const sender = new TransferSender({ ...buses, namespace, transferId, source: poolSource(pool.kv, pool.engine.computed(poolId)), creditBytes: limits.kvWindowBytes, hop: "bench" })
  for (let firstBlock = 0; firstBlock < transferBlocks; firstBlock += chunkBlocks) {
    for (let firstLayer = 0; firstLayer < pool.kv.layers; firstLayer++) sender.send({ firstLayer, layers: 1, firstBlock, blocks: chunkBlocks })
  }
  sender.finish([])
  const { bytes } = await sender.done
  return bytes / 1000 / (performance.now() - startedAtMs)
}

const raw = async ({ kv }: Pool, publisher: Process, counter: Process): Promise<number> => {
  const transferId = randomBytes(16).toString("hex")
  const messages = (transferBlocks / chunkBlocks) * kv.layers
  const messageBytes = kvChunkHeaderBytes + chunkBlocks * kv.layerBlockBytes
  await counter.ask({ type: "count", transferId, bytes: messages * messageBytes })
  return (await publisher.ask({ type: "publish", transferId, messages, messageBytes })) ?? Number.NaN
}

const program = fileURLToPath(new URL("./kv-process.ts", import.meta.url))

/** Both, in turn. What is raw has processes of its own, so that neither collects the other's garbage. */
export const throughput = (path: string, time: TimeBudget): Effect.Effect<Throughput, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const server = yield* superviseNatsServer()
    const nats: NatsAddress = { url: server.url, token: server.token }
    const start = (id: string, holds: string | undefined) =>
      Effect.tap(peerProcess<KvOrder, number | undefined>(program), (peer) => Effect.tryPromise({ try: () => peer.ask({ type: "open", nats, id, path: holds }), catch: (error) => error as Error }))
    const [receiver, publisher, counter] = yield* Effect.all([start("receiver", path), start("publisher", undefined), start("counter", undefined)], { concurrency: "unbounded" })
    const buses = yield* Effect.acquireRelease(Effect.promise(() => connectPool(nats, "sender")), ({ control, bulk }) => Effect.promise(() => Promise.all([control.close(), bulk.close()])))
    const pool = yield* Effect.acquireRelease(Effect.promise(() => openPool(path)), ({ engine }) => Effect.promise(() => engine.close()))
    const rates: Array<{ readonly kv: number; readonly raw: number }> = []
    const [startedAtMs, longestMs] = [performance.now(), time.share(share)]
    for (let round = -warmUpRounds; round < rounds && (round < leastRounds || performance.now() - startedAtMs < longestMs); round++) {
      const pair = yield* Effect.tryPromise({ try: async () => ({ kv: await transfer(pool, buses, receiver), raw: await raw(pool, publisher, counter) }), catch: (error) => error as Error })
      if (round >= 0) rates.push(pair)
    }
    return { mbPerS: rounded(median(rates.map(({ kv }) => kv))), rawMbPerS: rounded(median(rates.map((pair) => pair.raw))), ratio: rounded(median(rates.map((pair) => pair.kv / pair.raw))) }
  })
