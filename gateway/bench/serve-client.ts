/** A client of `bench serve`: streamed requests with the moments of their tokens, and prompts that nobody sent before. */
import { Effect, type Scope } from "effect"
import type { Topology } from "../../config/topology.ts"
import type { ResolvedModel } from "../../actors/node/fetch-model.ts"
import { serve } from "../serve.ts"

export interface Answer {
  readonly id: string
  /** From before the request was sent to its first token, and to its end. */
  readonly firstMs: number
  readonly lastMs: number
  readonly promptTokens: number
  readonly cachedTokens: number
  readonly answerTokens: number
}

interface Event {
  readonly id?: string
  readonly choices?: ReadonlyArray<{ readonly token_ids?: ReadonlyArray<number> | null }>
  readonly usage?: { readonly prompt_tokens: number; readonly prompt_tokens_details: { readonly cached_tokens: number } } | null
  readonly error?: unknown
  /** Of the Responses API. */
  readonly token_ids?: ReadonlyArray<number>
  readonly response?: { readonly id: string; readonly usage: { readonly input_tokens: number; readonly input_tokens_details: { readonly cached_tokens: number } } | null }
}

const words = "water stone wheel gate river mill light house ship night morning winter summer bread table window garden letter road bridge mountain valley forest field cloud rain wind song story friend child teacher market village city north south paper music colour number question answer reason".split(" ")

/** What is the same in every request: the answer's length does not depend on what the model says. */
const always = { temperature: 0, ignore_eos: true, stream: true, stream_options: { include_usage: true }, return_token_ids: true }

export class Client {
  readonly #url: string
  readonly #model: string

  constructor(url: string, model: string) {
    this.#url = url
    this.#model = model
  }

  /** Random words as so many of this model's tokens. */
  async tokens(count: number): Promise<ReadonlyArray<number>> {
    const drawn = Array.from({ length: count }, () => words[Math.floor(Math.random() * words.length)])
    const { tokens } = (await this.#ask("/tokenize", { content: drawn.join(" ") })) as { readonly tokens: ReadonlyArray<number> }
    return tokens.slice(0, count)
  }

  async text(tokens: number): Promise<string> {
    return ((await this.#ask("/detokenize", { tokens: await this.tokens(tokens) })) as { readonly content: string }).content
  }

  chat(messages: ReadonlyArray<{ readonly role: string; readonly content: string }>, maxTokens: number): Promise<Answer> {
    return this.#stream("/v1/chat/completions", { messages, max_tokens: maxTokens })
  }

  complete(prompt: ReadonlyArray<number>, maxTokens: number): Promise<Answer> {
    return this.#stream("/v1/completions", { prompt, max_tokens: maxTokens })
  }

  /** A turn that goes on from an earlier response, or begins a conversation. */
  respond(input: string, previous: string | undefined, maxTokens: number): Promise<Answer> {
    return this.#stream("/v1/responses", { input, previous_response_id: previous, max_output_tokens: maxTokens })
  }

  async #stream(path: string, body: object): Promise<Answer> {
    const startedAtMs = performance.now()
    const response = await this.#post(path, { ...always, ...body })
    const answer = { id: "", firstMs: Number.NaN, lastMs: 0, promptTokens: 0, cachedTokens: 0, answerTokens: 0 }
    let rest = ""
    for await (const piece of response.body!.pipeThrough(new TextDecoderStream())) {
      const atMs = performance.now() - startedAtMs
      const parts = (rest + piece).split("\n\n")
      rest = parts.pop()!
      for (const part of parts) {
        const data = /^data: (\{.*)$/m.exec(part)?.[1]
        if (data === undefined) continue // a comment, or the end
        const event = JSON.parse(data) as Event
        if (event.error !== undefined) throw new Error(`${path}: ${data}`)
        const drawn = event.token_ids?.length ?? event.choices?.[0]?.token_ids?.length ?? 0
        if (drawn > 0 && answer.answerTokens === 0) answer.firstMs = atMs
        answer.answerTokens += drawn
        answer.id = event.response?.id ?? event.id ?? answer.id
        answer.promptTokens = event.response?.usage?.input_tokens ?? event.usage?.prompt_tokens ?? answer.promptTokens
        answer.cachedTokens = event.response?.usage?.input_tokens_details.cached_tokens ?? event.usage?.prompt_tokens_details.cached_tokens ?? answer.cachedTokens
      }
      answer.lastMs = atMs
    }
    if (answer.answerTokens === 0) throw new Error(`${path}: an answer without tokens`)
    return answer
  }

  async #ask(path: string, body: object): Promise<unknown> {
    return (await this.#post(path, body)).json()
  }

  async #post(path: string, body: object): Promise<Response> {
    const response = await fetch(this.#url + path, { method: "POST", body: JSON.stringify({ model: this.#model, ...body }) })
    if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`)
    return response
  }
}

/** For what a request leaves to be done in the background, and shorter than anybody reads. */
export const restMs = 150
export const rest = (ms: number = restMs): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))

/** Brings up a topology until the Scope closes, and warms the processes up. */
export const started = (topology: Topology, model: ResolvedModel): Effect.Effect<Client, Error, Scope.Scope> =>
  Effect.gen(function* () {
    const { url } = yield* serve({ topology, model })
    const client = new Client(url, model.name)
    // V8 interprets what it has run less often.
    yield* Effect.promise(async () => {
      for (let i = 0; i < 8; i++) await Promise.all(Array.from({ length: 8 }, () => client.complete([100 + i, 200, 300 - i], 4)))
    })
    return client
  })
