/**
 * What the prefill and the decode role of one worker share: its engine, its name, the format of its KV, and the transfers
 * that it takes part in.
 */
import type { KvDtype } from "../../kernels/index.ts"
import type { MeasuredCosts } from "../cost/measured-costs.ts"
import type { TransferTotals } from "../messages/presence.ts"
import type { Role } from "../messages/scheduler.ts"
import type { Engine } from "./engine.ts"

export interface Worker {
  readonly id: string
  /** Of this incarnation: what was reserved with an earlier one is gone. */
  readonly epoch: number
  /** Where the scheduler places; they change while it runs. */
  roles: ReadonlyArray<Role>
  readonly engine: Engine
  readonly formatId: string
  /** Whether KV may go to a worker on another kind of device; see `formatsMeet`. */
  readonly mixedKv: boolean
  readonly kv: KvLayout
  readonly costs: MeasuredCosts
  /** By transfer id: reservations whose KV another worker was to compute. */
  readonly receiving: Map<string, Receiving>
  readonly totals: { -readonly [K in keyof TransferTotals]: TransferTotals[K] }
}

export interface Receiving {
  readonly prefixTokens: number
  /** The first tokens, as token frames, once all KV has come and was taken over. */
  readonly first: ReadonlyArray<Uint8Array> | undefined
  /** Waits for KV no longer: the reservation is over, or its KV is to be computed here after all. */
  stop(): void
}

export interface KvLayout {
  readonly layers: number
  readonly dtype: KvDtype
  readonly blockTokens: number
  /** Bytes of one layer of one block. */
  readonly layerBlockBytes: number
}

/** Names what stored KV depends on besides its hash: another model, dtype, block size, numerics or device never matches. */
export const kvFormatId = (parts: { readonly modelDigest: string; readonly dtype: KvDtype; readonly blockTokens: number; readonly numericsVersion: number; readonly device: string }): string =>
  `${parts.modelDigest.slice(0, 16)}-${parts.dtype}-b${parts.blockTokens}-n${parts.numericsVersion}-${parts.device}`

/** Whether KV of one format may be taken for another: formats that differ in nothing but the device, where the topology says `mixedKv`. */
export const formatsMeet = (one: string, other: string, mixedKv: boolean): boolean => {
  const withoutDevice = (formatId: string): string => formatId.slice(0, formatId.lastIndexOf("-"))
  return one === other || (mixedKv && withoutDevice(one) === withoutDevice(other))
}
