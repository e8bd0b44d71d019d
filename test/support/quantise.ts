/**
 * Codecs of ggml's block formats, in plain TypeScript and independent of the kernels.
 * Layouts: ggml's `ggml-common.h` (block_q4_0 …) and the table in the GGUF documents; x is the value of a weight.
 *
 *     F32, F16, BF16   one number each
 *     Q8_0             32 weights: f16 d, int8 q[32]                          x = d q
 *     Q4_0             32 weights: f16 d, 16 bytes of nibbles                 x = d (q - 8)
 *     Q4_1             32 weights: f16 d, f16 m, 16 bytes of nibbles          x = d q + m
 *     Q5_0, Q5_1       as Q4_0 (with 16 for 8) and Q4_1, plus u32 of fifth bits before the nibbles
 *     Q4_K, Q5_K       256 weights in sub-blocks of 32: f16 d, f16 m, 12 bytes of six-bit scales s and minima t, (Q5_K: 32 bytes
 *                      of fifth bits,) 128 bytes of nibbles                   x = d s q - m t
 *     Q6_K             256 weights in sub-blocks of 16: 128 bytes of nibbles, 64 of upper bits, int8 s[16], f16 d
 *                                                                             x = d s (q - 32)
 *
 * Byte j of the nibbles of 32 weights has weight j in its low half and weight j + 16 in its high half. Those of 256 are written
 * where they are read, below.
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

/** Q4_K and Q5_K: `bitCount` bits a weight. */
const minimumSuperCodec = (bitCount: 4 | 5): Codec => {
  const nibblesAt = bitCount === 5 ? 48 : 16
  const levels = 2 ** bitCount
  /** Byte and half of a weight's nibble: sub-blocks 2c and 2c + 1 share 32 bytes. */
  const nibbleOf = (i: number): readonly [at: number, shift: number] => [nibblesAt + 32 * (i >> 6) + (i & 31), i & 32 ? 4 : 0]
  /** Scales and minima 0 … 3 are bits 0 … 5 of bytes 0 … 3 and 4 … 7. Of 4 … 7 the low four bits are in bytes 8 … 11, a scale's in the low half, and the upper two atop scale and minimum 0 … 3. */
  const readFactors = (from: DataView, sub: number): readonly [scale: number, minimum: number] => {
    const byte = (i: number): number => from.getUint8(4 + i)
    if (sub < 4) return [byte(sub) % 64, byte(sub + 4) % 64]
    return [(byte(sub + 4) % 16) + 16 * (byte(sub - 4) >> 6), (byte(sub + 4) >> 4) + 16 * (byte(sub) >> 6)]
  }
  return {
    weights: 256,
    bytes: nibblesAt + 128,
    encode(from, into) {
      for (let at = 4; at < nibblesAt + 128; at++) into.setUint8(at, 0)
      const or = (at: number, bits: number): void => into.setUint8(at, into.getUint8(at) | bits)
      const subs = Array.from({ length: 8 }, (_, sub) => from.subarray(32 * sub, 32 * sub + 32))
      const minima = subs.map((sub) => Math.max(0, -Math.min(...sub)))
      const steps = subs.map((sub, i) => Math.max(0, Math.max(...sub) + minima[i]!) / (levels - 1))
      const d = putHalf(into, 0, Math.max(...steps) / 63)
      const m = putHalf(into, 2, Math.max(...minima) / 63)
      subs.forEach((sub, i) => {
        const scale = clamp(divide(steps[i]!, d), 0, 63)
        const minimum = clamp(divide(minima[i]!, m), 0, 63)
        if (i < 4) {
          or(4 + i, scale)
          or(8 + i, minimum)
        } else {
          or(8 + i, (scale % 16) + 16 * (minimum % 16))
          or(i, 64 * (scale >> 4))
          or(4 + i, 64 * (minimum >> 4))
        }
        sub.forEach((x, j) => {
          const q = clamp(divide(x + m * minimum, d * scale), 0, levels - 1)
          const [at, shift] = nibbleOf(32 * i + j)
          or(at, (q % 16) << shift)
          if (bitCount === 5) or(16 + j, (q >> 4) << i)
        })
      })
    },
    decode(from, into) {
      const d = numberOfHalf(from.getUint16(0, true))
      const m = numberOfHalf(from.getUint16(2, true))
      for (let i = 0; i < 256; i++) {
        const sub = i >> 5
        const [scale, minimum] = readFactors(from, sub)
        const [at, shift] = nibbleOf(i)
        const fifth = bitCount === 5 ? (from.getUint8(16 + (i & 31)) >> sub) & 1 : 0
        into[i] = d * scale * (((from.getUint8(at) >> shift) & 15) + 16 * fifth) - m * minimum
      }
    },
  }
}

