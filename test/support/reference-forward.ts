/**
 * The llama architecture from a GGUF file in plain TypeScript: the oracle that the engine's accuracy is measured against.
 *
 * It shares nothing with the kernels: its own reader, its own decoders (quantise.ts), float64 arithmetic, nothing quantised
 * but the file's weights, attention over the whole sequence at once. Written to be read, not to be fast: about two minutes for
 * 400 tokens of SmolLM2-135M.
 *
 * Sources: Touvron et al. 2023 (LLaMA), Su et al. 2021 (RoPE), Zhang and Sennrich 2019 (RMS norm), Shazeer 2020 (SwiGLU),
 * Ainslie et al. 2023 (grouped-query attention).
 */
import { readFileSync } from "node:fs"
import type { KvDtype } from "../../kernels/index.ts"
import { awqWeights, i32 } from "./awq.ts"
import { tensorTypeIds, type TensorTypeName } from "./gguf-writer.ts"
import { codecs, dequantise, halfOfNumber, numberOfHalf } from "./quantise.ts"

interface Tensor {
  readonly type: TensorTypeName
  readonly shape: ReadonlyArray<number> // fastest dimension first: [columns, rows]
  readonly bytes: Uint8Array
}

export interface ReferenceFile {
  readonly metadata: ReadonlyMap<string, unknown>
  readonly tensors: ReadonlyMap<string, Tensor>
}

/** Reads a well-formed GGUF v3 file whole; the checks are the business of kernels/src/gguf.cc. */
export const readReferenceFile = (path: string): ReferenceFile => {
  const file = readFileSync(path)
  let at = 0
  const u32 = (): number => file.readUInt32LE((at += 4) - 4)
  const u64 = (): number => Number(file.readBigUInt64LE((at += 8) - 8))
  const text = (): string => {
    const length = u64()
    return file.toString("utf8", at, (at += length))
  }
  const value = (type: number): unknown => {
    const width = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8][type]!
    at += width
    if (type === 0 || type === 7) return file.readUInt8(at - width)
    if (type === 1) return file.readInt8(at - width)
    if (type === 2) return file.readUInt16LE(at - width)
    if (type === 3) return file.readInt16LE(at - width)
    if (type === 4) return file.readUInt32LE(at - width)
    if (type === 5) return file.readInt32LE(at - width)
    if (type === 6) return file.readFloatLE(at - width)
    if (type === 8) return text()
    if (type === 10) return Number(file.readBigUInt64LE(at - width))
    if (type === 11) return Number(file.readBigInt64LE(at - width))
    if (type === 12) return file.readDoubleLE(at - width)
    const element = u32()
    return Array.from({ length: u64() }, () => value(element))
  }

  at = 8
  const tensorCount = u64()
  const keyCount = u64()
  const metadata = new Map<string, unknown>()
  for (let i = 0; i < keyCount; i++) metadata.set(text(), value(u32()))
  const infos = Array.from({ length: tensorCount }, () => ({
    name: text(),
    shape: Array.from({ length: u32() }, u64),
    id: u32(),
    offset: u64(),
  }))
  const alignment = Number(metadata.get("general.alignment") ?? 32)
  const start = Math.ceil(at / alignment) * alignment
  const tensors = new Map<string, Tensor>()
  const awq = new Map<string, { readonly shape: ReadonlyArray<number>; readonly bytes: Uint8Array }>()
  for (const { name, shape, id, offset } of infos) {
    if (id === i32) {
      awq.set(name, { shape, bytes: file.subarray(start + offset, start + offset + shape[0]! * shape[1]! * 4) })
      continue
    }
    const type = (Object.keys(tensorTypeIds) as Array<TensorTypeName>).find((key) => tensorTypeIds[key] === id)
    if (type === undefined) throw new Error(`${name}: the reference has no decoder of type ${id}`)
    const count = shape.reduce((a, b) => a * b, 1)
    const bytes = (count / codecs[type].weights) * codecs[type].bytes
    tensors.set(name, { type, shape, bytes: file.subarray(start + offset, start + offset + bytes) })
  }
  // AWQ's three tensors are one of the weights they stand for.
  for (const [part, { shape: [words, inputs], bytes: qweight }] of awq) {
    if (!part.endsWith(".qweight")) continue
    const name = part.replace(".qweight", "")
    const outputs = 8 * words!
    const weights = awqWeights({ qweight, qzeros: awq.get(`${name}.qzeros`)!.bytes, scales: tensors.get(`${name}.scales`)!.bytes }, { outputs, inputs: inputs! })
    tensors.set(`${name}.weight`, { type: "F32", shape: [inputs!, outputs], bytes: new Uint8Array(weights.buffer) })
  }
  return { metadata, tensors }
}

