export interface StopProgress {
  /** Text that no stop string can take back any more. */
  readonly text: string
  readonly stopped: boolean
}

/**
 * Looks for stop strings in text that arrives in pieces. The match that ends first wins (of several, the longest), so
 * that the result does not depend on how the text was cut. Only the longest end of the text that may begin a stop string
 * is held back.
 */
export class StopStrings {
  readonly #stops: ReadonlyArray<string>
  readonly #include: boolean
  #held = ""
  #matched: string | undefined

  /** @param include whether the stop string itself belongs to the answer (default: no, as OpenAI does) */
  constructor(stops: ReadonlyArray<string>, include = false) {
    this.#stops = stops.filter((stop) => stop !== "")
    this.#include = include
  }

  /** The stop string that was found. */
  get matched(): string | undefined {
    return this.#matched
  }

  push(piece: string): StopProgress {
    if (this.#matched !== undefined) return { text: "", stopped: true }
    const text = this.#held + piece
    let end = Number.POSITIVE_INFINITY
    for (const stop of this.#stops) {
      const at = text.indexOf(stop)
      if (at < 0) continue
      if (at + stop.length < end || (at + stop.length === end && stop.length > (this.#matched?.length ?? 0))) {
        end = at + stop.length
        this.#matched = stop
      }
    }
    if (this.#matched !== undefined) {
      this.#held = ""
      return { text: text.slice(0, this.#include ? end : end - this.#matched.length), stopped: true }
    }
    const safe = text.length - this.#undecided(text)
    this.#held = text.slice(safe)
    return { text: text.slice(0, safe), stopped: false }
  }

  /** What was held back, once no more text can come. */
  flush(): string {
    const text = this.#held
    this.#held = ""
    return text
  }

  /** Length of the longest end of `text` that is the beginning of a stop string. */
  #undecided(text: string): number {
    let longest = 0
    for (const stop of this.#stops) {
      for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
        if (text.endsWith(stop.slice(0, length))) longest = length
      }
    }
    return longest
  }
}
