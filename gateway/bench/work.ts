/** What runs of `bench kernels` are made of: tokens, and what a model's forward multiplies and reads. */
import type { Gguf } from "../../kernels/index.ts"

/** Token ids that all differ: a walk through the vocabulary from somewhere else each time. */
export const distinctTokens = (count: number, vocabulary: number, salt: number): ReadonlyArray<number> => {
  const stride = 7_919 // a prime that divides no vocabulary in use
  return Array.from({ length: count }, (_, i) => ((i + 1) * stride + salt * 104_729) % vocabulary)
}

/** A number under the architecture's name; 0 where there is none. */
export const numberOf = (metadata: Gguf["metadata"], key: string): number => Number(metadata.get(`${String(metadata.get("general.architecture"))}.${key}`) ?? 0)

/** What a model's forward multiplies and reads at least. */
export const work = ({ tensors, metadata }: Gguf) => {
  const embedding = tensors.find(({ name }) => name === "token_embd.weight")
  const head = tensors.find(({ name }) => name === "output.weight") ?? embedding
  const layers = tensors.filter(({ name, shape }) => shape.length === 2 && name.startsWith("blk."))
  const size = (tensor: Gguf["tensors"][number] | undefined): number => tensor?.shape.reduce((a, b) => a * b, 1) ?? 0
  const number = (key: string): number => numberOf(metadata, key)
  const headDim = number("attention.key_length") || number("embedding_length") / number("attention.head_count")
  return {
    layerMacs: layers.reduce((sum, tensor) => sum + size(tensor), 0),
    headMacs: size(head),
    layerBytes: layers.reduce((sum, { bytes }) => sum + bytes, 0),
    headBytes: head?.bytes ?? 0,
    kvBytes: number("block_count") * 2 * (number("attention.head_count_kv") || number("attention.head_count")) * headDim * 2,
  }
}