/** One row of a matrix (or a vector) as numbers. */
const rowOf = (tensor: Tensor, row: number, into: Float32Array): void => {
  const bytes = (tensor.shape[0]! / codecs[tensor.type].weights) * codecs[tensor.type].bytes
  dequantise(tensor.type, tensor.bytes.subarray(row * bytes, (row + 1) * bytes), into)
}

const dot = (a: Float32Array, b: Float64Array): number => {
  let sum = 0
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!
  return sum
}

/** Rounds to 255 levels a block of 32: what an engine that multiplies int8 with int8 does to its activations. */
const roundToInt8 = (x: Float64Array): Float64Array => {
  const out = new Float64Array(x.length)
  for (let start = 0; start < x.length; start += 32) {
    const block = x.subarray(start, start + 32)
    const scale = block.reduce((most, value) => Math.max(most, Math.abs(value)), 0) / 127
    if (scale > 0) out.set(block.map((value) => Math.round(value / scale) * scale), start)
  }
  return out
}

/** W x for each of the vectors x: tensor [columns, rows], xs [n][columns] -> [n][rows]. */
const multiply = (tensor: Tensor, exact: ReadonlyArray<Float64Array>, rounded: boolean): Array<Float64Array> => {
  const [columns, rows] = tensor.shape as [number, number]
  const xs = rounded && codecs[tensor.type].weights > 1 ? exact.map(roundToInt8) : exact
  const weights = new Float32Array(columns)
  const out = xs.map(() => new Float64Array(rows))
  for (let row = 0; row < rows; row++) {
    rowOf(tensor, row, weights)
    for (let n = 0; n < xs.length; n++) out[n]![row] = dot(weights, xs[n]!)
  }
  return out
}

const rmsNorm = (tensor: Tensor, epsilon: number, xs: ReadonlyArray<Float64Array>): Array<Float64Array> => {
  const weights = new Float32Array(tensor.shape[0]!)
  rowOf(tensor, 0, weights)
  return xs.map((x) => {
    const scale = 1 / Math.sqrt(x.reduce((sum, value) => sum + value * value, 0) / x.length + epsilon)
    return x.map((value, i) => value * scale * weights[i]!)
  })
}

/** Rotates pair i of each head by position / base^(2i / dims), in place: (2i, 2i+1), or of Hugging Face's halves (i, i + dims / 2). */
const rotate = (x: Float64Array, position: number, headDim: number, dims: number, base: number, halves: boolean): void => {
  for (let head = 0; head < x.length; head += headDim) {
    for (let i = 0; i < dims / 2; i++) {
      const angle = position * base ** ((-2 * i) / dims)
      const [first, second] = halves ? [head + i, head + i + dims / 2] : [head + 2 * i, head + 2 * i + 1]
      const [a, b] = [x[first]!, x[second]!]
      x[first] = a * Math.cos(angle) - b * Math.sin(angle)
      x[second] = a * Math.sin(angle) + b * Math.cos(angle)
    }
  }
}

const softmax = (scores: Float64Array): Float64Array => {
  const most = scores.reduce((a, b) => Math.max(a, b), -Infinity)
  const weights = scores.map((score) => Math.exp(score - most))
  const sum = weights.reduce((a, b) => a + b, 0)
  return weights.map((weight) => weight / sum)
}

/** Causal grouped-query attention: q [n][heads x headDim], k and v [n][kvHeads x headDim] -> [n][heads x headDim]. */
const attend = (q: ReadonlyArray<Float64Array>, k: ReadonlyArray<Float64Array>, v: ReadonlyArray<Float64Array>, headDim: number): Array<Float64Array> => {
  const group = q[0]!.length / k[0]!.length
  return q.map((query, n) => {
    const out = new Float64Array(query.length)
    for (let head = 0; head * headDim < query.length; head++) {
      const from = head * headDim
      const kvFrom = Math.floor(head / group) * headDim
      const scores = new Float64Array(n + 1)
      for (let t = 0; t <= n; t++) {
        let score = 0
        for (let i = 0; i < headDim; i++) score += query[from + i]! * k[t]![kvFrom + i]!
        scores[t] = score / Math.sqrt(headDim)
      }
      softmax(scores).forEach((weight, t) => {
        for (let i = 0; i < headDim; i++) out[from + i]! += weight * v[t]![kvFrom + i]!
      })
    }
    return out
  })
}

const add = (a: ReadonlyArray<Float64Array>, b: ReadonlyArray<Float64Array>): Array<Float64Array> => a.map((x, n) => x.map((value, i) => value + b[n]![i]!))

const roundToHalf = (value: number): number => numberOfHalf(halfOfNumber(value))

