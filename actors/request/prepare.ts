/**
 * A request as the engine needs it: its prompt as tokens, its bounds, and the sequence message that decode and prefill get.
 */
import { Fault } from "../runtime/fault.ts"
import type { SequenceMessage } from "../messages/decode.ts"
import { packHashes, type BlockHash } from "../messages/hashes.ts"
import type { GenerateMessage } from "../messages/request.ts"
import { packTokens, unpackTokens } from "../messages/tokens.ts"
import { chainHashes, hashRoot } from "../engine/block-hash.ts"
import { ChatTemplate } from "./chat-template.ts"
import { ChoiceOutput } from "./choice-output.ts"
import type { Tokenizer } from "./tokenizer.ts"

/** What request actors know of the model that is served. */
export interface ServedModel {
  readonly tokenizer: Tokenizer
  readonly template: ChatTemplate
  readonly modelDigest: string
  readonly formatId: string
  readonly blockTokens: number
  /** Most tokens of a sequence: the model's context, or what the KV pool holds where that is less. */
  readonly contextTokens: number
  /** Tenants find each other's prefixes. */
  readonly sharesPrefixes: boolean
}

export interface Prepared {
  readonly prompt: Int32Array
  readonly text: string
  readonly maxTokens: number
  readonly outputs: ReadonlyArray<ChoiceOutput>
  /** Chained hashes of the full blocks of the prompt, and of what a single choice has drawn. */
  chain(): ReadonlyArray<BlockHash>
  /** Chained hashes of the full blocks that the first choice has filled: the KV of its last token was not computed. */
  filled(): ReadonlyArray<BlockHash>
  /** The message for decode, as of the tokens that `outputs` have now. */
  sequence(attempt: number): SequenceMessage
}

const hop = "request"

const tokenise = ({ tokenizer, template, contextTokens }: ServedModel, prompt: GenerateMessage["prompt"]): Int32Array => {
  switch (prompt.kind) {
    case "chat": {
      const { messages, continues } = prompt
      const options = { limit: contextTokens }
      const earlier = continues === undefined ? undefined : { tokens: unpackTokens(continues.tokens, "continues"), messages: continues.messages }
      // Where the template does not let it go on from these, the whole conversation is tokenised from its text again.
      return Int32Array.from((earlier === undefined ? undefined : template.encodeAfter(earlier, messages, options)) ?? template.encode(messages, options))
    }
    case "text":
      return Int32Array.from(tokenizer.encode(prompt.text, { special: true, bos: true, limit: contextTokens }))
    case "tokens":
      return unpackTokens(prompt.tokens, "prompt")
  }
}

/** A fault of the work is one of this field, where it names none. */
const named = <A>(param: string, work: () => A): A => {
  try {
    return work()
  } catch (error) {
    if (!(error instanceof Fault) || error.param !== undefined) throw error
    throw new Fault({ ...error, code: error.code, message: `${param}: ${error.message}`, hop: error.hop, param })
  }
}

/** Throws a Fault that names the field at fault. */
export const prepare = (model: ServedModel, message: GenerateMessage): Prepared => {
  const { tokenizer, contextTokens } = model
  const param = message.prompt.kind === "chat" ? (message.prompt.param ?? "messages") : "prompt"
  const prompt = named(param, () => tokenise(model, message.prompt))
  if (prompt.length === 0) throw new Fault({ code: "invalid_request", message: `${param}: there are no tokens in it`, hop, param })
  const outside = prompt.find((token) => token < 0 || token >= tokenizer.vocabulary)
  if (outside !== undefined) throw new Fault({ code: "invalid_request", message: `${param}: token ${outside} is not in 0 … ${tokenizer.vocabulary - 1}`, hop, param })
  const biased = message.sampling.logitBias.find(([token]) => token >= tokenizer.vocabulary)
  if (biased !== undefined) throw new Fault({ code: "invalid_request", message: `logit_bias: token ${biased[0]} is not in 0 … ${tokenizer.vocabulary - 1}`, hop, param: "logit_bias" })
  const room = contextTokens - prompt.length
  const wanted = message.maxTokens ?? Math.max(1, room)
  if (room < Math.min(1, wanted)) {
    throw new Fault({ code: "context_length_exceeded", message: `${param}: at most ${contextTokens - 1} prompt tokens can be served here, this one has more`, hop, param })
  }
  const maxTokens = Math.min(wanted, room)
  const ends = [...tokenizer.endOfGeneration]
  const asked = message.stopTokenIds.filter((token) => token < tokenizer.vocabulary) // the others are never drawn
  const stopTokens = [...asked, ...(message.ignoreEos ? [] : ends)]
  const outputs = Array.from({ length: message.choices }, (_, choice) => {
    const output = new ChoiceOutput({ tokenizer, choice, stop: message.stop, stopTokens: new Set(stopTokens), maxTokens, logprobs: message.logprobs !== undefined })
    output.replay(unpackTokens(message.delivered[choice] ?? new Uint8Array(0), "delivered"))
    return output
  })
  const root = hashRoot({ modelDigest: model.modelDigest, tenant: model.sharesPrefixes ? undefined : message.tenant, cacheSalt: message.cacheSalt })
  const packed = packTokens(prompt)
  const hashes = chainHashes(root, prompt, model.blockTokens)
  return {
    prompt,
    text: message.promptLogprobs ? tokenizer.decode([...prompt], { skipControl: false }) : "",
    maxTokens,
    outputs,
    chain: () => {
      const [only, ...others] = outputs
      if (only === undefined || others.length > 0 || only.tokens.length === 0) return hashes
      const rest = Int32Array.from([...prompt.subarray(hashes.length * model.blockTokens), ...only.tokens])
      return [...hashes, ...chainHashes(hashes.at(-1) ?? root, rest, model.blockTokens)]
    },
    filled: () => {
      const drawn = outputs[0]?.tokens.slice(0, -1) ?? []
      return chainHashes(root, Int32Array.from([...prompt, ...drawn]), model.blockTokens)
    },
    sequence: (attempt) => ({
      requestId: message.requestId,
      attempt,
      formatId: model.formatId,
      hashRoot: packHashes([root]),
      prompt: packed,
      delivered: outputs.some(({ tokens }) => tokens.length > 0) ? outputs.map(({ tokens }) => packTokens(tokens)) : [],
      choices: message.choices,
      finished: outputs.flatMap(({ finish, choice }) => (finish === undefined ? [] : [choice])),
      sampling: message.sampling,
      maxTokens,
      stopTokens,
      suppressedTokens: [...new Set([...asked, ...ends])],
      logprobs: message.logprobs ?? -1,
      promptLogprobs: message.promptLogprobs,
    }),
  }
}
