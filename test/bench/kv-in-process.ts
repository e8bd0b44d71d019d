/**
 * KV from one pool to another of the same process, as the disaggregated topology with `bus: memory` moves it: a prompt of 2,048
 * tokens, layer by layer, a step's blocks at a time; written into messages and read from them, and copied from pool to pool.
 *
 *     node --import tsx test/bench/kv-in-process.ts MODEL.gguf [cuda:N [cuda:M]]
 */
import { randomBytes } from "node:crypto"
import { poolSink, poolSource } from "../../actors/transfer/pool.ts"
import { TransferReceiver } from "../../actors/transfer/transfer-receiver.ts"
import { TransferSender } from "../../actors/transfer/transfer-sender.ts"
import { MemoryBus } from "../../actors/runtime/memory-bus.ts"
import { limits } from "../../config/limits.ts"
import { median } from "../../gateway/bench/figures.ts"
import { chunkBlocks, openPool, poolId, transferBlocks, type Pool } from "../../gateway/bench/kv-peer.ts"

const rounds = 40
const warmUpRounds = 5

const bus = new MemoryBus()

/** Megabytes a second, from the first chunk to the receiver's word that it has all. */
const transfer = async (from: Pool, to: Pool, inMessages: boolean): Promise<number> => {
  const common = { control: bus, bulk: bus, namespace: "bench", transferId: randomBytes(16).toString("hex"), creditBytes: limits.kvWindowBytes, hop: "bench" }
  const { blocks, ...sink } = poolSink(to.kv, to.engine.reserved(poolId))
  const receiver = new TransferReceiver({ ...common, sink: inMessages ? sink : { ...sink, blocks: blocks! }, firstBlock: 0, blocks: transferBlocks })
  const startedAtMs = performance.now()
  const sender = new TransferSender({ ...common, source: poolSource(from.kv, from.engine.computed(poolId)) })
  for (let firstBlock = 0; firstBlock < transferBlocks; firstBlock += chunkBlocks) {
    for (let firstLayer = 0; firstLayer < from.kv.layers; firstLayer++) sender.send({ firstLayer, layers: 1, firstBlock, blocks: chunkBlocks })
  }
  sender.finish([])
  const { bytes } = await sender.done
  receiver.close()
  return bytes / 1000 / (performance.now() - startedAtMs)
}

const [path, one = "cpu", other = one] = process.argv.slice(2)
if (path === undefined) throw new Error("usage: kv-in-process.ts MODEL.gguf [cuda:N [cuda:M]]")
const [from, to] = [await openPool(path, one), await openPool(path, other)]
const rates: Record<"messages" | "copies", Array<number>> = { messages: [], copies: [] }
for (let round = -warmUpRounds; round < rounds; round++) {
  const [messages, copies] = [await transfer(from, to, true), await transfer(from, to, false)]
  if (round < 0) continue
  rates.messages.push(messages)
  rates.copies.push(copies)
}
const [messages, copies] = [median(rates.messages), median(rates.copies)]
console.log(`${one} to ${other}: ${Math.round(messages)} MB/s in messages, ${Math.round(copies)} MB/s from pool to pool: ${(copies / messages).toFixed(1)} times`)
await Promise.all([from.engine.close(), to.engine.close()])
