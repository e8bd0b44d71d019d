/**
 * Tiny but complete models in GGUF, for tests: random weights, a real byte-level BPE vocabulary, a chat template.
 * The text they write is gibberish; what matters is that it depends on every token, and that every path runs.
 */
import { writeFile } from "node:fs/promises"
import { awqTensors } from "./awq.ts"
import { array, bool, f32, ggufBytes, text, u32, type GgufToWrite, type TensorToWrite, type TensorTypeName, type Value } from "./gguf-writer.ts"
import { quantise } from "./quantise.ts"

/** Matrices of a layer, and those outside the layers, by the format's names. */
export const matrixNames = ["token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] as const
export type MatrixName = (typeof matrixNames)[number]

export interface TinyModelOptions {
  readonly layers?: number
  readonly hidden?: number
  readonly heads?: number
  readonly kvHeads?: number
  readonly headDim?: number
  readonly ffn?: number
  /** At least 259: three special tokens and the 256 bytes. */
  readonly vocabulary?: number
  readonly context?: number
  /** One type for all matrices, or one by matrix; the others are F32. Norms are always F32. */
  readonly types?: TensorTypeName | Partial<Record<MatrixName, TensorTypeName>>
  /** Types of some layers' matrices, as "blk.1.attn_q". */
  readonly layerTypes?: Readonly<Record<string, TensorTypeName>>
  /** The layers' matrices as AWQ's three tensors each (awq.ts): shapes of multiples of 128. */
  readonly awq?: boolean
  readonly seed?: number
  /** No matrix of its own for the output: it is the embedding. */
  readonly tied?: boolean
  readonly ropeBase?: number
  readonly epsilon?: number
  readonly chatTemplate?: string | null
  /** Changes a tensor's weights before they are encoded; the name is as in the file. */
  readonly alter?: (name: string, weights: Float32Array) => void
  /** Changes a tensor's bytes after that. */
  readonly alterBytes?: (name: string, bytes: Uint8Array, type: TensorTypeName) => void
  /** Replaces or, with null, removes metadata; for tests of what a loader refuses. */
  readonly metadata?: Readonly<Record<string, Value | null>>
}

export const tinyDefaults = {
  layers: 2,
  hidden: 64,
  heads: 4,
  kvHeads: 2,
  headDim: 16,
  ffn: 96,
  vocabulary: 320,
  context: 512,
  seed: 1,
  tied: true,
  ropeBase: 10000,
  epsilon: 1e-5,
} as const

const chatml = `{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}`

export const specialTokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] as const

/** Uniform in [0, 1): mulberry32 (public domain, Tommy Ettinger). */
export const randomNumbers = (seed: number): (() => number) => {
  let state = seed | 0
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let t = Math.imul(state ^ (state >>> 15), 1 | state)
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32
  }
}

/** GPT-2's printable character for each byte. */
const byteCharacters = (): ReadonlyArray<string> => {
  const printable = (byte: number): boolean => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
  let next = 256
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++))
}

const corpus = `The water comes down the penstock and turns the wheel, and the wheel turns the stones that grind the corn.
When the gate is open the stream is full; when the gate is closed the water waits behind the wall.
Nothing is lost: what the mill does not need flows over the weir and on to the river, and the river to the sea.`

/** Byte-pair encoding (Sennrich et al. 2016) learnt from the corpus: the most frequent pair first, the first seen on ties. */
const learnMerges = (most: number): ReadonlyArray<readonly [string, string]> => {
  const characters = byteCharacters()
  let words = (corpus.match(/ ?[A-Za-z]+|[^A-Za-z ]+/g) ?? []).map((word) => [...Buffer.from(word)].map((byte) => characters[byte]!))
  const merges: Array<readonly [string, string]> = []
  while (merges.length < most) {
    const counts = new Map<string, { pair: readonly [string, string]; count: number }>()
    for (const word of words) {
      for (let i = 0; i + 1 < word.length; i++) {
        const pair = [word[i]!, word[i + 1]!] as const
        const entry = counts.get(pair.join(" ")) ?? { pair, count: 0 }
        entry.count++
        counts.set(pair.join(" "), entry)
      }
    }
    const best = [...counts.values()].reduce((a, b) => (b.count > a.count ? b : a), { pair: ["", ""] as const, count: 1 })
    if (best.count < 2) break
    merges.push(best.pair)
    words = words.map((word) => {
      const merged: Array<string> = []
      for (let i = 0; i < word.length; i++) {
        const joins = word[i] === best.pair[0] && word[i + 1] === best.pair[1]
        merged.push(joins ? word[i]! + word[++i]! : word[i]!)
      }
      return merged
    })
  }
  return merges
}

/** Tokens and merges of a vocabulary: specials, bytes, merged tokens, and unused ones up to the size. */
const tinyVocabulary = (size: number): { tokens: Array<string>; types: Array<number>; merges: Array<string> } => {
  const tokens: Array<string> = [...specialTokens, ...byteCharacters()]
  if (size < tokens.length) throw new Error(`vocabulary: expected at least ${tokens.length}, found ${size}`)
  const types: Array<number> = tokens.map((_, i) => (i < specialTokens.length ? 3 : 1))
  const merges: Array<string> = []
  for (const [left, right] of learnMerges(size - tokens.length)) {
    merges.push(`${left} ${right}`)
    // Two merges may build the same token.
    if (!tokens.includes(left + right)) {
      tokens.push(left + right)
      types.push(1)
    }
  }
  while (tokens.length < size) {
    tokens.push(`<|unused_${tokens.length}|>`)
    types.push(5)
  }
  return { tokens, types, merges }
}

