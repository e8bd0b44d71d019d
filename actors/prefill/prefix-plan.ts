/**
 * Where the KV of a prefix comes from: of what is offered, the part that lets the sequence go on soonest, or nothing, where it
 * is computed sooner. Pure: a function of what is measured.
 */
import { prefillMs, type PrefillCost } from "../cost/prefill-cost.ts"
import { transferMs, type TransferCost } from "../cost/transfer-cost.ts"

export interface PrefixNeed {
  /** Tokens of the sequence, and how many of the first have KV here. */
  readonly tokens: number
  readonly computedTokens: number
  readonly blockTokens: number
  readonly blockBytes: number
  /** What is computed here before it. */
  readonly queuedTokens: number
  /** Tokens of a step. */
  readonly stepTokens: number
}

/** Blocks that follow what is here, in order. */
export interface PrefixOffer {
  readonly source: string
  /** Of each block: whether it has to be read from disk first. */
  readonly onDisk: ReadonlyArray<boolean>
  readonly cost: TransferCost
}

export interface PrefixPlan<O extends PrefixOffer = PrefixOffer> {
  /** Undefined: all of it is computed. */
  readonly offer: O | undefined
  /** Leading blocks of the offer that are fetched. */
  readonly blocks: number
  /** Estimates, undefined before a step was measured: until the sequence goes on by this plan, and if all were computed. */
  readonly planMs: number | undefined
  readonly computeMs: number | undefined
}

/** Moving costs the same for each block and computing more for each later one: the best part ends where a tier does, or with the offer. */
const endsOf = ({ onDisk }: PrefixOffer): ReadonlyArray<number> => onDisk.flatMap((disk, i) => (disk === onDisk[i + 1] ? [] : [i + 1]))

export const planPrefix = <O extends PrefixOffer>(need: PrefixNeed, offers: ReadonlyArray<O>, prefill: PrefillCost | undefined): PrefixPlan<O> => {
  const { tokens, computedTokens, blockTokens, blockBytes, queuedTokens, stepTokens } = need
  const fetchMs = ({ onDisk, cost }: O, blocks: number): number => {
    const disk = onDisk.slice(0, blocks).filter((is) => is).length
    return transferMs(cost, { memory: (blocks - disk) * blockBytes, disk: disk * blockBytes })
  }
  const parts = offers.flatMap((offer) => endsOf(offer).map((blocks) => ({ offer, blocks })))
  if (prefill === undefined) {
    // Nobody knows yet what computing takes: the most that can be had, from where it comes soonest.
    const most = Math.max(0, ...parts.map(({ blocks }) => blocks))
    const [best] = parts.filter(({ blocks }) => blocks === most).sort((a, b) => fetchMs(a.offer, most) - fetchMs(b.offer, most))
    return { offer: best?.offer, blocks: most, planMs: undefined, computeMs: undefined }
  }
  const queuedMs = prefillMs(prefill, { newTokens: queuedTokens, prefixTokens: 0 }, stepTokens)
  const restMs = (prefixTokens: number) => prefillMs(prefill, { newTokens: tokens - prefixTokens, prefixTokens }, stepTokens)
  const computeMs = queuedMs + restMs(computedTokens)
  return parts.reduce<PrefixPlan<O>>(
    (best, { offer, blocks }) => {
      // It comes while those before it are computed.
      const planMs = Math.max(queuedMs, fetchMs(offer, blocks)) + restMs(computedTokens + blocks * blockTokens)
      return planMs < best.planMs! ? { offer, blocks, planMs, computeMs } : best
    },
    { offer: undefined, blocks: 0, planMs: computeMs, computeMs },
  )
}
