/**
 * AWQ's W4A16 (Lin et al. 2023) as AutoAWQ's "gemm" packs it, in plain TypeScript and independent of the kernels: what is rounded
 * is each group of 128 inputs of an output by itself, without the search for scales that is AWQ's point.
 *
 *     qweight  i32 [inputs, outputs / 8]        levels; outputs 0 … 7 of a word are its nibbles 0 4 1 5 2 6 3 7
 *     qzeros   i32 [inputs / 128, outputs / 8]  zeros, likewise
 *     scales   f16 [inputs / 128, outputs]      x = (level - zero) * scale
 *
 * Row-major here as in safetensors; GGUF names the same bytes' dimensions the other way round.
 */
import type { TensorToWrite } from "./gguf-writer.ts"
import { halfOfNumber, numberOfHalf, quantise } from "./quantise.ts"

const group = 128
const nibbleOf = [0, 4, 1, 5, 2, 6, 3, 7]
export const i32 = 26

interface Shape {
  readonly outputs: number
  readonly inputs: number
}

/** A matrix [outputs, inputs] as the three tensors of `name`. */
export const awqTensors = (name: string, weights: Float32Array, { outputs, inputs }: Shape): Array<TensorToWrite> => {
  const groups = inputs / group
  const levels = new Uint32Array((inputs * outputs) / 8)
  const zeros = new Uint32Array((groups * outputs) / 8)
  const scales = new Uint16Array(groups * outputs)
  const put = (words: Uint32Array, row: number, output: number, value: number): void => {
    words[(row * outputs + output) >> 3]! |= value << (4 * nibbleOf[output % 8]!)
  }
  for (let output = 0; output < outputs; output++) {
    for (let g = 0; g < groups; g++) {
      const part = weights.subarray(output * inputs + g * group, output * inputs + (g + 1) * group)
      const [least, most] = [Math.min(0, ...part), Math.max(0, ...part)]
      const half = halfOfNumber((most - least) / 15)
      const scale = numberOfHalf(half)
      const level = (x: number, zero: number): number => Math.min(15, Math.max(0, zero + Math.round(x / (scale === 0 ? 1 : scale))))
      const zero = level(-least, 0)
      scales[g * outputs + output] = half
      put(zeros, g, output, zero)
      part.forEach((x, i) => put(levels, g * group + i, output, level(x, zero)))
    }
  }
  const bytes = (array: Uint32Array | Uint16Array): Uint8Array => new Uint8Array(array.buffer)
  return [
    { name: `${name}.qweight`, type: i32, shape: [outputs / 8, inputs], data: bytes(levels) },
    { name: `${name}.qzeros`, type: i32, shape: [outputs / 8, groups], data: bytes(zeros) },
    { name: `${name}.scales`, type: "F16", shape: [outputs, groups], data: bytes(scales) },
  ]
}

interface Words {
  readonly qweight: Uint8Array
  readonly qzeros: Uint8Array
  readonly scales: Uint8Array
}

const viewOf = (bytes: Uint8Array): DataView => new DataView(bytes.buffer, bytes.byteOffset)
const nibbleAt = (words: Uint8Array, row: number, output: number, outputs: number): number =>
  (viewOf(words).getUint32(4 * ((row * outputs + output) >> 3), true) >>> (4 * nibbleOf[output % 8]!)) & 15

/** The weights: [outputs, inputs]. */
export const awqWeights = ({ qweight, qzeros, scales }: Words, { outputs, inputs }: Shape): Float32Array =>
  Float32Array.from({ length: outputs * inputs }, (_, at) => {
    const [output, input] = [Math.floor(at / inputs), at % inputs]
    const g = Math.floor(input / group)
    const scale = numberOfHalf(viewOf(scales).getUint16(2 * (g * outputs + output), true))
    return (nibbleAt(qweight, input, output, outputs) - nibbleAt(qzeros, g, output, outputs)) * scale
  })

/** The matrix in Q4_1, level by level: an offset of -zero * scale in f16. */
export const awqAsQ4 = (name: string, { qweight, qzeros, scales }: Words, { outputs, inputs }: Shape): TensorToWrite => {
  const data = quantise("Q4_1", new Float32Array(outputs * inputs))
  const view = viewOf(data)
  for (let at = 0; at < data.length; at += 20) {
    const output = Math.floor(at / 20 / (inputs / 32))
    const input = ((at / 20) % (inputs / 32)) * 32
    const g = Math.floor(input / group)
    const half = viewOf(scales).getUint16(2 * (g * outputs + output), true)
    view.setUint16(at, half, true)
    view.setUint16(at + 2, halfOfNumber(-nibbleAt(qzeros, g, output, outputs) * numberOfHalf(half)), true)
    for (let i = 0; i < 16; i++) data[at + 4 + i] = nibbleAt(qweight, input + i, output, outputs) | (nibbleAt(qweight, input + 16 + i, output, outputs) << 4)
  }
  return { name: `${name}.weight`, type: "Q4_1", shape: [inputs, outputs], data }
}
