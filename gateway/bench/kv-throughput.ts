/** KV from one process's pool to another's, next to messages of the same size that nobody fills or reads. */
import { randomBytes } from "node:crypto"
import { fileURLToPath } from "node:url"
import { Effect, type Scope } from "effect"
import { limits } from "../../config/limits.ts"
import type { NatsAddress } from "../../config/topology.ts"
import { superviseNatsServer } from "../../actors/node/nats-server.ts"
import type { KvLayout } from "../../actors/engine/worker.ts"
import { kvChunkHeaderBytes } from "../../actors/messages/kv-chunk.ts"
import { transferSubject } from "../../actors/messages/subjects.ts"
import { poolSource } from "../../actors/transfer/pool.ts"
import { TransferSender } from "../../actors/transfer/transfer-sender.ts"
import { median, rounded } from "./figures.ts"
import { chunkBlocks, cluster, connectPool, openPool, poolId, transferBlocks, type KvOrder, type Pool } from "./kv-peer.ts"
import { peerProcess, type Peer } from "./peer.ts"

const rounds = 20
const warmUpRounds = 3
/** The server is asked how far it is this often, and this many answers may be due: enough to keep everybody busy. */
const rawFlushBytes = 4 * 1024 * 1024
const rawFlushes = 4

export interface Throughput {
  readonly mbPerS: number
  readonly rawMbPerS: number
  readonly ratio: number
}

type Buses = Awaited<ReturnType<typeof connectPool>>
type Receiver = Peer<KvOrder, KvLayout | undefined>

const transfer = async (pool: Pool, buses: Buses, peer: Receiver): Promise<number> => {
  const transferId = randomBytes(16).toString("hex")
  await peer.ask({ type: "receive", transferId })
  const startedAtMs = performance.now()
  const sender = new TransferSender({ ...buses, cluster, transferId, source: poolSource(pool, poolId), creditBytes: limits.kvWindowBytes, hop: "bench" })
  for (let firstBlock = 0; firstBlock < transferBlocks; firstBlock += chunkBlocks) {
    for (let firstLayer = 0; firstLayer < pool.kv.layers; firstLayer++) sender.send({ firstLayer, layers: 1, firstBlock, blocks: chunkBlocks })
  }
  sender.finish([])
  const { bytes } = await sender.done
  return bytes / 1000 / (performance.now() - startedAtMs)
}

const raw = async (pool: Pool, { control, bulk }: Buses, peer: Receiver): Promise<number> => {
  const transferId = randomBytes(16).toString("hex")
  const messages = (transferBlocks / chunkBlocks) * pool.kv.layers
  const message = randomBytes(kvChunkHeaderBytes + chunkBlocks * pool.kv.layerBlockBytes)
  const bytes = messages * message.byteLength
  const done = new Promise<void>((resolve) => {
    const subscription = control.subscribe(transferSubject(cluster, transferId, "status"), () => {
      subscription.unsubscribe()
      resolve()
    })
  })
  await Promise.all([control.flush(), peer.ask({ type: "count", transferId, bytes })])
  const subject = transferSubject(cluster, transferId, "chunk")
  const startedAtMs = performance.now()
  const flushes: Array<Promise<void>> = []
  for (let sent = 0, asked = 0; sent < messages; sent++) {
    bulk.publish(subject, message)
    if ((sent + 1) * message.byteLength - asked < rawFlushBytes) continue
    asked = (sent + 1) * message.byteLength
    flushes.push(bulk.flush())
    if (flushes.length >= rawFlushes) await flushes.shift()
  }
  await done
  return bytes / 1000 / (performance.now() - startedAtMs)
}

/** Both, in turn. */
export const throughput = (path: string): Effect.Effect<Throughput, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const server = yield* superviseNatsServer()
    const nats: NatsAddress = { url: server.url, token: server.token }
    const peer = yield* peerProcess<KvOrder, KvLayout | undefined>(fileURLToPath(new URL("./kv-process.ts", import.meta.url)))
    const opened = peer.ask({ type: "open", nats, path })
    const buses = yield* Effect.acquireRelease(Effect.promise(() => connectPool(nats, "sender")), ({ control, bulk }) => Effect.promise(() => Promise.all([control.close(), bulk.close()])))
    const pool = yield* Effect.promise(() => openPool(path))
    yield* Effect.promise(() => opened)
    const rates: Array<{ readonly kv: number; readonly raw: number }> = []
    for (let round = -warmUpRounds; round < rounds; round++) {
      const pair = yield* Effect.promise(async () => ({ kv: await transfer(pool, buses, peer), raw: await raw(pool, buses, peer) }))
      if (round >= 0) rates.push(pair)
    }
    yield* Effect.promise(() => pool.engine.close())
    const mbPerS = median(rates.map(({ kv }) => kv))
    const rawMbPerS = median(rates.map((pair) => pair.raw))
    return { mbPerS: rounded(mbPerS), rawMbPerS: rounded(rawMbPerS), ratio: rounded(median(rates.map((pair) => pair.kv / pair.raw))) }
  })
