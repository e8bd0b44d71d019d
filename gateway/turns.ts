import { limits } from "../config/limits.ts"
import type { ChatMessage } from "../actors/messages/request.ts"

/** The last responses of one connection, each with the conversation up to and with it, so that the next can go on from it. */
export class Turns {
  readonly #turns = new Map<string, { readonly messages: ReadonlyArray<ChatMessage>; readonly chars: number }>()
  #chars = 0

  /** The conversation that ended with this response, or undefined where it is not kept (any more). */
  get(responseId: string): ReadonlyArray<ChatMessage> | undefined {
    return this.#turns.get(responseId)?.messages
  }

  /** Keeps a conversation, and forgets the oldest ones beyond the limits. */
  add(responseId: string, messages: ReadonlyArray<ChatMessage>): void {
    const chars = messages.reduce((sum, { content }) => sum + content.length, 0)
    this.#turns.set(responseId, { messages, chars })
    this.#chars += chars
    for (const [oldest, turn] of this.#turns) {
      if (this.#turns.size <= limits.webSocketTurns && this.#chars <= limits.webSocketTurnChars) return
      this.#turns.delete(oldest)
      this.#chars -= turn.chars
    }
  }
}
