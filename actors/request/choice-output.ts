/**
 * One choice's tokens as text that is safe to show: whole characters, nothing of a stop string. The text is a function of
 * the tokens alone, so that a choice that is resumed elsewhere by its tokens continues exactly.
 */
import type { TokenEvent } from "../messages/decode.ts"
import type { FinishReason, GenerateEvent, TokenLogprob } from "../messages/request.ts"
import { Detokenizer } from "./detokenizer.ts"
import { StopStrings } from "./stop-strings.ts"
import type { Tokenizer } from "./tokenizer.ts"

export interface ChoiceOptions {
  readonly tokenizer: Tokenizer
  readonly choice: number
  readonly stop: ReadonlyArray<string>
  readonly stopTokens: ReadonlySet<number>
  readonly maxTokens: number
  readonly logprobs: boolean
}

export class ChoiceOutput {
  readonly choice: number
  /** Every token drawn so far, the one that ended the choice included. */
  readonly tokens: Array<number> = []
  finish: FinishReason | undefined
  readonly #options: ChoiceOptions
  readonly #detokenizer: Detokenizer
  readonly #stops: StopStrings

  constructor(options: ChoiceOptions) {
    this.choice = options.choice
    this.#options = options
    this.#detokenizer = new Detokenizer(options.tokenizer)
    this.#stops = new StopStrings(options.stop)
  }

  /** Takes up tokens that were delivered before; their text is known to the client already. */
  replay(tokens: ReadonlyArray<number> | Int32Array): void {
    for (const token of tokens) this.#accept(token, this.#finishOf(token))
  }

  /** The next token, as the delta that the client gets. */
  push(event: TokenEvent): GenerateEvent {
    const text = this.#accept(event.token, event.finish === "" ? undefined : event.finish)
    const logprobs = this.#options.logprobs ? [tokenLogprob(this.#options.tokenizer, event)] : undefined
    return { type: "delta", choice: this.choice, text, tokens: [event.token], logprobs, finish: this.finish }
  }

  #finishOf(token: number): FinishReason | undefined {
    if (this.#options.stopTokens.has(token)) return "stop"
    return this.tokens.length + 1 >= this.#options.maxTokens ? "length" : undefined
  }

  #accept(token: number, finish: FinishReason | undefined): string {
    this.tokens.push(token)
    // The token that means the end is no part of the text.
    let piece = finish === "stop" ? "" : this.#detokenizer.push(token)
    if (finish !== undefined) piece += this.#detokenizer.flush()
    const { text, stopped } = this.#stops.push(piece)
    this.finish = stopped ? "stop" : finish
    return finish === undefined || stopped ? text : text + this.#stops.flush()
  }
}

const named = (tokenizer: Tokenizer, token: number, logprob: number) => ({
  token,
  text: tokenizer.decode([token], { skipControl: false }),
  bytes: tokenizer.tokenBytes(token),
  logprob,
})

/** A token's log probabilities with the texts that clients show. */
export const tokenLogprob = (tokenizer: Tokenizer, drawn: Pick<TokenEvent, "token" | "logprob" | "topTokens" | "topLogprobs">): TokenLogprob => ({
  ...named(tokenizer, drawn.token, drawn.logprob),
  top: drawn.topTokens.flatMap((token, i) => (token < 0 ? [] : [named(tokenizer, token, drawn.topLogprobs[i]!)])),
})
