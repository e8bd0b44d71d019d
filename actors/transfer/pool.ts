/** KV in a worker's pool, as the ends of a transfer: bytes go straight between pool and message. */
import { crc32c } from "../../kernels/index.ts"
import type { KvLayout, Worker } from "../engine/worker.ts"
import type { ChunkSink } from "./transfer-receiver.ts"
import type { ChunkSource } from "./transfer-sender.ts"

/** A generation's blocks, as they are computed. */
export const poolSource = ({ engine, kv }: Pick<Worker, "engine" | "kv">, id: string): ChunkSource => ({
  ...kv,
  crc32c,
  write: (range, into, offset, seed) => engine.exportLayers(id, range, into, offset, seed),
})

/** Blocks that wait for their KV. */
export const kvSink = (kv: KvLayout, take: ChunkSink["take"]): ChunkSink => ({ ...kv, crc32c, take })

/** A reservation's blocks. */
export const poolSink = ({ engine, kv }: Pick<Worker, "engine" | "kv">, id: string): ChunkSink =>
  kvSink(kv, (range, payload, seed, crc) => engine.importLayers(id, range, payload, seed, crc))