/** Of Q6_K: weight i is in half h, quarter q (32 weights) of that half, place j. */
const sixBitPlace = (i: number): { readonly nibble: number; readonly shift: number; readonly upper: number; readonly upperShift: number } => {
  const [h, q, j] = [i >> 7, (i >> 5) & 3, i & 31]
  return { nibble: 64 * h + 32 * (q & 1) + j, shift: q & 2 ? 4 : 0, upper: 128 + 32 * h + j, upperShift: 2 * q }
}

const sixBitCodec: Codec = {
  weights: 256,
  bytes: 210,
  encode(from, into) {
    for (let at = 0; at < 208; at++) into.setUint8(at, 0)
    const subs = Array.from({ length: 16 }, (_, sub) => from.subarray(16 * sub, 16 * sub + 16))
    // The extreme of greatest magnitude becomes level -32, whose magnitude is the greatest; so scales have a sign.
    const steps = subs.map((sub) => sub.reduce((most, x) => (Math.abs(x) > Math.abs(most) ? x : most), 0) / -32)
    const greatest = steps.reduce((most, x) => (Math.abs(x) > Math.abs(most) ? x : most), 0)
    const d = putHalf(into, 208, greatest / -128)
    subs.forEach((sub, s) => {
      const scale = clamp(divide(steps[s]!, d), -128, 127)
      into.setInt8(192 + s, scale)
      sub.forEach((x, j) => {
        const q = clamp(divide(x, d * scale), -32, 31) + 32
        const { nibble, shift, upper, upperShift } = sixBitPlace(16 * s + j)
        into.setUint8(nibble, into.getUint8(nibble) | ((q & 15) << shift))
        into.setUint8(upper, into.getUint8(upper) | ((q >> 4) << upperShift))
      })
    })
  },
  decode(from, into) {
    const d = numberOfHalf(from.getUint16(208, true))
    for (let i = 0; i < 256; i++) {
      const { nibble, shift, upper, upperShift } = sixBitPlace(i)
      const q = ((from.getUint8(nibble) >> shift) & 15) | (((from.getUint8(upper) >> upperShift) & 3) << 4)
      into[i] = d * from.getInt8(192 + (i >> 4)) * (q - 32)
    }
  },
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
  Q4_K: minimumSuperCodec(4),
  Q5_K: minimumSuperCodec(5),
  Q6_K: sixBitCodec,
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

/** Where a block has its halves, scale first; the numbers themselves of what is no block. */
export const halvesOf = (type: TensorTypeName): ReadonlyArray<number> => {
  if (type === "Q6_K") return [208]
  return ["Q4_1", "Q5_1", "Q4_K", "Q5_K"].includes(type) ? [0, 2] : [0]
}

/** The format's bytes to weights. */
export const dequantise = (type: TensorTypeName, bytes: Uint8Array, into: Float32Array): void => {
  const codec = codecs[type]
  for (let i = 0, at = bytes.byteOffset; i < into.length; i += codec.weights, at += codec.bytes) {
    codec.decode(new DataView(bytes.buffer, at, codec.bytes), into.subarray(i, i + codec.weights))
  }
}
