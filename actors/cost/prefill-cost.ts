/**
 * What computing a prompt takes: a polynomial over new tokens n and the prefix p that they follow, as Mooncake fits it, here
 * from an engine's own steps. Each step has a fixed part, each token its linear layers, and each token's attention all tokens
 * before it.
 */
import { coefficientsOf, emptyFit, withSample, type Fading, type LinearFit } from "./linear-fit.ts"

export interface PrefillCost {
  readonly stepMs: number
  readonly tokenMs: number
  /** Of one token's attention to one before it. */
  readonly pairMs: number
}

/** Tokens that are computed after others. */
export interface PrefillWork {
  readonly newTokens: number
  readonly prefixTokens: number
}

/** A step's prompts, and what it took. */
export interface PrefillSample {
  readonly work: ReadonlyArray<PrefillWork>
  readonly ms: number
}

export interface PrefillFit {
  readonly fit: LinearFit
  /** Of the first step that was measured: its own prior, since models differ a thousandfold. */
  readonly firstTokenMs: number
  readonly firstMs: number
}

const fading: Fading = { halfLifeSamples: 64, halfLifeMs: 600_000 }
/** Attention over so many tokens is believed to cost as much as the linear layers. */
const evenTokens = 2_048

const pairs = ({ newTokens, prefixTokens }: PrefillWork): number => newTokens * (prefixTokens + newTokens / 2)
const sum = (work: ReadonlyArray<PrefillWork>, of: (one: PrefillWork) => number): number => work.reduce((total, one) => total + of(one), 0)

/** `fit` with one more step; undefined: it is the first. */
export const withStep = (fit: PrefillFit | undefined, { work, ms }: PrefillSample, nowMs: number): PrefillFit | undefined => {
  const tokens = sum(work, ({ newTokens }) => newTokens)
  if (tokens === 0 || !(ms > 0)) return fit
  const { fit: before, ...first } = fit ?? { fit: emptyFit(3, nowMs), firstTokenMs: ms / (tokens + sum(work, pairs) / evenTokens), firstMs: ms }
  return { ...first, fit: withSample(before, [1, tokens, sum(work, pairs)], ms, fading, nowMs) }
}

export const prefillCostOf = ({ fit, firstTokenMs, firstMs }: PrefillFit, nowMs: number): PrefillCost => {
  const prior = [
    { value: 0, deviation: firstMs / 4 },
    { value: firstTokenMs, deviation: firstTokenMs },
    { value: firstTokenMs / evenTokens, deviation: firstTokenMs / evenTokens },
  ]
  const [stepMs = 0, tokenMs = 0, pairMs = 0] = coefficientsOf(fit, prior, fading, nowMs)
  return { stepMs, tokenMs, pairMs }
}

/** What the work takes in steps of at most so many tokens. */
export const prefillMs = ({ stepMs, tokenMs, pairMs }: PrefillCost, work: PrefillWork, stepTokens: number): number =>
  work.newTokens <= 0 ? 0 : stepMs * Math.ceil(work.newTokens / stepTokens) + tokenMs * work.newTokens + pairMs * pairs(work)
