import { randomBytes } from "node:crypto"
import { Template } from "@huggingface/jinja"
import type { Gguf } from "../../kernels/index.ts"
import { Fault } from "../runtime/fault.ts"
import type { Tokenizer } from "./tokenizer.ts"

/** A message as OpenAI's API has it; what the template does not know it ignores. */
export interface ChatMessage {
  readonly role: string
  readonly content?: string | null | ReadonlyArray<{ readonly type: string; readonly text?: string }>
  readonly [key: string]: unknown
}

export interface ChatOptions {
  /** End with the beginning of the assistant's turn. Omitted: yes. */
  readonly addGenerationPrompt?: boolean
  readonly tools?: ReadonlyArray<unknown>
  /** Further variables of the template (`chat_template_kwargs`). */
  readonly variables?: Readonly<Record<string, unknown>>
  /** As in `EncodeOptions`. */
  readonly limit?: number
}

/** The beginning of a conversation as it was prompted and answered. */
export interface Earlier {
  readonly tokens: Int32Array
  /** How many messages these are; the last of them is the answer. */
  readonly messages: number
}

const invalid = (message: string, param: string): Fault => new Fault({ code: "invalid_request", message, hop: "chat template", param })

/** `[{type: "text", text}]` becomes the text; other kinds of part are refused by name. */
const flattenContent = (message: ChatMessage, index: number): ChatMessage => {
  const content = message.content
  if (!Array.isArray(content)) return message
  const texts = content.map((part: { readonly type: string; readonly text?: string }, at) => {
    if (part.type !== "text" || typeof part.text !== "string") {
      throw invalid(`messages[${index}].content[${at}]: a part of type "${part.type}" is not supported; this model takes type "text"`, `messages[${index}].content[${at}].type`)
    }
    return part.text
  })
  return { ...message, content: texts.join("") }
}

/** Templates test for keys, so a key without a value must not be there at all. */
const withoutAbsent = (value: unknown): unknown => {
  if (Array.isArray(value)) return value.map(withoutAbsent)
  if (typeof value !== "object" || value === null) return value
  return Object.fromEntries(Object.entries(value).filter(([, inner]) => inner !== undefined).map(([key, inner]) => [key, withoutAbsent(inner)]))
}

const mapStrings = (value: unknown, change: (text: string) => string): unknown => {
  if (typeof value === "string") return change(value)
  if (Array.isArray(value)) return value.map((inner) => mapStrings(inner, change))
  if (typeof value !== "object" || value === null) return value
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [change(key), mapStrings(inner, change)]))
}

/**
 * Marks that keep a client's text from becoming control tokens.
 *
 * The template's own markers have to become control tokens and the same characters in a message must not, but a rendered
 * prompt is one string. So before rendering, every control token's text inside a client's string is broken by a mark
 * after its first character, and a string that begins or ends with a part of such a text gets a mark at that edge, so that
 * nothing can be completed by its neighbours either. The rendered prompt is cut at the control tokens that are left,
 * which are the template's, the marks are taken out of the pieces between, and these are encoded as plain text. A template
 * may trim, test and split content as it likes; one that deletes from the middle of it could join what stood apart, which
 * none known does for text that contains control tokens.
 */
class Marks {
  readonly mark: string
  readonly #texts: ReadonlyArray<string>

  constructor(texts: ReadonlyArray<string>, everything: string) {
    this.#texts = texts
    // Noncharacters, which no text should have, and drawn by lot, so that no client can write the mark. Its head occurs in
    // it once, so that beside one of these characters it is still found where it was put.
    let mark: string
    do mark = `\uFDD0${[...randomBytes(16)].map((byte) => String.fromCharCode(0xfdd1 + (byte & 15))).join("")}`
    while (everything.includes(mark))
    this.mark = mark
  }

  put(text: string): string {
    let marked = text
    let begins = false
    let ends = false
    for (const control of this.#texts) {
      if (marked.includes(control)) marked = marked.replaceAll(control, `${control.slice(0, 1)}${this.mark}${control.slice(1)}`)
      for (let length = 1; length < control.length; length++) {
        begins ||= text.startsWith(control.slice(length))
        ends ||= text.endsWith(control.slice(0, length))
      }
    }
    return `${begins ? this.mark : ""}${marked}${ends ? this.mark : ""}`
  }

  take(text: string): string {
    return text.replaceAll(this.mark, "")
  }
}

/** The chat template that a model file carries (`tokenizer.chat_template`, Jinja), and its way to tokens. */
export class ChatTemplate {
  readonly #template: Template | undefined
  readonly #tokenizer: Tokenizer
  readonly #control: RegExp | undefined
  readonly #specials: Readonly<Record<string, string>>

  /** @throws Error where the file's template cannot be parsed. A file without one is refused when it is used. */
  constructor(metadata: Gguf["metadata"], tokenizer: Tokenizer) {
    const source = metadata.get("tokenizer.chat_template")
    try {
      this.#template = typeof source === "string" && source !== "" ? new Template(source) : undefined
    } catch (error) {
      throw new Error(`tokenizer.chat_template: cannot be parsed: ${error instanceof Error ? error.message : String(error)}`)
    }
    this.#tokenizer = tokenizer
    const texts = [...tokenizer.controlTexts].sort((a, b) => b.length - a.length)
    this.#control = texts.length === 0 ? undefined : new RegExp(texts.map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")).join("|"), "gu")
    const text = (id: number | undefined) => (id === undefined ? "" : tokenizer.decode([id], { skipControl: false }))
    this.#specials = { bos_token: text(tokenizer.bos), eos_token: text(tokenizer.eos) }
  }

