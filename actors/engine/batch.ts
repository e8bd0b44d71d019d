/**
 * Chunks as one batch for the kernels, and what comes back for each of its outputs.
 */
import type { Batch, StepResult } from "../../kernels/index.ts"
import type { TokenEvent } from "../messages/decode.ts"
import type { Chunk } from "./composer.ts"
import type { Sequence } from "./sequence.ts"

/** A row that draws the next token of a choice, or scores the prompt token at a position. */
export interface Output {
  readonly sequence: Sequence
  readonly draws: number | undefined // choice
  readonly scores: number | undefined // position
}

export interface Composed {
  readonly batch: Batch
  readonly outputs: ReadonlyArray<Output>
}

/** `samplerOf` makes the sampler of a choice when it first draws. */
export const composeBatch = (chunks: ReadonlyArray<Chunk>, samplerOf: (sequence: Sequence, choice: number) => number): Composed => {
  const tokens = new Int32Array(chunks.reduce((sum, chunk) => sum + chunk.tokens, 0))
  const segments: Array<number> = []
  const blockTables: Array<number> = []
  const fields: Array<number> = []
  const outputs: Array<Output> = []
  let row = 0
  for (const { sequence, tokens: count } of chunks) {
    const { computed, group } = sequence
    const { spec } = group
    const end = computed + count
    tokens.set(sequence.tokens(computed, end), row)
    segments.push(count, computed, blockTables.length, sequence.table.length)
    for (const block of sequence.table) blockTables.push(block)
    if (spec.promptLogprobs && !group.prefillDone) {
      // Row i predicts position i + 1. What an earlier, preempted run has scored is not scored again.
      for (let position = Math.max(computed + 1, group.scoredTo); position <= Math.min(end, spec.prompt.length - 1); position++) {
        outputs.push({ sequence, draws: undefined, scores: position })
        fields.push(row + position - 1 - computed, -1, spec.prompt[position]!, Math.max(0, spec.logprobs))
      }
    }
    row += count
    if (end < sequence.length || spec.maxTokens === 0) continue
    for (let choice = sequence.choice; choice <= sequence.choice + group.unforked; choice++) {
      outputs.push({ sequence, draws: choice, scores: undefined })
      fields.push(row - 1, samplerOf(sequence, choice), -1, spec.logprobs)
    }
  }
  return { batch: { tokens, segments: Int32Array.from(segments), blockTables: Int32Array.from(blockTables), outputs: Int32Array.from(fields) }, outputs }
}

/** The drawn or scored token of an output, with its log probabilities where they were asked for. */
export const readOutput = (result: StepResult, output: number, top: number): Pick<TokenEvent, "token" | "logprob" | "topTokens" | "topLogprobs"> => {
  const from = output * result.topWidth
  const width = Math.max(0, top)
  return {
    token: result.tokens[output]!,
    logprob: result.logprobs[output]!,
    topTokens: width === 0 ? [] : Array.from(result.topTokens.subarray(from, from + width)),
    topLogprobs: width === 0 ? [] : Array.from(result.topLogprobs.subarray(from, from + width)),
  }
}
