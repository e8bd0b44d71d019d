/**
 * How large a worker's KV pool is: from the model's shape, which its file's metadata tells, and the memory at hand.
 */
import { totalmem } from "node:os"
import { limits } from "../../config/limits.ts"
import { kvBytes, type Gguf, type KvDtype } from "../../kernels/index.ts"

const integer = (model: Gguf, key: string): number | undefined => {
  const value = model.metadata.get(key)
  return typeof value === "number" && Number.isInteger(value) && value > 0 ? value : undefined
}

const required = (model: Gguf, key: string): number => {
  const value = integer(model, key)
  if (value === undefined) throw new Error(`${model.path}: ${key}: expected a positive integer in the file's metadata`)
  return value
}

export interface KvPlan {
  readonly blocks: number
  readonly contextTokens: number
  /** Bytes of one layer of one block. */
  readonly layerBlockBytes: number
}

/**
 * `auto` takes a share of the free memory, on a GPU all of it, at most what `maxBatch` full contexts need. On a CPU memory is touched
 * only as blocks are first used. Throws where the metadata does not say the model's shape.
 */
export const planKv = (model: Gguf, options: { readonly blocks: number | "auto"; readonly blockTokens: number; readonly dtype: KvDtype; readonly maxBatch: number; readonly freeBytes: number; readonly gpu?: boolean }): KvPlan => {
  const architecture = String(model.metadata.get("general.architecture"))
  const context = required(model, `${architecture}.context_length`)
  const layers = required(model, `${architecture}.block_count`)
  const heads = required(model, `${architecture}.attention.head_count`)
  const kvHeads = integer(model, `${architecture}.attention.head_count_kv`) ?? heads
  const headDim = integer(model, `${architecture}.attention.key_length`) ?? required(model, `${architecture}.embedding_length`) / heads
  const blockBytes = layers * 2 * kvHeads * kvBytes(options.dtype, headDim) * options.blockTokens
  const useful = Math.ceil(context / options.blockTokens) * options.maxBatch
  // A GPU is its worker's own: what weights and steps leave of it is for KV.
  const share = options.gpu === true ? options.freeBytes : Math.min(options.freeBytes * limits.autoPoolMemoryShare, limits.autoPoolBytes)
  const affordable = Math.floor(share / blockBytes)
  const blocks = options.blocks === "auto" ? Math.max(1, Math.min(useful, affordable)) : options.blocks
  if (options.gpu !== true && blocks * blockBytes > totalmem()) {
    throw new Error(`kv.blocks: ${blocks} blocks of ${blockBytes} bytes are more than this machine's memory of ${totalmem()} bytes; at most ${Math.floor(totalmem() / blockBytes)} fit`)
  }
  return { blocks, contextTokens: Math.min(context, blocks * options.blockTokens), layerBlockBytes: blockBytes / layers }
}
