/** Log probabilities in OpenAI's two formats. */
import type { TokenLogprob } from "../actors/messages/request.ts"

/** JSON has no infinity; OpenAI writes this for what is below its range. */
const finite = (logprob: number | null): number => (logprob === null || !Number.isFinite(logprob) ? -9999 : logprob)

const entry = ({ text, bytes, logprob }: Omit<TokenLogprob, "top">) => ({ token: text, logprob: finite(logprob), bytes: [...bytes] })

/** As in chat (and Responses): a list of objects. */
export const chatLogprobs = (tokens: ReadonlyArray<TokenLogprob>) => tokens.map((token) => ({ ...entry(token), top_logprobs: token.top.map(entry) }))

export interface CompletionLogprobs {
  readonly tokens: Array<string>
  readonly token_logprobs: Array<number | null>
  readonly top_logprobs: Array<Record<string, number> | null>
  readonly text_offset: Array<number>
}

/** As in completions: parallel lists, and the place of each token in the choice's text, counted in code points. */
export class CompletionLogprobsWriter {
  readonly #decoder = new TextDecoder() // holds back a character until its last byte
  #offset = 0

  write(tokens: ReadonlyArray<TokenLogprob>): CompletionLogprobs {
    const lists: CompletionLogprobs = { tokens: [], token_logprobs: [], top_logprobs: [], text_offset: [] }
    for (const token of tokens) {
      lists.tokens.push(token.text)
      lists.token_logprobs.push(token.logprob === null ? null : finite(token.logprob))
      lists.top_logprobs.push(token.logprob === null ? null : topOf(token))
      lists.text_offset.push(this.#offset)
      for (const _ of this.#decoder.decode(token.bytes, { stream: true })) this.#offset++
    }
    return lists
  }
}

/** The most likely tokens and the drawn one. Tokens whose texts are alike (parts of characters) are told apart by bytes. */
const topOf = (token: TokenLogprob): Record<string, number> => {
  const top: Record<string, number> = {}
  const seen = new Map<string, number>()
  for (const candidate of [...token.top, token]) {
    const taken = seen.get(candidate.text)
    if (taken === candidate.token) continue
    const name = taken === undefined ? candidate.text : `bytes:${[...candidate.bytes].map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")}`
    seen.set(name, candidate.token)
    top[name] = finite(candidate.logprob)
  }
  return top
}