/** One token's key or value of one head as the pool keeps it: in f16, or the least number and a scale in f16, and levels. */
const roundKv = (head: Float64Array, dtype: KvDtype): void => {
  if (dtype === "f16") return head.forEach((value, i) => (head[i] = roundToHalf(value)))
  const levels = dtype === "int8" ? 255 : 15
  const zero = roundToHalf(Math.min(...head))
  const scale = roundToHalf((Math.max(...head) - zero) / levels)
  head.forEach((value, i) => (head[i] = zero + scale * Math.min(levels, Math.max(0, Math.round((value - zero) / scale)))))
}

export interface ReferenceOptions {
  /** Round where the engine rounds: what a quantised matrix is multiplied with to int8 in blocks of 32, and KV to `kvDtype`. */
  readonly rounded?: boolean
  /** f16 where absent. */
  readonly kvDtype?: KvDtype
  /** Rotate Hugging Face's pairs, (i, i + half a head), and not GGUF's, (2i, 2i + 1). */
  readonly halves?: boolean
  /** Called after each layer. */
  readonly progress?: (layer: number) => void
}

/** The logits after each token: [n][vocabulary]. */
export const referenceLogits = (file: ReferenceFile, tokens: ReadonlyArray<number>, options: ReferenceOptions = {}): Array<Float64Array> => {
  const rounded = options.rounded === true
  const number = (key: string, fallback?: number): number => {
    const found = file.metadata.get(key) ?? fallback
    if (typeof found !== "number") throw new Error(`${key}: expected a number, found ${String(found)}`)
    return found
  }
  const tensor = (name: string): Tensor => {
    const found = file.tensors.get(`${name}.weight`)
    if (found === undefined) throw new Error(`${name}.weight: expected, found none`)
    return found
  }
  const heads = number("llama.attention.head_count")
  const headDim = number("llama.attention.key_length", number("llama.embedding_length") / heads)
  const dims = number("llama.rope.dimension_count", headDim)
  const base = number("llama.rope.freq_base", 10000)
  const epsilon = number("llama.attention.layer_norm_rms_epsilon")

  const embedding = tensor("token_embd")
  const row = new Float32Array(embedding.shape[0]!)
  let x: Array<Float64Array> = tokens.map((token) => {
    rowOf(embedding, token, row)
    return Float64Array.from(row)
  })
  for (let layer = 0; layer < number("llama.block_count"); layer++) {
    const weight = (name: string): Tensor => tensor(`blk.${layer}.${name}`)
    const a = rmsNorm(weight("attn_norm"), epsilon, x)
    const q = multiply(weight("attn_q"), a, rounded)
    const k = multiply(weight("attn_k"), a, rounded)
    const v = multiply(weight("attn_v"), a, rounded)
    for (let n = 0; n < tokens.length; n++) {
      rotate(q[n]!, n, headDim, dims, base, options.halves === true)
      rotate(k[n]!, n, headDim, dims, base, options.halves === true)
    }
    if (rounded) for (const row of [...k, ...v]) for (let head = 0; head < row.length; head += headDim) roundKv(row.subarray(head, head + headDim), options.kvDtype ?? "f16")
    x = add(x, multiply(weight("attn_output"), attend(q, k, v, headDim), rounded))
    const f = rmsNorm(weight("ffn_norm"), epsilon, x)
    const gate = multiply(weight("ffn_gate"), f, rounded)
    const up = multiply(weight("ffn_up"), f, rounded)
    const hidden = gate.map((g, n) => g.map((value, i) => (value / (1 + Math.exp(-value))) * up[n]![i]!))
    x = add(x, multiply(weight("ffn_down"), hidden, rounded))
    options.progress?.(layer)
  }
  const output = file.tensors.get("output.weight") ?? embedding
  const last = rmsNorm(tensor("output_norm"), epsilon, x)
  if (!rounded || codecs[output.type].weights === 1) return multiply(output, last, false)
  // The engine's logits also see what rounding the last activations has lost, itself rounded.
  const lost = last.map((row) => {
    const kept = roundToInt8(row)
    return row.map((value, i) => value - kept[i]!)
  })
  return add(multiply(output, last, true), multiply(output, lost, true))
}

/** Log-softmax of logits, in float64. */
export const referenceLogSoftmax = (logits: ArrayLike<number>): Float64Array => {
  const values = Float64Array.from(logits)
  const most = values.reduce((a, b) => Math.max(a, b), -Infinity)
  const sum = values.reduce((total, value) => total + Math.exp(value - most), 0)
  return values.map((value) => value - most - Math.log(sum))
}

/** Root mean square of the logits' error, over the standard deviation of the exact ones. */
export const relativeError = (logits: ArrayLike<number>, exact: Float64Array): number => {
  const mean = exact.reduce((sum, value) => sum + value, 0) / exact.length
  const spread = exact.reduce((sum, value) => sum + (value - mean) ** 2, 0)
  return Math.sqrt(exact.reduce((sum, value, id) => sum + (value - logits[id]!) ** 2, 0) / spread)
}
