/**
 * Streams over any bus: the reader opens one by a message, the writer answers with numbered frames under the reader's
 * credits. Both sides send signs of life, so that neither waits for a dead peer; a lost frame shows as a gap.
 *
 * Frame: u8 kind, 3 zero bytes, u32 number little-endian, payload. The number counts data frames from the beginning: of
 * data, end and the writer's sign of life, those before it; of credit and the reader's sign of life, all that the writer
 * may have sent then. So a credit that was lost or came twice does no harm, and a frame that was lost shows at the latest
 * with the next sign of life.
 */
export const frameKind = { open: 0, data: 1, end: 2, fail: 3, alive: 4, credit: 5, cancel: 6 } as const
export const framePrefixBytes = 8
export const text = { encoder: new TextEncoder(), decoder: new TextDecoder() }
export const noBytes = new Uint8Array(0)

export const streamFrame = (kind: number, number: number, payload: Uint8Array): Uint8Array => {
  const bytes = new Uint8Array(framePrefixBytes + payload.byteLength)
  bytes[0] = kind
  new DataView(bytes.buffer).setUint32(4, number, true)
  bytes.set(payload, framePrefixBytes)
  return bytes
}

export const frameNumber = (bytes: Uint8Array): number => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength).getUint32(4, true)
