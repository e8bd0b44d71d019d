import { asIs, permuteHalves, permuteNibbles, rotationOrder, toFloats, toHalves, type Convert } from "./convert.ts"
import type { TensorToStream } from "./gguf-file.ts"
import { ImportError } from "./import-error.ts"
import type { LlamaConfig } from "./llama-config.ts"
import { readRows, type SafeTensor } from "./safetensors.ts"

/**
 * The tensors of a GGUF file from those of an AWQ checkpoint: names and types become GGUF's, queries and keys are put into the order
 * of its rotation. AutoAWQ's words and scales are otherwise the file's own bytes (kernels/src/awq.h).
 * @throws ImportError where one is missing, not known, or of another dtype or shape
 */
export const awqTensors = (checkpoint: ReadonlyMap<string, SafeTensor>, config: LlamaConfig): ReadonlyArray<TensorToStream> => {
  const used = new Set<string>()
  const take = (name: string, dtypes: ReadonlyArray<string>, shape: ReadonlyArray<number>): SafeTensor => {
    const found = checkpoint.get(name)
    if (found === undefined) throw new ImportError(`${name}: expected in the checkpoint, found none`)
    if (!dtypes.includes(found.dtype) || found.shape.join() !== shape.join()) {
      throw new ImportError(`${found.file}: ${name}: expected ${dtypes.join(" or ")} [${shape.join(", ")}], found ${found.dtype} [${found.shape.join(", ")}]`)
    }
    used.add(name)
    return found
  }
  const stream = (name: string, type: TensorToStream["type"], from: SafeTensor, convert: Convert): TensorToStream => ({
    name,
    type,
    shape: from.shape.toReversed(),
    data: async function* () {
      for await (const piece of readRows(from, (from.end - from.start) / from.shape[0]!)) {
        try {
          yield convert(piece)
        } catch (error) {
          throw error instanceof RangeError ? new ImportError(`${from.file}: ${from.name}: ${error.message}`) : error
        }
      }
    },
  })

  const floats = ["F16", "BF16", "F32"]
  const norm = (name: string, source: string): TensorToStream => {
    const from = take(source, floats, [config.hidden])
    return stream(name, "F32", from, from.dtype === "F32" ? asIs : toFloats(from.dtype))
  }
  const halves = (name: string, source: string): TensorToStream => {
    const from = take(source, floats, [config.vocabulary, config.hidden])
    return stream(name, "F16", from, from.dtype === "F16" ? asIs : toHalves(from.dtype))
  }
  const matrix = (name: string, source: string, outputs: number, inputs: number, rotated = false): ReadonlyArray<TensorToStream> => {
    if (outputs % 8 !== 0 || inputs % 128 !== 0) throw new ImportError(`${source}: expected a multiple of 8 outputs and of 128 inputs, found ${outputs} and ${inputs}`)
    const levels = take(`${source}.qweight`, ["I32"], [inputs, outputs / 8])
    const zeros = take(`${source}.qzeros`, ["I32"], [inputs / 128, outputs / 8])
    const scales = take(`${source}.scales`, ["F16"], [inputs / 128, outputs])
    const order = rotated ? rotationOrder(outputs, config.headDim) : undefined
    const [words, halves] = order === undefined ? [asIs, asIs] : [permuteNibbles(order), permuteHalves(order)]
    return [stream(`${name}.qweight`, "I32", levels, words), stream(`${name}.qzeros`, "I32", zeros, words), stream(`${name}.scales`, "F16", scales, halves)]
  }

  const { hidden, heads, kvHeads, headDim, ffn, layers, tied, frequencyFactors } = config
  const layer = (i: number): ReadonlyArray<TensorToStream> => {
    const [to, from] = [`blk.${i}`, `model.layers.${i}`]
    return [
      norm(`${to}.attn_norm.weight`, `${from}.input_layernorm.weight`),
      ...matrix(`${to}.attn_q`, `${from}.self_attn.q_proj`, heads * headDim, hidden, true),
      ...matrix(`${to}.attn_k`, `${from}.self_attn.k_proj`, kvHeads * headDim, hidden, true),
      ...matrix(`${to}.attn_v`, `${from}.self_attn.v_proj`, kvHeads * headDim, hidden),
      ...matrix(`${to}.attn_output`, `${from}.self_attn.o_proj`, hidden, heads * headDim),
      norm(`${to}.ffn_norm.weight`, `${from}.post_attention_layernorm.weight`),
      ...matrix(`${to}.ffn_gate`, `${from}.mlp.gate_proj`, ffn, hidden),
      ...matrix(`${to}.ffn_up`, `${from}.mlp.up_proj`, ffn, hidden),
      ...matrix(`${to}.ffn_down`, `${from}.mlp.down_proj`, hidden, ffn),
    ]
  }
  const tensors = [
    halves("token_embd.weight", "model.embed_tokens.weight"),
    norm("output_norm.weight", "model.norm.weight"),
    ...(tied ? [] : [halves("output.weight", "lm_head.weight")]),
    ...Array.from({ length: layers }, (_, i) => layer(i)).flat(),
  ]
  if (frequencyFactors !== undefined) {
    const bytes = new Uint8Array(frequencyFactors.buffer)
    tensors.push({ name: "rope_freqs.weight", type: "F32", shape: [frequencyFactors.length], data: async function* () { yield bytes } })
  }
  // What would be left out of the computation is refused; the rotation's frequencies follow from config.json, and a tied head is the embedding.
  const known = (name: string): boolean => used.has(name) || name.endsWith(".rotary_emb.inv_freq") || (tied && name === "lm_head.weight")
  const unknown = [...checkpoint.values()].find(({ name }) => !known(name))
  if (unknown !== undefined) throw new ImportError(`${unknown.file}: ${unknown.name}: not known to LlamaForCausalLM in AWQ`)
  return tensors
}
