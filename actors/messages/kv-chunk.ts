/**
 * The bulk frame: KV of a range of layers of a range of blocks, behind a fixed header, little-endian.
 *
 *     offset  bytes
 *          0      4  magic "PSKV"
 *          4      2  version
 *          6      1  dtype (0: f16, 1: int8, 2: int4)
 *          7      1  zero
 *          8     16  transfer id
 *         24      4  sequence number of the chunk in its transfer
 *         28      2  first layer              30  2  layers
 *         32      4  first block, as its place in the receiver's table
 *         36      2  blocks                   38  2  tokens in a block
 *         40      4  bytes of payload
 *         44      4  CRC-32C of the payload, continued from that of the header with this field zero
 *         48      4  0; or no payload follows, and it is in blocks that a sender of this number has left with the receiver
 *         52     12  zero
 *         64         payload [layer][block][K|V][kv head] of what kernels/index.ts says of the dtype
 */
import { kvDtypes, type KvDtype } from "../../kernels/index.ts"
import { Fault } from "../runtime/fault.ts"

export const kvChunkHeaderBytes = 64
const magic = 0x564b5350 // "PSKV"
const version = 1
const crcOffset = 44

/** Which part of a transfer a chunk holds. */
export interface ChunkRange {
  readonly firstLayer: number
  readonly layers: number
  readonly firstBlock: number
  readonly blocks: number
}

export interface KvChunkHeader extends ChunkRange {
  readonly transferId: string
  readonly sequence: number
  readonly dtype: KvDtype
  readonly blockTokens: number
  readonly payloadBytes: number
  /** Of a sender in the receiver's process, whose blocks hold the payload; 0 where the chunk does. */
  readonly sender: number
}

/** Writes everything but the CRC, whose field stays zero until `sealChunk`. `into` holds header and payload. */
export const writeChunkHeader = (into: Uint8Array, header: KvChunkHeader): void => {
  const view = new DataView(into.buffer, into.byteOffset, kvChunkHeaderBytes)
  into.fill(0, 0, kvChunkHeaderBytes)
  view.setUint32(0, magic, true)
  view.setUint16(4, version, true)
  into[6] = kvDtypes.indexOf(header.dtype)
  into.set(Buffer.from(header.transferId, "hex"), 8)
  view.setUint32(24, header.sequence, true)
  view.setUint16(28, header.firstLayer, true)
  view.setUint16(30, header.layers, true)
  view.setUint32(32, header.firstBlock, true)
  view.setUint16(36, header.blocks, true)
  view.setUint16(38, header.blockTokens, true)
  view.setUint32(40, header.payloadBytes, true)
  view.setUint32(48, header.sender, true)
}

/** Completes a chunk: `crc` was continued from the header's own. */
export const sealChunk = (chunk: Uint8Array, crc: number): void => new DataView(chunk.buffer, chunk.byteOffset).setUint32(crcOffset, crc >>> 0, true)

/** A chunk's header and CRC, checked against its length. Throws a Fault that says what is wrong; content is the CRC's. */
export const readChunkHeader = (chunk: Uint8Array): { readonly header: KvChunkHeader; readonly crc: number } => {
  const wrong = (what: string) => new Fault({ code: "invalid_request", message: `KV chunk: ${what}`, hop: "kv chunk" })
  if (chunk.byteLength < kvChunkHeaderBytes) throw wrong(`${chunk.byteLength} bytes are less than its header`)
  const view = new DataView(chunk.buffer, chunk.byteOffset, kvChunkHeaderBytes)
  if (view.getUint32(0, true) !== magic) throw wrong("it does not begin with PSKV")
  if (view.getUint16(4, true) !== version) throw wrong(`version ${view.getUint16(4, true)} is not ${version}`)
  const dtype = kvDtypes[chunk[6]!]
  if (dtype === undefined) throw wrong(`dtype ${chunk[6]} is not known`)
  const payloadBytes = view.getUint32(40, true)
  const sender = view.getUint32(48, true)
  const follow = sender === 0 ? payloadBytes : 0
  if (follow !== chunk.byteLength - kvChunkHeaderBytes) throw wrong(`${chunk.byteLength - kvChunkHeaderBytes} bytes of payload, the header says ${follow}`)
  const header: KvChunkHeader = {
    transferId: Buffer.from(chunk.buffer, chunk.byteOffset + 8, 16).toString("hex"),
    sequence: view.getUint32(24, true),
    dtype,
    firstLayer: view.getUint16(28, true),
    layers: view.getUint16(30, true),
    firstBlock: view.getUint32(32, true),
    blocks: view.getUint16(36, true),
    blockTokens: view.getUint16(38, true),
    payloadBytes,
    sender,
  }
  return { header, crc: view.getUint32(crcOffset, true) }
}

/** The header as the CRC sees it. */
export const headerForCrc = (chunk: Uint8Array): Uint8Array => {
  const header = chunk.slice(0, kvChunkHeaderBytes)
  header.fill(0, crcOffset, crcOffset + 4)
  return header
}
