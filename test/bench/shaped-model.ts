/**
 * Writes a model of a well-known shape with random weights, to measure kernels where the real one cannot be had:
 *
 *     node --import tsx test/bench/shaped-model.ts llama-3-8b Q4_0 /tmp/model.gguf [layers]
 *
 * What it says is gibberish; what it reads and multiplies is the real model's.
 */
import { closeSync, openSync, writeSync } from "node:fs"
import { array, ggufBytes, tensorTypeIds, text, u32, type TensorTypeName } from "../support/gguf-writer.ts"
import { quantise } from "../support/quantise.ts"
import { llamaMetadata, randomNumbers } from "../support/tiny-model.ts"

/** Llama-3-8B and SmolLM2-135M, as their files say. */
const shapes = {
  "llama-3-8b": { layers: 32, hidden: 4096, heads: 32, kvHeads: 8, headDim: 128, ffn: 14336, vocabulary: 128256, ropeBase: 500000 },
  "smollm2-135m": { layers: 30, hidden: 576, heads: 9, kvHeads: 3, headDim: 64, ffn: 1536, vocabulary: 49152, ropeBase: 100000 },
} as const

const [shapeName, typeName, path, layersText] = process.argv.slice(2)
const shape = shapes[shapeName as keyof typeof shapes]
if (shape === undefined || !(String(typeName) in tensorTypeIds) || path === undefined) {
  console.error(`usage: shaped-model.ts ${Object.keys(shapes).join("|")} ${Object.keys(tensorTypeIds).join("|")} FILE [LAYERS]`)
  process.exit(2)
}
const type = typeName as TensorTypeName
const layers = Number(layersText ?? shape.layers)

/** As many weights as are drawn; longer tensors repeat them. A multiple of every block size. */
const drawn = 1 << 20
const random = randomNumbers(1)
const bytesOf = new Map<string, Uint8Array>()
/** `drawn` weights of a deviation that keeps what flows through about 1. */
const pattern = (of: TensorTypeName, columns: number): Uint8Array => {
  const key = `${of} ${columns}`
  const made = bytesOf.get(key) ?? quantise(of, Float32Array.from({ length: drawn }, () => ((random() - 0.5) * Math.sqrt(12)) / Math.sqrt(columns)))
  bytesOf.set(key, made)
  return made
}

interface Planned {
  readonly name: string
  readonly type: TensorTypeName
  readonly shape: ReadonlyArray<number>
  readonly from: Uint8Array
  readonly bytes: number
}
const tensors: Array<Planned> = []
const matrix = (name: string, columns: number, rows: number, of: TensorTypeName): void => {
  const from = pattern(of, columns)
  tensors.push({ name: `${name}.weight`, type: of, shape: [columns, rows], from, bytes: (from.length / drawn) * columns * rows })
}
const norm = (name: string): void => {
  const from = quantise("F32", new Float32Array(shape.hidden).fill(1))
  tensors.push({ name: `${name}.weight`, type: "F32", shape: [shape.hidden], from, bytes: from.length })
}
// The embedding and the head stay in halves, as quantisers of checkpoints leave them.
matrix("token_embd", shape.hidden, shape.vocabulary, "F16")
matrix("output", shape.hidden, shape.vocabulary, "F16")
norm("output_norm")
for (let layer = 0; layer < layers; layer++) {
  const prefix = `blk.${layer}`
  norm(`${prefix}.attn_norm`)
  matrix(`${prefix}.attn_q`, shape.hidden, shape.heads * shape.headDim, type)
  matrix(`${prefix}.attn_k`, shape.hidden, shape.kvHeads * shape.headDim, type)
  matrix(`${prefix}.attn_v`, shape.hidden, shape.kvHeads * shape.headDim, type)
  matrix(`${prefix}.attn_output`, shape.heads * shape.headDim, shape.hidden, type)
  norm(`${prefix}.ffn_norm`)
  matrix(`${prefix}.ffn_gate`, shape.hidden, shape.ffn, type)
  matrix(`${prefix}.ffn_up`, shape.hidden, shape.ffn, type)
  matrix(`${prefix}.ffn_down`, shape.ffn, shape.hidden, type)
}

const alignment = 32
const aligned = (bytes: number): number => Math.ceil(bytes / alignment) * alignment
const offsets: Array<number> = []
tensors.reduce((offset, { bytes }) => (offsets.push(offset), offset + aligned(bytes)), 0)
const header = ggufBytes({
  alignment,
  metadata: [
    ...llamaMetadata(`${shapeName} ${type}, random`, { ...shape, layers, context: 8192, epsilon: 1e-5 }),
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.pre", text("smollm")],
    ["tokenizer.ggml.tokens", array("string", Array.from({ length: shape.vocabulary }, (_, i) => (i < 256 ? String.fromCodePoint(0x100 + i) : `t${i}`)))],
    ["tokenizer.ggml.token_type", array("i32", Array.from({ length: shape.vocabulary }, () => 1))],
    ["tokenizer.ggml.merges", array("string", [])],
    ["tokenizer.ggml.bos_token_id", u32(1)],
    ["tokenizer.ggml.eos_token_id", u32(2)],
  ],
  tensors: tensors.map(({ name, type: of, shape: size }, i) => ({ name, type: of, shape: size, data: new Uint8Array(0), offset: offsets[i]! })),
})

const file = openSync(path, "w")
const write = (bytes: Uint8Array): void => {
  for (let at = 0; at < bytes.length; ) at += writeSync(file, bytes, at)
}
write(header)
for (const { from, bytes } of tensors) {
  for (let left = bytes; left > 0; left -= from.length) write(left < from.length ? from.subarray(0, left) : from)
  write(new Uint8Array(aligned(bytes) - bytes))
}
closeSync(file)
