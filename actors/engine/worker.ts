/**
 * What the prefill and the decode role of one worker share: its engine, its name, and the format of its KV.
 */
import type { Engine } from "./engine.ts"

export interface Worker {
  readonly id: string
  /** Of this incarnation: what was reserved with an earlier one is gone. */
  readonly epoch: number
  readonly engine: Engine
  readonly formatId: string
}

/** Names what stored KV depends on besides its hash: another model, dtype, block size, numerics or device never matches. */
export const kvFormatId = (parts: { readonly modelDigest: string; readonly dtype: string; readonly blockTokens: number; readonly numericsVersion: number; readonly device: string }): string =>
  `${parts.modelDigest.slice(0, 16)}-${parts.dtype}-b${parts.blockTokens}-n${parts.numericsVersion}-${parts.device}`
