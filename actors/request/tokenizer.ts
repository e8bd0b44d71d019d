import { Tokenizer as BytePairEncoder } from "@huggingface/tokenizers"
import type { Gguf, GgufValue } from "../../kernels/index.ts"
import { Fault } from "../runtime/fault.ts"
import { byteLevel } from "./byte-level.ts"
import { preTokenizer, words, type PreTokenizer } from "./pre-tokenizer.ts"

export interface EncodeOptions {
  /** The text of a control token becomes that token. Never for what a user wrote inside a chat message. */
  readonly special: boolean
  /** Begin with the BOS token where the model wants one. Omitted: no. */
  readonly bos?: boolean
  /**
   * Stop as soon as more than this many tokens are known, so that a hostile prompt costs no more than the longest
   * allowed one; the caller sees that the result is longer than the limit.
   */
  readonly limit?: number
}

/** `tokenizer.ggml.token_type` of llama.cpp's vocabulary. */
const tokenType = { control: 3, userDefined: 4 } as const

/** Control tokens that end an answer even where the file's metadata names only one of them (llama.cpp's list). */
const endTexts: ReadonlySet<string> = new Set([
  "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>"
])

/** Words whose ids are remembered; text repeats its words, so that most of it never reaches BPE. */
const cachedWords = 32_768
const cachedWordChars = 64
/** Merging costs more than its length: beyond this a word is refused, so that no prompt stops everybody else. */
const longestWordChars = 4096

const list = <T extends string | number>(metadata: ReadonlyMap<string, GgufValue>, key: string, type: "string" | "number"): ReadonlyArray<T> => {
  const value = metadata.get(key)
  // The native reader gives arrays of one type, so that the first entry speaks for all.
  if (!Array.isArray(value) || (value.length > 0 && typeof value[0] !== type)) throw new Error(`${key}: expected a list of ${type}s in the model file`)
  return value as ReadonlyArray<T>
}

const optionalId = (metadata: ReadonlyMap<string, GgufValue>, key: string, vocabulary: number): number | undefined => {
  const value = metadata.get(key)
  if (value === undefined) return undefined
  if (typeof value !== "number" || !Number.isInteger(value) || value < 0 || value >= vocabulary) {
    throw new Error(`${key}: expected a token id in 0 … ${vocabulary - 1}, found ${String(value)}`)
  }
  return value
}

