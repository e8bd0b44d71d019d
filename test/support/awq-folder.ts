/** A tiny model as AutoAWQ leaves it in a Hugging Face folder: random weights, the tokenizer of tiny-model.ts as tokenizer.json. */
import { mkdir, writeFile } from "node:fs/promises"
import { join } from "node:path"
import { i32 } from "./awq.ts"
import { ggufBytes, type TensorToWrite, type Value } from "./gguf-writer.ts"
import { quantise } from "./quantise.ts"
import { specialTokens, tinyDefaults, tinyModel, type TinyModelOptions } from "./tiny-model.ts"

type Json = Record<string, unknown>
export interface AwqFolder {
  /** Files of JSON by name. */
  readonly json: Record<string, Json>
  /** Tensors by Hugging Face's names; GGUF's order of dimensions. */
  readonly tensors: Array<TensorToWrite>
}

const names: Readonly<Record<string, string>> = {
  token_embd: "embed_tokens",
  output_norm: "norm",
  attn_norm: "input_layernorm",
  ffn_norm: "post_attention_layernorm",
  attn_q: "self_attn.q_proj",
  attn_k: "self_attn.k_proj",
  attn_v: "self_attn.v_proj",
  attn_output: "self_attn.o_proj",
  ffn_gate: "mlp.gate_proj",
  ffn_up: "mlp.up_proj",
  ffn_down: "mlp.down_proj",
}

const huggingFaceName = (name: string): string => {
  const parts = name.split(".")
  const [module, tensor] = parts.splice(-2)
  if (module === "output") return `lm_head.${tensor}`
  return ["model", ...(parts.length > 0 ? ["layers", parts[1]] : []), names[module!], tensor].join(".")
}

export const awqShape = { hidden: 128, heads: 4, kvHeads: 2, headDim: 32, ffn: 256, vocabulary: 330 } as const

const dtypes: Readonly<Record<string, string>> = { F32: "F32", F16: "F16", BF16: "BF16", [i32]: "I32" }
const safetensors = (tensors: ReadonlyArray<TensorToWrite>): Uint8Array => {
  let at = 0
  const header = Object.fromEntries(
    tensors.map(({ name, type, shape, data }) => [name, { dtype: dtypes[type] ?? String(type), shape: shape.map(Number).reverse(), data_offsets: [at, (at += data.length)] }]),
  )
  const text = Buffer.from(JSON.stringify({ __metadata__: { format: "pt" }, ...header }))
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(text.length))
  return Buffer.concat([length, text, ...tensors.map(({ data }) => data)])
}

/**
 * Writes the folder, with a GGUF file beside it that has the same tensors in Hugging Face's order, for a forward that rotates halves.
 * @param change of what is to be written, for what an import refuses
 * @returns the path of that file
 */
export const writeAwqFolder = async (
  folder: string,
  { shards = 1, change, ...options }: TinyModelOptions & { readonly shards?: number; readonly change?: (folder: AwqFolder) => void } = {},
): Promise<string> => {
  const o = { ...tinyDefaults, ...awqShape, ...options }
  const model = tinyModel({ types: { token_embd: "BF16", output: "F16" }, ...o, awq: true })
  const tensors = model.tensors.map((tensor) => {
    if (tensor.type !== "F32") return tensor
    const { buffer, byteOffset, byteLength } = tensor.data // a norm
    return { ...tensor, type: "F16" as const, data: quantise("F16", new Float32Array(buffer, byteOffset, byteLength / 4)) }
  })
  const values = new Map(model.metadata)
  const listOf = (key: string): ReadonlyArray<unknown> => (values.get(key) as Value & { readonly values: ReadonlyArray<unknown> }).values
  const tokens = listOf("tokenizer.ggml.tokens") as ReadonlyArray<string>
  const types = listOf("tokenizer.ggml.token_type")
  const template = values.get("tokenizer.chat_template")
  const json: Record<string, Json> = {
    "config.json": {
      architectures: ["LlamaForCausalLM"],
      hidden_size: o.hidden,
      num_hidden_layers: o.layers,
      num_attention_heads: o.heads,
      num_key_value_heads: o.kvHeads,
      head_dim: o.headDim,
      intermediate_size: o.ffn,
      vocab_size: o.vocabulary,
      max_position_embeddings: o.context,
      rms_norm_eps: o.epsilon,
      rope_theta: o.ropeBase,
      rope_scaling: null,
      hidden_act: "silu",
      tie_word_embeddings: o.tied,
      quantization_config: { quant_method: "awq", bits: 4, group_size: 128, version: "gemm", zero_point: true, modules_to_not_convert: null },
    },
    "tokenizer.json": {
      added_tokens: specialTokens.map((content, id) => ({ id, content, special: true, lstrip: false, rstrip: false, single_word: false, normalized: false })),
      normalizer: null,
      pre_tokenizer: { type: "Sequence", pretokenizers: [{ type: "Digits", individual_digits: true }, { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true }] },
      post_processor: null,
      decoder: { type: "ByteLevel" },
      model: {
        type: "BPE",
        vocab: Object.fromEntries(tokens.flatMap((token, id) => (types[id] === 5 ? [] : [[token, id]]))),
        merges: listOf("tokenizer.ggml.merges").map((merge) => String(merge).split(" ")),
      },
    },
    "tokenizer_config.json": { bos_token: specialTokens[1], eos_token: { content: specialTokens[2] }, ...(template?.type === "string" ? { chat_template: template.value } : {}) },
    "generation_config.json": { eos_token_id: [2, 0] },
  }
  const content: AwqFolder = { json, tensors: tensors.map((tensor) => ({ ...tensor, name: huggingFaceName(tensor.name) })) }
  change?.(content)

  await mkdir(folder, { recursive: true })
  for (const [name, value] of Object.entries(content.json)) await writeFile(join(folder, name), JSON.stringify(value))
  const of = (shard: number): ReadonlyArray<TensorToWrite> => content.tensors.filter((_, i) => i % shards === shard)
  const fileOf = (shard: number): string => (shards === 1 ? "model.safetensors" : `model-${shard + 1}-of-${shards}.safetensors`)
  for (let shard = 0; shard < shards; shard++) await writeFile(join(folder, fileOf(shard)), safetensors(of(shard)))
  const weightMap = Object.fromEntries(content.tensors.map(({ name }, i) => [name, fileOf(i % shards)]))
  if (shards > 1) await writeFile(join(folder, "model.safetensors.index.json"), JSON.stringify({ weight_map: weightMap }))
  const unpermuted = `${folder}.gguf`
  await writeFile(unpermuted, ggufBytes({ metadata: model.metadata, tensors }))
  return unpermuted
}
