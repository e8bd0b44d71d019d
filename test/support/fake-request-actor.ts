/**
 * A request actor that does what a test says: it answers on the real subjects with the real streams, without a model.
 */
import { Detokenize, EndConversation, encodeGenerateEvent, Generate, Tokenize, type FinishReason, type GenerateEvent, type GenerateMessage, type TokenLogprob } from "../../actors/messages/request.ts"
import { anyId, subject } from "../../actors/messages/subjects.ts"
import { packTokens } from "../../actors/messages/tokens.ts"
import { header, type Bus, type Delivery, type Headers } from "../../actors/runtime/bus.ts"
import { encodeFault, type MessageType } from "../../actors/runtime/codec.ts"
import { Fault } from "../../actors/runtime/fault.ts"
import { StreamWriter } from "../../actors/runtime/stream-writer.ts"

/** One `Generate` that the actor has accepted. */
export class FakeGeneration {
  readonly message: GenerateMessage
  readonly headers: Headers
  readonly writer: StreamWriter
  /** How the stream ended: undefined after its end, else why. */
  readonly closed: Promise<Fault | undefined>
  events = 0

  constructor(bus: Bus, delivery: Delivery) {
    this.message = Generate.decode(delivery.data)
    this.headers = delivery.headers
    this.writer = new StreamWriter(bus, delivery, "request fake")
    this.closed = new Promise((resolve) => this.writer.onClose(resolve))
  }

  send(event: GenerateEvent): void {
    this.events++
    this.writer.write(encodeGenerateEvent(event))
  }

  prompt(tokens: ReadonlyArray<number> = [1, 2, 3], text = "", cachedTokens = 0): void {
    this.send({ type: "prompt", tokens: packTokens(tokens), text, cachedTokens })
  }

  delta(choice: number, text: string, tokens: ReadonlyArray<number>, finish?: FinishReason): void {
    const logprobs = this.message.logprobs === undefined ? undefined : tokens.map((token) => scored(token, text, this.message.logprobs!))
    this.send({ type: "delta", choice, text, tokens, logprobs, finish })
  }

  done(promptTokens = 3, completionTokens = 0, cachedTokens = 0): void {
    this.send({ type: "done", usage: { promptTokens, completionTokens, cachedTokens } })
    this.writer.end()
  }

  /** A whole answer: the same words for each choice, ids counted from 100. */
  say(words: ReadonlyArray<string>, finish: FinishReason = "stop", cachedTokens = 0): void {
    this.prompt([1, 2, 3], "", cachedTokens)
    for (let choice = 0; choice < this.message.choices; choice++) {
      words.forEach((word, index) => this.delta(choice, word, [100 + index]))
      this.delta(choice, "", [], finish)
    }
    this.done(3, words.length * this.message.choices, cachedTokens)
  }

  /** Sends deltas of `text` as fast as the reader's credits allow, for ever. */
  endless(text: string): void {
    this.prompt()
    const fill = () => {
      while (this.writer.writable) this.delta(0, text, [7])
    }
    this.writer.onWritable(fill)
    fill()
  }

  fail(code: Fault["code"], message = `said ${code}`, more: { readonly param?: string; readonly retryAfterMs?: number; readonly hop?: string } = {}): void {
    this.writer.fail(new Fault({ code, message, hop: "decode fake", ...more }))
  }
}

export const scored = (token: number, text: string, top: number): TokenLogprob => {
  const bytes = new TextEncoder().encode(text)
  const others = Array.from({ length: Math.max(0, top - 1) }, (_, index) => ({ token: 900 + index, text: `alt${index}`, bytes: new TextEncoder().encode(`alt${index}`), logprob: -2 - index }))
  return { token, text, bytes, logprob: -0.5, top: top === 0 ? [] : [{ token, text, bytes, logprob: -0.5 }, ...others] }
}

export class FakeRequestActor {
  readonly generations: Array<FakeGeneration> = []
  /** Conversations that were said to be over. */
  readonly ended: Array<{ readonly tenant: string; readonly conversation: string }> = []
  /** What the next generations do. */
  script: (generation: FakeGeneration) => void = (generation) => generation.say(["Hello", " world"])
  /** Refuses before accepting the stream, as an overloaded actor does. */
  refusal: Fault | undefined
  readonly #bus: Bus

  constructor(bus: Bus, namespace: string) {
    this.#bus = bus
    bus.subscribe(subject(namespace, "request", anyId, Generate.verb), (delivery) => this.#generate(delivery), { queue: "request" })
    bus.subscribe(subject(namespace, "request", anyId, EndConversation.verb), ({ data }) => void this.ended.push(EndConversation.decode(data)), { queue: "request" })
    this.#answer(namespace, Tokenize, ({ content }) => ({ tokens: packTokens([...new TextEncoder().encode(content)]) }))
    this.#answer(namespace, Detokenize, ({ tokens }) => ({ content: String.fromCodePoint(...tokens) }))
  }

  get last(): FakeGeneration {
    return this.generations.at(-1)!
  }

  /** Resolves with the n-th generation once it has come. */
  async nth(index: number): Promise<FakeGeneration> {
    while (this.generations.length <= index) await new Promise((resolve) => setTimeout(resolve, 1))
    return this.generations[index]!
  }

  async untilEnded(count: number): Promise<void> {
    while (this.ended.length < count) await new Promise((resolve) => setTimeout(resolve, 1))
  }

  #generate(delivery: Delivery): void {
    if (this.refusal !== undefined) {
      return this.#bus.publish(delivery.reply!, encodeFault(this.refusal), { headers: { [header.fault]: this.refusal.code } })
    }
    const generation = new FakeGeneration(this.#bus, delivery)
    this.generations.push(generation)
    this.script(generation)
  }

  #answer<A, R>(namespace: string, type: MessageType<A, R, "ask">, reply: (message: A) => R): void {
    this.#bus.subscribe(subject(namespace, "request", anyId, type.verb), ({ data, reply: to }) => this.#bus.publish(to!, type.encodeReply(reply(type.decode(data)))))
  }
}
