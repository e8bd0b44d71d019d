/**
 * Writes a GGUF file anew with its matrices in Q4_0, the format that llama.cpp repacks for vector units, as llama-quantize would
 * from the same file: every matrix but the embedding. That one is the head of a tied model; llama-quantize makes it Q6_K, or Q8_0
 * where a row is no multiple of 256, and a file that has it in Q8_0 already keeps it.
 *
 * Each block of 32 weights x: d = f16(x of greatest magnitude / -8), level = min(15, floor(x / d + 8.5)) with d unrounded, as
 * ggml's quantize_row_q4_0_ref. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
 */
import { closeSync, openSync, readFileSync, writeSync } from "node:fs"
import { BenchError } from "./peer.ts"

const q40 = 2
/** What a block of 32 weights takes, by the id of a type that can be read. */
const blockBytes: Readonly<Record<number, number>> = { 0: 128, 1: 64, 2: 18, 3: 20, 8: 34 }
/** Bytes of metadata values by their type; strings and arrays carry their lengths. */
const valueBytes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8]

const numberOfHalf = (half: number): number => {
  const [exponent, mantissa] = [(half >> 10) & 31, half & 1023]
  const magnitude = exponent === 31 ? Number.POSITIVE_INFINITY : exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25)
  return half & 0x8000 ? -magnitude : magnitude
}

/** To nearest, ties to even. */
const halfOfNumber = (value: number): number => {
  const sign = value < 0 ? 0x8000 : 0
  const magnitude = Math.min(Math.abs(value), 65504)
  const exponent = Math.max(-14, Math.floor(Math.log2(magnitude)))
  const exact = magnitude * 2 ** (10 - exponent)
  const below = Math.floor(exact)
  const rest = exact - below
  return sign | (((exponent + 14) << 10) + below + (rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? 1 : 0))
}

/** One block of 32 weights. */
const decode = (type: number, view: DataView, at: number, into: Float32Array): void => {
  const half = (offset: number): number => numberOfHalf(view.getUint16(at + offset, true))
  if (type === 0) for (let i = 0; i < 32; i++) into[i] = view.getFloat32(at + 4 * i, true)
  else if (type === 1) for (let i = 0; i < 32; i++) into[i] = half(2 * i)
  else if (type === 8) {
    const d = half(0)
    for (let i = 0; i < 32; i++) into[i] = d * view.getInt8(at + 2 + i)
  } else {
    const d = half(0)
    const [zero, nibbles] = type === 3 ? [half(2), at + 4] : [-8 * d, at + 2]
    for (let i = 0; i < 16; i++) {
      const byte = view.getUint8(nibbles + i)
      into[i] = d * (byte & 15) + zero
      into[i + 16] = d * (byte >> 4) + zero
    }
  }
}

const encode = (from: Float32Array, view: DataView, at: number): void => {
  let extreme = 0
  for (const x of from) if (Math.abs(x) > Math.abs(extreme)) extreme = x
  const d = Math.fround(extreme / -8)
  view.setUint16(at, halfOfNumber(d), true)
  const level = (x: number): number => (d === 0 ? 8 : Math.min(15, Math.trunc(x / d + 8.5)))
  for (let i = 0; i < 16; i++) view.setUint8(at + 2 + i, level(from[i]!) | (level(from[i + 16]!) << 4))
}

const requantised = (type: number, bytes: Buffer): Buffer => {
  const blocks = bytes.length / blockBytes[type]!
  const out = Buffer.alloc(blocks * 18)
  const [from, to] = [new DataView(bytes.buffer, bytes.byteOffset), new DataView(out.buffer, out.byteOffset)]
  const weights = new Float32Array(32)
  for (let block = 0; block < blocks; block++) {
    decode(type, from, block * blockBytes[type]!, weights)
    encode(weights, to, block * 18)
  }
  return out
}

/** Writes `path` with its matrices in Q4_0 to `into`. The file was read by the kernels, so that it is well formed. */
export const requantiseToQ40 = (path: string, into: string): void => {
  const file = readFileSync(path)
  let at = 8
  const u32 = (): number => file.readUInt32LE((at += 4) - 4)
  const u64 = (): number => Number(file.readBigUInt64LE((at += 8) - 8))
  const text = (): string => {
    const length = u64()
    return file.toString("utf8", at, (at += length))
  }
  let alignment = 32
  const skip = (type: number): void => {
    if (type === 8) text()
    else if (type === 9) {
      const element = u32()
      for (let count = u64(); count > 0; count--) skip(element)
    } else at += valueBytes[type]!
  }
  const tensorCount = u64()
  for (let keys = u64(); keys > 0; keys--) {
    const key = text()
    const type = u32()
    if (key === "general.alignment" && type === 4) alignment = file.readUInt32LE(at)
    skip(type)
  }
  const head = file.subarray(0, at)
  const tensors = Array.from({ length: tensorCount }, () => {
    const name = text()
    return { name, shape: Array.from({ length: u32() }, u64), type: u32(), offset: u64() }
  })
  const aligned = (offset: number): number => Math.ceil(offset / alignment) * alignment
  const start = aligned(at)
  let end = 0
  const infos: Array<Buffer> = []
  const datas: Array<{ readonly offset: number; readonly data: Buffer }> = []
  for (const { name, shape, type, offset } of tensors) {
    const weights = shape.reduce((a, b) => a * b, 1)
    if (blockBytes[type] === undefined) throw new BenchError(`${path}: tensor ${name}: requantising knows F32, F16, Q4_0, Q4_1 and Q8_0, found type ${type}`)
    const bytes = file.subarray(start + offset, start + offset + (weights / 32) * blockBytes[type])
    const matrix = shape.length === 2 && shape[0]! % 32 === 0 && name !== "token_embd.weight" && name !== "output.weight"
    const data = matrix && type !== q40 ? requantised(type, bytes) : bytes
    const info = Buffer.alloc(8 + Buffer.byteLength(name) + 4 + 8 * shape.length + 4 + 8)
    let to = info.writeBigUInt64LE(BigInt(Buffer.byteLength(name)), 0)
    to += info.write(name, to)
    to = info.writeUInt32LE(shape.length, to)
    for (const size of shape) to = info.writeBigUInt64LE(BigInt(size), to)
    to = info.writeUInt32LE(matrix ? q40 : type, to)
    info.writeBigUInt64LE(BigInt(end), to)
    infos.push(info)
    datas.push({ offset: end, data })
    end = aligned(end + data.length)
  }
  const header = Buffer.concat([head, ...infos])
  const out = openSync(into, "w")
  writeSync(out, header)
  for (const { offset, data } of datas) writeSync(out, data, 0, data.length, aligned(header.length) + offset)
  closeSync(out)
}
