/** Completed responses, each with the conversation up to and with it, so that the next can go on from it. */
import type { ChatMessage } from "../actors/messages/request.ts"

export interface Turn {
  /** Names it over all its turns. */
  readonly conversation: string
  /** The conversation, without the instructions, which hold for one response only. */
  readonly messages: ReadonlyArray<ChatMessage>
  /** The ids of its beginning, as it was prompted and answered last. */
  readonly answered: Answered | undefined
  /** The response as JSON, where it can be asked for. */
  readonly response?: string
}

export interface Answered {
  readonly tokens: Uint8Array // int32 little-endian
  /** Digest of the model whose ids these are. */
  readonly model: string
  /** So many of the messages, the answer included. */
  readonly messages: number
  /** What stood before them. */
  readonly instructions: string | undefined
}

export interface TurnBounds {
  readonly count: number
  readonly bytes: number
  readonly lifetimeMs: number
}

interface Kept {
  readonly turn: Turn
  readonly bytes: number
  readonly untilMs: number
}

const bytesOf = ({ messages, answered, response = "" }: Turn): number =>
  2 * (response.length + messages.reduce((sum, { content }) => sum + content.length, 0)) + (answered?.tokens.byteLength ?? 0)

/** The last turns, by the ids of their responses: so many, in so many bytes, for so long. */
export class Turns {
  readonly #bounds: TurnBounds
  readonly #turns = new Map<string, Kept>() // oldest first
  #bytes = 0

  constructor(bounds: TurnBounds) {
    this.#bounds = bounds
  }

  get size(): number {
    return this.#turns.size
  }

  /** Undefined where it is not kept (any more). */
  get(responseId: string): Turn | undefined {
    this.expire()
    return this.#turns.get(responseId)?.turn
  }

  /** Keeps a turn, and forgets the oldest ones beyond the bounds. */
  add(responseId: string, turn: Turn): void {
    const bytes = bytesOf(turn)
    this.#turns.set(responseId, { turn, bytes, untilMs: performance.now() + this.#bounds.lifetimeMs })
    this.#bytes += bytes
    this.expire()
    for (const oldest of this.#turns.keys()) {
      if (this.#turns.size <= this.#bounds.count && this.#bytes <= this.#bounds.bytes) return
      this.delete(oldest)
    }
  }

  /** Whether it was kept. */
  delete(responseId: string): boolean {
    this.#bytes -= this.#turns.get(responseId)?.bytes ?? 0
    return this.#turns.delete(responseId)
  }

  /** Forgets what has been kept for long enough. */
  expire(): void {
    for (const [oldest, { untilMs }] of this.#turns) {
      if (untilMs > performance.now()) return
      this.delete(oldest)
    }
  }
}
