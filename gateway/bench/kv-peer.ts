/**
 * A pool of a bench: one engine with a reservation that fills it, and the two ends of a transfer over it, next to messages
 * of the same size with nothing in them.
 */
import { randomBytes } from "node:crypto"
import { availableParallelism } from "node:os"
import type { NatsAddress } from "../../config/topology.ts"
import { limits } from "../../config/limits.ts"
import { crc32c, Engine as Kernels } from "../../kernels/index.ts"
import { Engine } from "../../actors/engine/engine.ts"
import type { KvLayout } from "../../actors/engine/worker.ts"
import { defaultSampling } from "../../actors/messages/sampling.ts"
import { inboxPrefix, transferSubject } from "../../actors/messages/subjects.ts"
import { connectBuses } from "../../actors/runtime/nats-bus.ts"
import { poolSink } from "../../actors/transfer/pool.ts"
import { TransferReceiver } from "../../actors/transfer/transfer-receiver.ts"

export const namespace = "bench"
export const blockTokens = 16
/** Blocks of a transfer: a prompt of 2,048 tokens. */
export const transferBlocks = 128
/** Blocks of a chunk: those of one step. */
export const chunkBlocks = limits.stepTokens / blockTokens
const reservation = "bench"

export type KvOrder =
  | { readonly type: "open"; readonly nats: NatsAddress; readonly id: string; readonly path: string | undefined }
  | { readonly type: "receive"; readonly transferId: string }
  | { readonly type: "count"; readonly transferId: string; readonly bytes: number }
  | { readonly type: "publish"; readonly transferId: string; readonly messages: number; readonly messageBytes: number }

export type Pool = { readonly engine: Engine; readonly kv: KvLayout }

/** An engine whose reservation holds `transferBlocks` blocks of bytes that do not compress. */
export const openPool = async (path: string, device = "cpu"): Promise<Pool> => {
  const kernels = await Kernels.load({ path, device, blocks: transferBlocks + 1, blockTokens, threads: availableParallelism(), maxRows: 1, maxOutputs: 1, maxContext: (transferBlocks + 1) * blockTokens })
  const engine = new Engine(kernels, { name: "bench", maxBatch: 1 })
  const prompt = Int32Array.from({ length: transferBlocks * blockTokens }, (_, i) => i % kernels.info.vocabulary)
  await new Promise<void>((resolve, reject) => {
    const spec = { id: reservation, requestId: reservation, hashRoot: "0".repeat(32), prompt, delivered: [], choices: 1, finished: [], sampling: { ...defaultSampling, seed: 0 }, maxTokens: 1, stopTokens: new Set<number>(), suppressedTokens: [], logprobs: -1, promptLogprobs: false }
    engine.reserve(spec, { reserved: () => resolve(), token: () => {}, ended: () => {}, failed: reject, writable: () => true })
  })
  const { layers, layerBlockBytes } = kernels.info
  const blocks = engine.reserved(reservation)
  const bytes = new Uint8Array(transferBlocks * layerBlockBytes)
  for (let layer = 0; layer < layers; layer++) {
    for (let i = 0, word = layer + 1; i < bytes.length; i += 4) {
      word = Math.imul(word, 1664525) + 1013904223
      bytes[i] = word >>> 24
      bytes[i + 2] = word >>> 16
    }
    blocks.take({ firstLayer: layer, layers: 1, firstBlock: 0, blocks: transferBlocks }, bytes, 0, crc32c(bytes, 0))
  }
  return { engine, kv: { layers, dtype: "f16", blockTokens, layerBlockBytes } }
}

export const poolId = reservation

export const connectPool = (nats: NatsAddress, id: string) => connectBuses({ ...nats, name: `bench ${id}`, inboxPrefix: inboxPrefix(namespace, "worker", id) })

/** The server is asked how far it is this often, and this many answers may be due: enough to keep everybody busy. */
const rawFlushBytes = 4 * 1024 * 1024
const rawFlushes = 4

/** Publishes as fast as it can; resolves with the megabytes a second, once the other end has said that it has all. */
const publishRaw = async ({ control, bulk }: Awaited<ReturnType<typeof connectPool>>, { transferId, messages, messageBytes }: Extract<KvOrder, { readonly type: "publish" }>): Promise<number> => {
  const message = randomBytes(messageBytes)
  const done = new Promise<void>((resolve) => {
    const subscription = control.subscribe(transferSubject(namespace, transferId, "status"), () => {
      subscription.unsubscribe()
      resolve()
    })
  })
  await control.flush()
  const subject = transferSubject(namespace, transferId, "chunk")
  const startedAtMs = performance.now()
  const flushes: Array<Promise<void>> = []
  for (let sent = 1, asked = 0; sent <= messages; sent++) {
    bulk.publish(subject, message)
    if (sent * messageBytes - asked < rawFlushBytes) continue
    asked = sent * messageBytes
    flushes.push(bulk.flush())
    if (flushes.length >= rawFlushes) await flushes.shift()
  }
  await done
  return (messages * messageBytes) / 1000 / (performance.now() - startedAtMs)
}

/** What another process does; a rate is the answer to `publish`. */
export const servingPeer = () => {
  let pool: Pool | undefined
  let buses: Awaited<ReturnType<typeof connectPool>>
  const ready = () => Promise.all([buses.control.flush(), buses.bulk.flush()])
  return async (order: KvOrder): Promise<number | undefined> => {
    if (order.type === "open") {
      buses = await connectPool(order.nats, order.id)
      if (order.path !== undefined) pool = await openPool(order.path)
      return undefined
    }
    if (order.type === "publish") return publishRaw(buses, order)
    const { transferId } = order
    if (order.type === "receive") {
      if (pool === undefined) throw new Error("this process has no pool")
      const receiver = new TransferReceiver({ ...buses, namespace, transferId, sink: poolSink(pool.kv, pool.engine.reserved(reservation)), firstBlock: 0, blocks: transferBlocks, creditBytes: limits.kvWindowBytes, hop: "bench" })
      receiver.done.catch(() => {}) // the sender hears it
    } else {
      let left = order.bytes
      const counting = buses.bulk.subscribe(transferSubject(namespace, transferId, "chunk"), ({ data }) => {
        left -= data.byteLength
        if (left > 0) return
        counting.unsubscribe()
        buses.control.publish(transferSubject(namespace, transferId, "status"), new Uint8Array(0))
      })
    }
    await ready()
    return undefined
  }
}
