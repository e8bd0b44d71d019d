/** A sequence message as the engine's own description of a generation. */
import { unpackHashes } from "../messages/hashes.ts"
import type { SequenceMessage } from "../messages/decode.ts"
import { unpackTokens } from "../messages/tokens.ts"
import type { GenerationSpec } from "./sequence.ts"

/** `id` names the generation in its engine, `trace` the span it belongs to. Throws a Fault that names the field. */
export const generationOf = (id: string, message: SequenceMessage, trace?: string): GenerationSpec => ({
  id,
  trace,
  requestId: message.requestId,
  hashRoot: unpackHashes(message.hashRoot)[0] ?? "",
  prompt: unpackTokens(message.prompt, "prompt"),
  delivered: message.delivered.map((tokens) => unpackTokens(tokens, "delivered")),
  choices: message.choices,
  finished: message.finished,
  sampling: message.sampling,
  maxTokens: message.maxTokens,
  stopTokens: new Set(message.stopTokens),
  suppressedTokens: message.suppressedTokens,
  logprobs: message.logprobs,
  promptLogprobs: message.promptLogprobs,
})
