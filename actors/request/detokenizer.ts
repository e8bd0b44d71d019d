import type { Tokenizer } from "./tokenizer.ts"

/**
 * Tokens to text, one at a time, for one choice. A character whose bytes are spread over tokens is held back until it is
 * whole, so that the pieces joined are exactly the text of all tokens. Control tokens have no text.
 */
export class Detokenizer {
  readonly #tokenizer: Tokenizer
  // A byte order mark is a character of the answer like any other.
  readonly #decoder = new TextDecoder("utf-8", { ignoreBOM: true })

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer
  }

  /** The text that this token completes; perhaps empty. */
  push(id: number): string {
    return this.#tokenizer.isControl(id) ? "" : this.#decoder.decode(this.#tokenizer.tokenBytes(id), { stream: true })
  }

  /** What is left at the end: U+FFFD for a character that never became whole. */
  flush(): string {
    return this.#decoder.decode()
  }
}
