/**
 * What a request's client hears: each thing once and in order, however often and wherever the request is placed. Plain code,
 * since it runs once a token; it waits while the client is behind, which in turn pauses decode.
 */
import { Fault } from "../runtime/fault.ts"
import type { StreamReader } from "../runtime/stream-reader.ts"
import type { StreamWriter } from "../runtime/stream-writer.ts"
import { decodeDecodeFrame, type TokenEvent, type Transfer } from "../messages/decode.ts"
import { decodePrefillFrame, type PromptScores } from "../messages/prefill.ts"
import { encodeGenerateEvent, type GenerateEvent, type GenerateMessage, type TokenLogprob, type Usage } from "../messages/request.ts"
import { packTokens } from "../messages/tokens.ts"
import { tokenLogprob } from "./choice-output.ts"
import type { Prepared } from "./prepare.ts"
import type { Tokenizer } from "./tokenizer.ts"

export interface RelayOptions {
  /** Names this side in faults. */
  readonly sender: string
  readonly tokenizer: Tokenizer
  readonly message: GenerateMessage
  readonly request: Prepared
  readonly writer: StreamWriter
  /** A token that is new to the client. */
  readonly onToken: () => void
  /** A choice is complete by a stop string, which is seen here only, while others go on. */
  readonly onStopped: (transfer: Transfer, choice: number) => void
}

/** Scored prompt tokens of one event: 20 alternatives each still fit a message. */
const scoresOfEvent = 128

export class Relay {
  readonly #options: RelayOptions
  #cachedTokens: number | undefined
  #scored = 0 // prompt tokens that the client has the scores of

  constructor(options: RelayOptions) {
    this.#options = options
  }

  get finished(): boolean {
    return this.#options.request.outputs.every(({ finish }) => finish !== undefined)
  }

  /** The prompt's scores are asked for, and not all of them are there. */
  get wantsScores(): boolean {
    return this.#options.message.promptLogprobs && this.#scored < this.#options.request.prompt.length
  }

  /** Takes what prefill says to its end; `onBegun` is called when the first tokens are out. */
  async prefill(stream: StreamReader, transfer: Transfer, onBegun: () => void): Promise<void> {
    const { tokenizer, request, writer } = this.#options
    const first: Array<TokenEvent> = []
    if (this.wantsScores) this.#announce(0)
    if (this.wantsScores && this.#scored === 0) this.#emitScores([{ ...tokenLogprob(tokenizer, { token: request.prompt[0]!, logprob: 0, topTokens: [], topLogprobs: [] }), logprob: null }])
    // The stream goes on until the KV has arrived, which nobody has to wait for.
    for await (const bytes of stream) {
      const frame = decodePrefillFrame(bytes)
      if (frame.type === "token") first.push(frame.event)
      else if (frame.type === "scores") this.#emitScores(this.#fresh(frame.scores))
      else {
        this.#announce(frame.cachedTokens)
        for (const event of first) this.#push(event, transfer)
        onBegun()
      }
      if (!writer.writable) await writer.untilWritable()
    }
  }

  /** Takes the tokens of decode until all choices are finished, from when prefill's are out; that decode fails is heard before, too. */
  async decode(stream: StreamReader, transfer: Transfer, begun: Promise<void>): Promise<void> {
    const { request, writer } = this.#options
    const hop = `decode ${transfer.worker}`
    let next = stream.next()
    next.catch(() => {}) // nobody may be left to hear it
    await Promise.race([begun, next])
    await begun
    while (!this.finished) {
      const bytes = await next
      if (bytes === undefined && request.maxTokens === 0) return
      if (bytes === undefined) throw new Fault({ code: "disconnected", message: `${hop}: ended before the answer`, hop })
      const frame = decodeDecodeFrame(bytes)
      if (frame.type === "token") this.#push(frame.event, transfer)
      if (!writer.writable) await writer.untilWritable()
      next = stream.next()
      next.catch(() => {})
    }
  }

  /** The last words, once every choice is finished. */
  done(): Usage {
    const { prompt, maxTokens, outputs } = this.#options.request
    if (this.#cachedTokens === undefined) this.#announce(0)
    // A choice of no tokens has no delta of its own to finish it.
    if (maxTokens === 0) for (const { choice } of outputs) this.#emit({ type: "delta", choice, text: "", tokens: [], logprobs: undefined, finish: "length" })
    const completionTokens = outputs.reduce((sum, { tokens }) => sum + tokens.length, 0)
    const usage = { promptTokens: prompt.length, completionTokens, cachedTokens: this.#cachedTokens ?? 0 }
    this.#emit({ type: "done", usage })
    return usage
  }

  #emit(event: GenerateEvent): void {
    this.#options.writer.write(encodeGenerateEvent(event))
  }

  #announce(cachedTokens: number): void {
    if (this.#cachedTokens !== undefined) return // told by an earlier placement
    this.#cachedTokens = cachedTokens
    const { prompt, text } = this.#options.request
    this.#emit({ type: "prompt", tokens: packTokens(prompt), text, cachedTokens })
  }

  #push(event: TokenEvent, transfer: Transfer): void {
    const { sender, request, onToken, onStopped } = this.#options
    const output = request.outputs[event.choice]
    if (output === undefined || output.finish !== undefined) return
    if (event.index < output.tokens.length && output.tokens[event.index] === event.token) return // drawn again after a prefill that failed late
    if (event.index !== output.tokens.length) throw new Fault({ code: "internal", message: `${sender}: token ${event.index} of choice ${event.choice} came in place of ${output.tokens.length}`, hop: sender })
    this.#emit(output.push(event))
    onToken()
    if (event.finish === "" && output.finish !== undefined && !this.finished) onStopped(transfer, event.choice)
  }

  /** Those scores that the client does not have. */
  #fresh({ position, width, logprobs, topTokens, topLogprobs }: PromptScores): Array<TokenLogprob> {
    const { tokenizer, request } = this.#options
    return Array.from(logprobs, (logprob, i) => ({ i, logprob }))
      .slice(Math.max(0, this.#scored - position))
      .map(({ i, logprob }) => {
        const tops = (array: Int32Array | Float32Array) => Array.from(array.subarray(i * width, (i + 1) * width))
        return tokenLogprob(tokenizer, { token: request.prompt[position + i]!, logprob, topTokens: tops(topTokens), topLogprobs: tops(topLogprobs) })
      })
  }

  #emitScores(logprobs: ReadonlyArray<TokenLogprob>): void {
    for (let from = 0; from < logprobs.length; from += scoresOfEvent) this.#emit({ type: "scores", logprobs: logprobs.slice(from, from + scoresOfEvent) })
    this.#scored += logprobs.length
  }
}
