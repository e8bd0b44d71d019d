/**
 * Buffers of chunks that have arrived, for the next ones: to make a large one afresh for each costs more than to fill it. Where
 * a copy of a chunk should still be on its way within this process, it becomes another chunk, whole and with its own CRC.
 */
import { limits } from "../../config/limits.ts"

const leastBytes = 64 * 1024
const mostFree = (2 * limits.kvWindowBytes) / limits.kvChunkBytes

const free: Array<ArrayBuffer> = []

/** Room for a chunk; what is in it is undefined. */
export const takeChunkBuffer = (bytes: number): Uint8Array =>
  bytes < leastBytes || bytes > limits.kvChunkBytes ? new Uint8Array(bytes) : new Uint8Array(free.pop() ?? new ArrayBuffer(limits.kvChunkBytes), 0, bytes)

/** Gives a chunk's buffer back, of which the caller keeps nothing. */
export const giveChunkBuffer = ({ buffer }: Uint8Array): void => {
  if (buffer instanceof ArrayBuffer && buffer.byteLength === limits.kvChunkBytes && free.length < mostFree) free.push(buffer)
}
