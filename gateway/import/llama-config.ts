import { f32, text, u32, type Metadata } from "./gguf-file.ts"
import type { JsonFile } from "./json-file.ts"

/** What a Llama's config.json says of its shape. */
export interface LlamaConfig {
  readonly layers: number
  readonly hidden: number
  readonly heads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly ffn: number
  readonly vocabulary: number
  /** The output matrix is the embedding. */
  readonly tied: boolean
  /** Divisors of the rotation's frequencies, [headDim / 2]; none where they are not scaled. */
  readonly frequencyFactors: Float32Array | undefined
  readonly metadata: Metadata
}

/**
 * Llama 3.1's scaling of the rotation: frequencies whose wavelength is long beside the context of training are divided by `factor`,
 * short ones kept, and those between interpolated. Source: `_compute_llama3_parameters` of transformers' modeling_rope_utils.
 */
const llama3Factors = (config: JsonFile, headDim: number, base: number): Float32Array => {
  const of = (key: string): number => config.positive(`rope_scaling.${key}`)
  const [factor, low, high, context] = [of("factor"), of("low_freq_factor"), of("high_freq_factor"), of("original_max_position_embeddings")]
  if (low >= high) config.refuse("rope_scaling.low_freq_factor", "less than high_freq_factor")
  return Float32Array.from({ length: headDim / 2 }, (_, i) => {
    const turns = context / (2 * Math.PI * base ** ((2 * i) / headDim))
    const kept = Math.min(1, Math.max(0, (turns - low) / (high - low)))
    return 1 / ((1 - kept) / factor + kept)
  })
}

/** Checks a config.json as AutoAWQ writes it; whatever would change results and is not done here is refused by name. */
export const readLlamaConfig = (config: JsonFile, name: string): LlamaConfig => {
  if (JSON.stringify(config.get("architectures")) !== '["LlamaForCausalLM"]') config.refuse("architectures", '["LlamaForCausalLM"]')
  config.oneOf("quantization_config.quant_method", "awq")
  config.oneOf("quantization_config.bits", 4)
  config.oneOf("quantization_config.group_size", 128)
  config.oneOf("quantization_config.version", "gemm", "GEMM")
  config.oneOf("quantization_config.zero_point", true)
  const kept = config.get("quantization_config.modules_to_not_convert") ?? []
  if (!["[]", '["lm_head"]'].includes(JSON.stringify(kept))) config.refuse("quantization_config.modules_to_not_convert", 'nothing, [] or ["lm_head"]')
  config.oneOf("hidden_act", "silu")
  config.oneOf("attention_bias", false, undefined)
  config.oneOf("mlp_bias", false, undefined)
  config.oneOf("tie_word_embeddings", true, false, undefined)
  config.oneOf("rope_parameters", undefined)

  const [hidden, heads] = [config.count("hidden_size"), config.count("num_attention_heads")]
  const headDim = config.count("head_dim", hidden / heads)
  const kvHeads = config.count("num_key_value_heads", heads)
  const base = config.positive("rope_theta", 10_000)
  if (headDim % 2 !== 0) config.refuse("head_dim", "an even number")
  if (heads % kvHeads !== 0) config.refuse("num_key_value_heads", `a divisor of num_attention_heads, ${heads}`)
  config.oneOf("rope_scaling.rope_type", "llama3", "default", undefined)
  const scaled = config.get("rope_scaling.rope_type") === "llama3"
  // Older files say `type`, of which only the absence of scaling is known here.
  config.oneOf("rope_scaling.type", "default", undefined, ...(scaled ? ["llama3"] : []))

  const shape = {
    layers: config.count("num_hidden_layers"),
    hidden,
    heads,
    kvHeads,
    headDim,
    ffn: config.count("intermediate_size"),
    vocabulary: config.count("vocab_size"),
    tied: config.get("tie_word_embeddings") === true,
    frequencyFactors: scaled ? llama3Factors(config, headDim, base) : undefined,
  }
  const metadata: Metadata = [
    ["general.architecture", text("llama")],
    ["general.name", text(name)],
    ["llama.block_count", u32(shape.layers)],
    ["llama.context_length", u32(config.count("max_position_embeddings"))],
    ["llama.embedding_length", u32(hidden)],
    ["llama.feed_forward_length", u32(shape.ffn)],
    ["llama.attention.head_count", u32(heads)],
    ["llama.attention.head_count_kv", u32(kvHeads)],
    ["llama.attention.key_length", u32(headDim)],
    ["llama.attention.value_length", u32(headDim)],
    ["llama.attention.layer_norm_rms_epsilon", f32(config.positive("rms_norm_eps"))],
    ["llama.rope.freq_base", f32(base)],
    ["llama.rope.dimension_count", u32(headDim)],
    ["llama.vocab_size", u32(shape.vocabulary)],
  ]
  return { ...shape, metadata }
}
