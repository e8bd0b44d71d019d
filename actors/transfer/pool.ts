/** KV in a worker's pool, as the ends of a transfer: it goes straight between pool and message, or from pool to pool. */
import { crc32c } from "../../kernels/index.ts"
import type { PoolBlocks } from "../engine/pool-blocks.ts"
import type { KvLayout } from "../engine/worker.ts"
import type { ChunkSink } from "./transfer-receiver.ts"
import type { ChunkSource } from "./transfer-sender.ts"

/** Blocks whose KV is there, or will be when it is sent. */
export const poolSource = (kv: KvLayout, blocks: PoolBlocks): ChunkSource => ({ ...kv, crc32c, blocks, write: (...chunk) => blocks.write(...chunk) })

/** Blocks that wait for their KV. */
export const poolSink = (kv: KvLayout, blocks: PoolBlocks): ChunkSink => ({ ...kv, crc32c, blocks, take: (...chunk) => blocks.take(...chunk) })