  /** Whether the file has a template, so that chat can be served. */
  get present(): boolean {
    return this.#template !== undefined
  }

  /**
   * The prompt as text, for people.
   * @throws Fault `invalid_request` where there is no template, or it refuses the messages
   */
  render(messages: ReadonlyArray<ChatMessage>, options: ChatOptions = {}): string {
    return this.#render({ messages: messages.map(flattenContent), tools: options.tools, variables: options.variables }, options)
  }

  /**
   * The prompt as token ids: markers of the template as control tokens, everything that the client wrote as plain text.
   * Begins with BOS where the model wants one and the template did not write it.
   * @throws Fault as `render`
   */
  encode(messages: ReadonlyArray<ChatMessage>, options: ChatOptions = {}): Array<number> {
    const { marks, input } = this.#marked(messages, options)
    const ids = this.#tokenise(this.#render(input, options), marks, options.limit)
    const bos = this.#tokenizer.bos
    return this.#tokenizer.addBos && bos !== undefined && ids[0] !== bos ? [bos, ...ids] : ids
  }

  /**
   * The same prompt where its first messages have ids already: those of an earlier prompt and of the answer to it, which the
   * model drew and which its text need not give again. Only what the template writes behind that answer is tokenised.
   * Undefined where the template does not write the earlier prompt, the answer (give or take white space around it) and then
   * the rest, as one that drops an earlier answer's reasoning: then there is nothing to go on from.
   * @throws Fault as `render`
   */
  encodeAfter(earlier: Earlier, messages: ReadonlyArray<ChatMessage>, options: ChatOptions = {}): Array<number> | undefined {
    if (earlier.messages < 2 || messages[earlier.messages - 1]?.role !== "assistant") return undefined
    const { marks, input: marked } = this.#marked(messages, options)
    const answer = marked.messages[earlier.messages - 1]?.content
    if (typeof answer !== "string") return undefined
    const before = this.#render({ ...marked, messages: marked.messages.slice(0, earlier.messages - 1) }, { ...options, addGenerationPrompt: true })
    const rendered = this.#render(marked, options)
    if (!rendered.startsWith(before)) return undefined
    const said = [answer, answer.trim()].find((text) => rendered.startsWith(text, before.length))
    if (said === undefined) return undefined
    // The token that ended the answer is one that the template writes.
    const ended = this.#tokenizer.endOfGeneration.has(earlier.tokens.at(-1) ?? -1)
    const ids = [...(ended ? earlier.tokens.subarray(0, -1) : earlier.tokens)]
    const limit = options.limit === undefined ? undefined : options.limit - ids.length
    return [...ids, ...this.#tokenise(rendered.slice(before.length + said.length), marks, limit)]
  }

  /** What the template is given, with marks in the client's strings. */
  #marked(messages: ReadonlyArray<ChatMessage>, options: ChatOptions) {
    const input = { messages: messages.map(flattenContent), tools: options.tools, variables: options.variables }
    const marks = new Marks(this.#tokenizer.controlTexts, JSON.stringify(input))
    return { marks, input: mapStrings(withoutAbsent(input), (text) => marks.put(text)) as typeof input }
  }

  #tokenise(rendered: string, marks: Marks, limit = Number.POSITIVE_INFINITY): Array<number> {
    const ids: Array<number> = []
    const plain = (text: string) => {
      const taken = marks.take(text)
      if (taken !== "") for (const id of this.#tokenizer.encode(taken, { special: false, limit: limit - ids.length })) ids.push(id)
    }
    let end = 0
    if (this.#control !== undefined) {
      for (const match of rendered.matchAll(this.#control)) {
        plain(rendered.slice(end, match.index))
        if (ids.length > limit) return ids
        const id = this.#tokenizer.specialId(match[0])
        if (id !== undefined) ids.push(id)
        end = match.index + match[0].length
      }
    }
    plain(rendered.slice(end))
    return ids
  }

  #render(
    input: { readonly messages: unknown; readonly tools: unknown; readonly variables: Readonly<Record<string, unknown>> | undefined },
    options: ChatOptions
  ): string {
    if (this.#template === undefined) {
      throw invalid("this model's file has no chat template (tokenizer.chat_template): use /v1/completions, or a file of a chat model", "model")
    }
    const { messages, tools, variables } = withoutAbsent(input) as typeof input
    try {
      return this.#template.render({
        ...this.#specials,
        ...variables,
        messages,
        ...(tools === undefined ? {} : { tools }),
        add_generation_prompt: options.addGenerationPrompt ?? true
      })
    } catch (error) {
      throw invalid(`the model's chat template refuses these messages: ${error instanceof Error ? error.message : String(error)}`, "messages")
    }
  }
}
