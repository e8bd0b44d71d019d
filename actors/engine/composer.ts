/**
 * What goes into the next step: every decode row first, then prefill chunks in order of arrival up to a token budget, so
 * that a long prompt never stalls running streams. Pure: it only looks at the sequences.
 */
import type { Sequence } from "./sequence.ts"

export interface Budget {
  /** Rows of a step. */
  readonly tokens: number
  /** Rows of a step that also decodes: fewer, since every stream waits for it. */
  readonly mixedTokens: number
  /** Sampled or scored rows of a step. */
  readonly outputs: number
}

/** Run `tokens` tokens of a sequence from its `computed` on. */
export interface Chunk {
  readonly sequence: Sequence
  readonly tokens: number
}

const isDecode = (sequence: Sequence): boolean => sequence.pending === 1 && sequence.group.prefillDone

/** `running` in order of arrival; sequences whose request has not begun, or whose reader is behind, are left out. */
export const compose = (running: ReadonlyArray<Sequence>, budget: Budget): Array<Chunk> => {
  const ready = running.filter(({ group }) => group.prefill !== undefined && !group.held && !group.paused)
  const chunks: Array<Chunk> = ready
    .filter(isDecode)
    .slice(0, Math.min(budget.tokens, budget.outputs))
    .map((sequence) => ({ sequence, tokens: 1 }))
  let outputs = budget.outputs - chunks.length
  let tokens = (chunks.length === 0 ? budget.tokens : budget.mixedTokens) - chunks.length
  for (const sequence of ready) {
    if (isDecode(sequence)) continue
    const { spec, prefillDone, unforked } = sequence.group
    const draws = spec.maxTokens === 0 ? 0 : 1 + unforked
    const scored = spec.promptLogprobs && !prefillDone
    const count = Math.min(sequence.pending, tokens, scored ? outputs - draws : tokens)
    if (count <= 0 || draws > outputs) break
    chunks.push({ sequence, tokens: count })
    tokens -= count
    outputs -= (count === sequence.pending ? draws : 0) + (scored ? count : 0)
  }
  return chunks
}
