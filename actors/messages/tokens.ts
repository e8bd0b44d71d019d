/**
 * Token ids as bytes (little-endian int32): 4 bytes each in a message, and no array of numbers to check one by one.
 */
import { Fault } from "../runtime/fault.ts"

export const packTokens = (tokens: Int32Array | ReadonlyArray<number>): Uint8Array => {
  const ids = tokens instanceof Int32Array ? tokens : Int32Array.from(tokens)
  return new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength)
}

/** A copy, aligned. Throws a Fault where the length is not a multiple of 4. */
export const unpackTokens = (bytes: Uint8Array, field: string): Int32Array => {
  if (bytes.byteLength % 4 !== 0) throw new Fault({ code: "invalid_request", message: `${field}: ${bytes.byteLength} bytes are no token ids`, hop: field })
  return new Int32Array(new Uint8Array(bytes).buffer) // slice would not copy a Buffer
}