/** Longest first, so that a token is not found where a longer one stands. */
const alternatives = (texts: ReadonlyArray<string>): RegExp | undefined =>
  texts.length === 0
    ? undefined
    : new RegExp([...texts].sort((a, b) => b.length - a.length).map((text) => text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")).join("|"), "gu")

/**
 * Text to token ids and back, built from a model file's metadata. Merging is @huggingface/tokenizers'; the cutting into
 * words is done here, lazily and cached by word. A control token comes only from `special: true`: the merging vocabulary
 * does not contain any.
 */
export class Tokenizer {
  /** Number of token ids. */
  readonly vocabulary: number
  readonly bos: number | undefined
  readonly eos: number | undefined
  /** The model wants BOS before a prompt. */
  readonly addBos: boolean
  /** Tokens that end an answer. */
  readonly endOfGeneration: ReadonlySet<number>
  /** Texts of the control tokens. */
  readonly controlTexts: ReadonlyArray<string>
  readonly #entries: ReadonlyArray<string>
  readonly #types: ReadonlyArray<number>
  readonly #bpe: BytePairEncoder
  readonly #pre: PreTokenizer
  readonly #added: ReadonlyMap<string, number>
  readonly #always: RegExp | undefined // user-defined tokens
  readonly #withControl: RegExp | undefined // user-defined and control tokens
  readonly #words = new Map<string, ReadonlyArray<number>>()

  /**
   * @param metadata of a GGUF file with a byte-level BPE vocabulary
   * @throws Error naming the metadata key, what was found and what is supported
   */
  constructor(metadata: Gguf["metadata"]) {
    const model = metadata.get("tokenizer.ggml.model")
    if (model !== "gpt2") throw new Error(`tokenizer.ggml.model: "${String(model)}" is not supported; supported: gpt2 (byte-level BPE)`)
    this.#entries = list<string>(metadata, "tokenizer.ggml.tokens", "string")
    const merges = list<string>(metadata, "tokenizer.ggml.merges", "string")
    this.vocabulary = this.#entries.length
    this.#types = metadata.has("tokenizer.ggml.token_type") ? list<number>(metadata, "tokenizer.ggml.token_type", "number") : []
    if (this.#types.length > 0 && this.#types.length !== this.vocabulary) {
      throw new Error(`tokenizer.ggml.token_type: expected ${this.vocabulary} entries, one for each token, found ${this.#types.length}`)
    }
    this.#pre = preTokenizer(String(metadata.get("tokenizer.ggml.pre") ?? "gpt-2"))

    const vocab: Record<string, number> = Object.create(null) as Record<string, number>
    const added = new Map<string, number>()
    const userDefined: Array<string> = []
    const control: Array<string> = []
    for (const [id, entry] of this.#entries.entries()) {
      const type = this.#types[id]
      if (type === tokenType.control || type === tokenType.userDefined) {
        if (entry === "") continue
        added.set(entry, id)
        if (type === tokenType.control) control.push(entry)
        else userDefined.push(entry)
      } else {
        vocab[entry] = id
      }
    }
    this.#added = added
    this.controlTexts = control
    this.#always = alternatives(userDefined)
    this.#withControl = alternatives([...userDefined, ...control])
    this.#bpe = new BytePairEncoder(
      {
        model: {
          type: "BPE",
          vocab,
          merges: merges.map((merge) => {
            const space = merge.indexOf(" ", 1)
            return [merge.slice(0, space), merge.slice(space + 1)]
          }),
          ignore_merges: this.#pre.ignoreMerges
        },
        // Words arrive cut and in the printable alphabet; decoding is done from bytes.
        pre_tokenizer: null,
        normalizer: null,
        post_processor: null,
        decoder: null,
        added_tokens: []
      },
      { clean_up_tokenization_spaces: false }
    )

    this.bos = optionalId(metadata, "tokenizer.ggml.bos_token_id", this.vocabulary)
    this.eos = optionalId(metadata, "tokenizer.ggml.eos_token_id", this.vocabulary)
    const addBos = metadata.get("tokenizer.ggml.add_bos_token")
    this.addBos = this.bos !== undefined && (typeof addBos === "boolean" ? addBos : this.#pre.addBos)
    const ends = ["eos", "eot", "eom"].flatMap((kind) => optionalId(metadata, `tokenizer.ggml.${kind}_token_id`, this.vocabulary) ?? [])
    this.endOfGeneration = new Set([...ends, ...control.filter((entry) => endTexts.has(entry)).map((entry) => added.get(entry) ?? -1)])
  }

  /** Token ids of `text`; throws a Fault for a word that is too long. A byte that the vocabulary has no token for is left out, as llama.cpp does. */
  encode(text: string, options: EncodeOptions): Array<number> {
    const limit = options.limit ?? Number.POSITIVE_INFINITY
    const ids: Array<number> = options.bos === true && this.addBos && this.bos !== undefined ? [this.bos] : []
    const pattern = options.special ? this.#withControl : this.#always
    let end = 0
    if (pattern !== undefined) {
      for (const match of text.matchAll(pattern)) {
        this.#encodePlain(text.slice(end, match.index), limit, ids)
        if (ids.length > limit) return ids
        ids.push(this.#added.get(match[0]) ?? 0)
        end = match.index + match[0].length
      }
    }
    this.#encodePlain(end === 0 ? text : text.slice(end), limit, ids)
    return ids
  }

  /** The bytes that a token stands for: UTF-8, though not always whole characters. Empty for an id that does not exist. */
  tokenBytes(id: number): Uint8Array {
    const entry = this.#entries[id]
    if (entry === undefined) return new Uint8Array()
    const type = this.#types[id]
    const raw = type === tokenType.control || type === tokenType.userDefined ? undefined : byteLevel.read(entry)
    return raw ?? Buffer.from(entry, "utf8")
  }

  /** The id of a control or user-defined token by its text. */
  specialId(text: string): number | undefined {
    return this.#added.get(text)
  }

  /** A control token is never shown to a client. */
  isControl(id: number): boolean {
    return this.#types[id] === tokenType.control
  }

  /** Text of the tokens; what is not UTF-8 becomes U+FFFD. */
  decode(ids: ReadonlyArray<number>, options: { readonly skipControl: boolean }): string {
    const kept = options.skipControl ? ids.filter((id) => !this.isControl(id)) : ids
    return Buffer.concat(kept.map((id) => this.tokenBytes(id))).toString("utf8")
  }

  #encodePlain(text: string, limit: number, ids: Array<number>): void {
    if (text === "") return
    for (const word of words(text, this.#pre.stages)) {
      if (word.length > longestWordChars) {
        throw new Fault({ code: limit === Number.POSITIVE_INFINITY ? "invalid_request" : "context_length_exceeded", message: `a run of ${word.length} characters without a break is longer than the ${longestWordChars} that are tokenised`, hop: "tokenizer" })
      }
      for (const id of this.#encodeWord(word)) ids.push(id)
      if (ids.length > limit) return
    }
  }

  #encodeWord(word: string): ReadonlyArray<number> {
    const cached = this.#words.get(word)
    if (cached !== undefined) return cached
    const ids = this.#bpe.encode(byteLevel.write(word), { add_special_tokens: false }).ids
    if (word.length <= cachedWordChars) {
      // Emptied at once rather than one by one: it refills from any text within milliseconds.
      if (this.#words.size >= cachedWords) this.#words.clear()
      this.#words.set(word, ids)
    }
    return ids
  }
}