export interface LlamaShape {
  readonly layers: number
  readonly context: number
  readonly hidden: number
  readonly ffn: number
  readonly heads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly epsilon: number
  readonly ropeBase: number
  readonly vocabulary: number
}

/** What a file of the architecture llama says of its shape. */
export const llamaMetadata = (name: string, shape: LlamaShape): ReadonlyArray<readonly [string, Value]> => [
  ["general.architecture", text("llama")],
  ["general.name", text(name)],
  ["llama.block_count", u32(shape.layers)],
  ["llama.context_length", u32(shape.context)],
  ["llama.embedding_length", u32(shape.hidden)],
  ["llama.feed_forward_length", u32(shape.ffn)],
  ["llama.attention.head_count", u32(shape.heads)],
  ["llama.attention.head_count_kv", u32(shape.kvHeads)],
  ["llama.attention.key_length", u32(shape.headDim)],
  ["llama.attention.value_length", u32(shape.headDim)],
  ["llama.attention.layer_norm_rms_epsilon", f32(shape.epsilon)],
  ["llama.rope.freq_base", f32(shape.ropeBase)],
  ["llama.rope.dimension_count", u32(shape.headDim)],
  ["llama.vocab_size", u32(shape.vocabulary)],
]

/** A tiny model; a pure function of the options. */
export const tinyModel = (options: TinyModelOptions = {}): GgufToWrite => {
  const o = { ...tinyDefaults, ...options }
  const random = randomNumbers(o.seed)
  const normal = (): number => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random())
  const normals = (count: number, mean: number, deviation: number): Float32Array =>
    Float32Array.from({ length: count }, () => mean + deviation * normal())
  const typeOf = (name: string): TensorTypeName => {
    const matrix = name.split(".").at(-1) as MatrixName
    return o.layerTypes?.[name] ?? (typeof o.types === "string" ? o.types : o.types?.[matrix]) ?? "F32"
  }

  const tensors: Array<TensorToWrite> = []
  const tensor = (name: string, type: TensorTypeName, shape: ReadonlyArray<number>, weights: Float32Array): void => {
    o.alter?.(name, weights)
    const data = quantise(type, weights)
    o.alterBytes?.(name, data, type)
    tensors.push({ name, type, shape, data })
  }
  /** rows x columns, of a deviation that gives outputs of about `gain` for inputs of about 1. */
  const matrix = (name: string, columns: number, rows: number, gain: number): void => {
    const weights = normals(columns * rows, 0, gain / Math.sqrt(columns))
    if (o.awq === true && name.startsWith("blk.")) tensors.push(...awqTensors(name, weights, { outputs: rows, inputs: columns }))
    else tensor(`${name}.weight`, typeOf(name), [columns, rows], weights)
  }
  const norm = (name: string, size: number): void => tensor(`${name}.weight`, "F32", [size], normals(size, 1, 0.1))
  // What the layers add outweighs the embedding, or a tied output would say the last token again and again.
  matrix("token_embd", o.hidden, o.vocabulary, 2.5)
  norm("output_norm", o.hidden)
  if (!o.tied) matrix("output", o.hidden, o.vocabulary, 2.5)
  for (let layer = 0; layer < o.layers; layer++) {
    const prefix = `blk.${layer}`
    norm(`${prefix}.attn_norm`, o.hidden)
    matrix(`${prefix}.attn_q`, o.hidden, o.heads * o.headDim, 1.3)
    matrix(`${prefix}.attn_k`, o.hidden, o.kvHeads * o.headDim, 1.3)
    matrix(`${prefix}.attn_v`, o.hidden, o.kvHeads * o.headDim, 1.5)
    matrix(`${prefix}.attn_output`, o.heads * o.headDim, o.hidden, 3)
    norm(`${prefix}.ffn_norm`, o.hidden)
    matrix(`${prefix}.ffn_gate`, o.hidden, o.ffn, 1.5)
    matrix(`${prefix}.ffn_up`, o.hidden, o.ffn, 1.5)
    matrix(`${prefix}.ffn_down`, o.ffn, o.hidden, 3)
  }

  const { tokens, types, merges } = tinyVocabulary(o.vocabulary)
  const template = o.chatTemplate === undefined ? chatml : o.chatTemplate
  const metadata = new Map<string, Value | null>([
    ...llamaMetadata("tiny", o),
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.pre", text("smollm")],
    ["tokenizer.ggml.tokens", array("string", tokens)],
    ["tokenizer.ggml.token_type", array("i32", types)],
    ["tokenizer.ggml.merges", array("string", merges)],
    ["tokenizer.ggml.bos_token_id", u32(1)],
    ["tokenizer.ggml.eos_token_id", u32(2)],
    ["tokenizer.ggml.unknown_token_id", u32(0)],
    ["tokenizer.ggml.padding_token_id", u32(2)],
    ["tokenizer.ggml.add_bos_token", bool(false)],
    ["tokenizer.ggml.add_space_prefix", bool(false)],
    ["tokenizer.chat_template", template === null ? null : text(template)],
    ...Object.entries(o.metadata ?? {}),
  ])
  return { metadata: [...metadata].flatMap(([key, value]) => (value === null ? [] : [[key, value] as const])), tensors }
}

/** A tiny model's file as bytes. */
export const tinyModelBytes = (options: TinyModelOptions = {}): Uint8Array => ggufBytes(tinyModel(options))

/** Writes a tiny model; see `TinyModelOptions`. */
export const writeTinyModel = (path: string, options: TinyModelOptions = {}): Promise<void> => writeFile(path, tinyModelBytes(options))
