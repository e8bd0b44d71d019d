/** What is done to a tensor's rows on their way. A piece of rows is turned into another in one call, and may be changed in place. */
export type Convert = (piece: Uint8Array) => Uint8Array

const nibbleOf = [0, 4, 1, 5, 2, 6, 3, 7] // of outputs 0 … 7 in a word of AWQ's

/**
 * Of each head, where GGUF's order of outputs has them in Hugging Face's: the rotation turns pairs (2i, 2i + 1) here and
 * (i, i + headDim / 2) there. Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.
 */
export const rotationOrder = (outputs: number, headDim: number): Uint32Array =>
  Uint32Array.from({ length: outputs }, (_, o) => {
    const dimension = o % headDim
    return o - dimension + (dimension % 2) * (headDim / 2) + (dimension >> 1)
  })

/** Rows of halves, [rows, outputs]: output o becomes what order[o] was. */
export const permuteHalves = (order: Uint32Array): Convert => (piece) => {
  const from = new Uint16Array(piece.buffer)
  const to = new Uint16Array(from.length)
  for (let row = 0; row < from.length; row += order.length) for (let o = 0; o < order.length; o++) to[row + o] = from[row + order[o]!]!
  return new Uint8Array(to.buffer)
}

/** Rows of AWQ's words, [rows, outputs / 8], likewise. */
export const permuteNibbles = (order: Uint32Array): Convert => (piece) => {
  const words = order.length / 8
  const from = new Uint32Array(piece.buffer)
  const to = new Uint32Array(from.length)
  for (let row = 0; row < from.length; row += words) {
    for (let o = 0; o < order.length; o++) {
      const source = order[o]!
      to[row + (o >> 3)]! |= ((from[row + (source >> 3)]! >>> (4 * nibbleOf[source & 7]!)) & 15) << (4 * nibbleOf[o & 7]!)
    }
  }
  return new Uint8Array(to.buffer)
}

/** Bits of a float of magnitude below 65520 to those of a half, to nearest, ties to even. */
const halfOfBits = (bits: number, value: number): number => {
  const sign = (bits >>> 16) & 0x8000
  const magnitude = bits & 0x7fffffff
  if (magnitude >= 0x38800000) return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >>> 13) & 1)) >>> 13)
  // Subnormal: units of 2^-24. Adding 2^52 leaves no room for a fraction, and rounds it so.
  return sign | (Math.abs(value) * 2 ** 24 + 2 ** 52 - 2 ** 52)
}

const floatBits = (piece: Uint8Array, dtype: string): Uint32Array => {
  if (dtype !== "BF16") return new Uint32Array(piece.buffer)
  const bits = new Uint32Array(piece.length / 2)
  new Uint16Array(piece.buffer).forEach((half, i) => (bits[i] = half << 16))
  return bits
}

/**
 * BF16 or F32 to F16. A BF16 of 2^-14 … 65504 is exact; smaller ones lose bits.
 * @throws RangeError for what no half can hold
 */
export const toHalves = (dtype: string): Convert => (piece) => {
  const bits = floatBits(piece, dtype)
  const halves = new Uint16Array(bits.length)
  new Float32Array(bits.buffer).forEach((value, i) => {
    if (!(Math.abs(value) < 65520)) throw new RangeError(`expected numbers that F16 can hold, found ${value}`)
    halves[i] = halfOfBits(bits[i]!, value)
  })
  return new Uint8Array(halves.buffer)
}

const floatOfHalf = (half: number): number => {
  const [sign, exponent, mantissa] = [half & 0x8000 ? -1 : 1, (half >> 10) & 31, half & 1023]
  if (exponent === 31) return mantissa === 0 ? sign * Infinity : Number.NaN
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1024 + mantissa) * 2 ** (exponent - 25))
}

/** F16 or BF16 to F32, exactly. */
export const toFloats = (dtype: string): Convert => (piece) =>
  new Uint8Array(dtype === "F16" ? Float32Array.from(new Uint16Array(piece.buffer), floatOfHalf).buffer : floatBits(piece, dtype).buffer)

export const asIs: Convert = (piece) => piece
