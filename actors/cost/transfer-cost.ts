/** What moving KV from one source takes: a fixed part, and its bytes at the bandwidth of where they lie, from completed transfers. */
import { coefficientsOf, emptyFit, withSample, type Belief, type Fading, type LinearFit } from "./linear-fit.ts"

export interface TransferCost {
  readonly latencyMs: number
  readonly memoryMsPerMb: number
  readonly diskMsPerMb: number
}

/** A transfer's bytes, by where they lie at its source: in memory (a pool's always do) or on disk only. */
export interface MovedBytes {
  readonly memory: number
  readonly disk: number
}

export interface TransferSample extends MovedBytes {
  readonly ms: number
}

/** A source that was slow is believed to be again after a while, or it would never be tried, and never found to be quick. */
const fading: Fading = { halfLifeSamples: 16, halfLifeMs: 60_000 }
const mb = 1_000_000

/** Before anything was measured: quick enough to be tried. A few blocks that are late are taken for latency more than for bandwidth. */
const prior: ReadonlyArray<Belief> = [
  { value: 2, deviation: 20 },
  { value: 2, deviation: 20 },
  { value: 3, deviation: 20 },
]

export const noTransfers = (nowMs: number): LinearFit => emptyFit(prior.length, nowMs)

export const withTransfer = (fit: LinearFit, { memory, disk, ms }: TransferSample, nowMs: number): LinearFit =>
  withSample(fit, [1, memory / mb, disk / mb], ms, fading, nowMs)

export const transferCostOf = (fit: LinearFit, nowMs: number): TransferCost => {
  const [latencyMs = 0, memoryMsPerMb = 0, diskMsPerMb = 0] = coefficientsOf(fit, prior, fading, nowMs)
  return { latencyMs, memoryMsPerMb, diskMsPerMb }
}

export const transferMs = ({ latencyMs, memoryMsPerMb, diskMsPerMb }: TransferCost, { memory, disk }: MovedBytes): number =>
  latencyMs + (memoryMsPerMb * memory + diskMsPerMb * disk) / mb
