/** How large a chunk may be on a bus: chunks are cut to what its messages hold, down to one layer of one block. */
import { limits } from "../../config/limits.ts"
import { kvChunkHeaderBytes } from "../messages/kv-chunk.ts"
import type { Bus } from "../runtime/bus.ts"

type Messages = Pick<Bus, "name" | "maxPayloadBytes">

/** Bytes that a chunk is to have at most, its header included. */
export const chunkBytesOn = (bus: Messages): number => Math.min(limits.kvChunkBytes, bus.maxPayloadBytes)

/** Throws, with what to do, where not even the smallest chunk fits a message of the bus. */
export const checkChunkFits = (bus: Messages, kv: { readonly layerBlockBytes: number; readonly blockTokens: number }): void => {
  const least = kvChunkHeaderBytes + kv.layerBlockBytes
  if (least <= bus.maxPayloadBytes) return
  const raise = bus.name === "nats" ? `raise max_payload of the NATS server to ${least} or more, or ` : ""
  throw new Error(`bus ${bus.name}: its messages hold ${bus.maxPayloadBytes} bytes, and one layer of one KV block of ${kv.blockTokens} tokens takes ${least}: ${raise}lower kv.blockTokens of the workers in the topology`)
}
