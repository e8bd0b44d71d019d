/** A generation's blocks in a worker's pool, as the end of a transfer: bytes go straight between pool and message. */
import { crc32c } from "../../kernels/index.ts"
import type { Worker } from "../engine/worker.ts"
import type { ChunkSink } from "./transfer-receiver.ts"
import type { ChunkSource } from "./transfer-sender.ts"

export const poolSource = ({ engine, kv }: Pick<Worker, "engine" | "kv">, id: string): ChunkSource => ({
  ...kv,
  crc32c,
  write: (range, into, offset, seed) => engine.exportLayers(id, range, into, offset, seed),
})

export const poolSink = ({ engine, kv }: Pick<Worker, "engine" | "kv">, id: string): ChunkSink => ({
  ...kv,
  crc32c,
  take: (range, payload, seed, crc) => engine.importLayers(id, range, payload, seed, crc),
})
