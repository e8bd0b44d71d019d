/**
 * Codecs of ggml's simple block formats, in plain TypeScript and independent of the kernels.
 * Layouts: ggml's `ggml-common.h` (block_q4_0 …) and the table in the GGUF documents; x is the value of a weight.
 *
 *     F32, F16, BF16   one number each
 *     Q8_0             32 weights: f16 d, int8 q[32]                          x = d q
 *     Q4_0             32 weights: f16 d, 16 bytes of nibbles                 x = d (q - 8)
 *     Q4_1             32 weights: f16 d, f16 m, 16 bytes of nibbles          x = d q + m
 *     Q5_0, Q5_1       as Q4_0 (with 16 for 8) and Q4_1, plus u32 of fifth bits before the nibbles
 *
 * Byte j of the nibbles has weight j in its low half and weight j + 16 in its high half.
 */
import type { TensorTypeName } from "./gguf-writer.ts"

const f32 = new Float32Array(1)
const bits = new Uint32Array(f32.buffer)

/** IEEE half bits to a number. */
export const numberOfHalf = (half: number): number => {
  const sign = half & 0x8000 ? -1 : 1
  const exponent = (half >> 10) & 31
  const mantissa = half & 1023
  if (exponent === 31) return mantissa === 0 ? sign * Infinity : NaN
  return exponent === 0 ? sign * mantissa * 2 ** -24 : sign * (1024 + mantissa) * 2 ** (exponent - 25)
}

/** A number to IEEE half bits, to nearest, ties to even; infinity from 65520. */
export const halfOfNumber = (value: number): number => {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0
  const magnitude = Math.abs(value)
  if (Number.isNaN(value)) return 0x7e00
  if (magnitude >= 65520) return sign | 0x7c00
  // The unit in the last place: 2^-24 for subnormals, else 2^(exponent - 10).
  const exponent = magnitude < 2 ** -14 ? -14 : Math.floor(Math.log2(magnitude))
  const exact = magnitude * 2 ** (10 - exponent)
  const below = Math.floor(exact)
  const rest = exact - below
  const units = rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below
  // A carry out of the mantissa raises the exponent by itself.
  return sign | (((exponent + 14) << 10) + units)
}

interface Codec {
  readonly weights: number
  readonly bytes: number
  encode(from: Float32Array, into: DataView): void // [weights] -> [bytes]
  decode(from: DataView, into: Float32Array): void // [bytes] -> [weights]
}

/** Scale and minimum as the halves that a decoder will read, so that weights are rounded against these. */
const putHalf = (into: DataView, at: number, value: number): number => {
  const half = halfOfNumber(value)
  into.setUint16(at, half, true)
  return numberOfHalf(half)
}

const clamp = (value: number, least: number, most: number): number => Math.min(most, Math.max(least, Math.round(value)))
const divide = (value: number, by: number): number => (by === 0 ? 0 : value / by)

/** Q4_0, Q4_1, Q5_0 and Q5_1: `bitCount` bits a weight, with a minimum or centred. */
const nibbleCodec = (bitCount: 4 | 5, hasMinimum: boolean): Codec => {
  const high = hasMinimum ? 4 : 2 // offset of the fifth bits
  const low = high + (bitCount === 5 ? 4 : 0) // offset of the nibbles
  const levels = 2 ** bitCount
  return {
    weights: 32,
    bytes: low + 16,
    encode(from, into) {
      let least = Infinity
      let most = -Infinity
      for (const x of from) {
        least = Math.min(least, x)
        most = Math.max(most, x)
      }
      // Centred: the extreme of greatest magnitude becomes level 0, whose magnitude is the greatest.
      const extreme = -least >= most ? least : most
      const d = putHalf(into, 0, hasMinimum ? (most - least) / (levels - 1) : extreme / (-levels / 2))
      const zero = hasMinimum ? putHalf(into, 2, least) : -d * (levels / 2)
      let fifths = 0
      for (let j = 0; j < 16; j++) {
        const a = clamp(divide(from[j]! - zero, d), 0, levels - 1)
        const b = clamp(divide(from[j + 16]! - zero, d), 0, levels - 1)
        into.setUint8(low + j, (a & 15) | ((b & 15) << 4))
        fifths |= ((a >> 4) << j) | ((b >> 4) << (j + 16))
      }
      if (bitCount === 5) into.setUint32(high, fifths >>> 0, true)
    },
    decode(from, into) {
      const d = numberOfHalf(from.getUint16(0, true))
      const zero = hasMinimum ? numberOfHalf(from.getUint16(2, true)) : -d * (levels / 2)
      const fifths = bitCount === 5 ? from.getUint32(high, true) : 0
      for (let j = 0; j < 16; j++) {
        const byte = from.getUint8(low + j)
        into[j] = d * ((byte & 15) | (((fifths >>> j) & 1) << 4)) + zero
        into[j + 16] = d * ((byte >> 4) | (((fifths >>> (j + 16)) & 1) << 4)) + zero
      }
    },
  }
}

export const codecs: Record<TensorTypeName, Codec> = {
  F32: {
    weights: 1,
    bytes: 4,
    encode: (from, into) => into.setFloat32(0, from[0]!, true),
    decode: (from, into) => void (into[0] = from.getFloat32(0, true)),
  },
  F16: {
    weights: 1,
    bytes: 2,
    encode: (from, into) => into.setUint16(0, halfOfNumber(from[0]!), true),
    decode: (from, into) => void (into[0] = numberOfHalf(from.getUint16(0, true))),
  },
  BF16: {
    weights: 1,
    bytes: 2,
    encode: (from, into) => {
      f32[0] = from[0]!
      into.setUint16(0, (bits[0]! + 0x7fff + ((bits[0]! >>> 16) & 1)) >>> 16, true)
    },
    decode: (from, into) => {
      bits[0] = from.getUint16(0, true) << 16
      into[0] = f32[0]!
    },
  },
  Q8_0: {
    weights: 32,
    bytes: 34,
    encode(from, into) {
      const d = putHalf(into, 0, from.reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 127)
      for (let j = 0; j < 32; j++) into.setInt8(2 + j, clamp(divide(from[j]!, d), -127, 127))
    },
    decode(from, into) {
      const d = numberOfHalf(from.getUint16(0, true))
      for (let j = 0; j < 32; j++) into[j] = d * from.getInt8(2 + j)
    },
  },
  Q4_0: nibbleCodec(4, false),
  Q4_1: nibbleCodec(4, true),
  Q5_0: nibbleCodec(5, false),
  Q5_1: nibbleCodec(5, true),
}

/** Weights, a whole number of blocks, to the format's bytes. */
export const quantise = (type: TensorTypeName, weights: Float32Array): Uint8Array => {
  const codec = codecs[type]
  const out = new Uint8Array((weights.length / codec.weights) * codec.bytes)
  for (let i = 0, at = 0; i < weights.length; i += codec.weights, at += codec.bytes) {
    codec.encode(weights.subarray(i, i + codec.weights), new DataView(out.buffer, at, codec.bytes))
  }
  return out
}

/** The format's bytes to weights. */
export const dequantise = (type: TensorTypeName, bytes: Uint8Array, into: Float32Array): void => {
  const codec = codecs[type]
  for (let i = 0, at = bytes.byteOffset; i < into.length; i += codec.weights, at += codec.bytes) {
    codec.decode(new DataView(bytes.buffer, at, codec.bytes), into.subarray(i, i + codec.weights))
  }
}
