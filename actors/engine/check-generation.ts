/** What an engine can serve at all, whatever else it serves. */
import { Fault } from "../runtime/fault.ts"
import type { GenerationSpec } from "./sequence.ts"

export interface EngineBounds {
  /** Names the engine in faults. */
  readonly name: string
  readonly maxBatch: number
  readonly contextLength: number
  readonly vocabulary: number
  /** Tokens that the KV pool holds. */
  readonly poolTokens: number
}

type RefusalCode = "context_length_exceeded" | "invalid_request"

/** Throws a Fault where a generation can never fit, or is none. */
export const checkGeneration = (spec: GenerationSpec, { name, maxBatch, contextLength, vocabulary, poolTokens }: EngineBounds): void => {
  const refuse = (code: RefusalCode, message: string, param?: string) => {
    throw new Fault({ code, message, hop: name, param })
  }
  const { prompt, delivered, choices, maxTokens, suppressedTokens, sampling } = spec
  if (choices > maxBatch) refuse("invalid_request", `n: ${choices} choices are more than the ${maxBatch} sequences that ${name} decodes at once`, "n")
  const tokens = prompt.length + maxTokens
  if (tokens > contextLength) refuse("context_length_exceeded", `${prompt.length} prompt tokens and ${maxTokens} more are over the context of ${contextLength}`)
  if (tokens > poolTokens) refuse("context_length_exceeded", `${prompt.length} prompt tokens and ${maxTokens} more are over the ${poolTokens} tokens that the KV pool of ${name} holds`)
  for (const list of [prompt, ...delivered]) {
    const strange = list.find((token) => token < 0 || token >= vocabulary)
    if (strange !== undefined) refuse("invalid_request", `token ${strange} is not in the vocabulary of ${vocabulary}`, "prompt")
  }
  if (prompt.length === 0) refuse("invalid_request", "the prompt has no tokens", "prompt")
  if ((delivered.length > 0 && delivered.length !== choices) || delivered.some((list) => list.length > maxTokens)) refuse("invalid_request", `delivered: expected the tokens of ${choices} choices, at most ${maxTokens} of each`, "delivered")
  if (sampling.minTokens > 0 && new Set(suppressedTokens).size >= vocabulary) refuse("invalid_request", "min_tokens: every token of the vocabulary would be suppressed", "min_tokens")
}
