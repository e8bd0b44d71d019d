import { readFile } from "node:fs/promises"
import { join } from "node:path"
import { isDeepStrictEqual } from "node:util"
import { preTokenizer } from "../../actors/request/pre-tokenizer.ts"
import { array, bool, text, u32, type Metadata } from "./gguf-file.ts"
import { ImportError } from "./import-error.ts"
import { JsonFile } from "./json-file.ts"

const byteLevel = { type: "ByteLevel", add_prefix_space: false, use_regex: true }
const split = (digits: string): ReadonlyArray<object> => [
  {
    type: "Split",
    pattern: {
      Regex: `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`,
    },
    behavior: "Isolated",
    invert: false,
  },
  { ...byteLevel, use_regex: false },
]

/** How tokenizer.json writes the pre-tokenizers of actors/request/pre-tokenizer.ts. */
const preTokenizers: Readonly<Record<string, ReadonlyArray<object>>> = {
  "gpt-2": [byteLevel],
  smollm: [{ type: "Digits", individual_digits: true }, byteLevel],
  "llama-bpe": split("\\p{N}{1,3}"),
  qwen2: split("\\p{N}"),
}

interface Stage {
  readonly type?: unknown
  readonly pretokenizers?: ReadonlyArray<Stage>
}

/** Where only offsets into the text differ, the words are the same. */
const stagesOf = (stage: unknown): ReadonlyArray<object> => {
  const { trim_offsets: _, ...rest } = (stage ?? {}) as Stage & { readonly trim_offsets?: unknown }
  if (rest.type === "Sequence") return (rest.pretokenizers ?? []).flatMap(stagesOf)
  return [rest.type === "ByteLevel" ? { use_regex: true, ...rest } : rest]
}

const tokenType = { normal: 1, control: 3, userDefined: 4, unused: 5 } as const

interface AddedToken {
  readonly id: number
  readonly content: string
  readonly special: boolean
}

const isAdded = (value: unknown): value is AddedToken => {
  const { id, content, special } = (value ?? {}) as Record<string, unknown>
  return Number.isSafeInteger(id) && typeof content === "string" && typeof special === "boolean"
}

/** A token of tokenizer_config.json, which is written as its text or as an object that has it. */
const tokenText = (value: unknown): unknown => (typeof value === "object" && value !== null ? (value as { readonly content?: unknown }).content : value)

/** Whether tokenizer.json puts this token before a text. */
const beginsWith = (processor: unknown, token: unknown): boolean => {
  const { type, processors, single } = (processor ?? {}) as { readonly type?: string; readonly processors?: ReadonlyArray<unknown>; readonly single?: ReadonlyArray<unknown> }
  if (type === "Sequence") return (processors ?? []).some((each) => beginsWith(each, token))
  const first = single?.[0] as { readonly SpecialToken?: { readonly id?: unknown } } | undefined
  return type === "TemplateProcessing" && first?.SpecialToken?.id === token
}

/** Special tokens that tokenizer.json puts around a text: the one before it is all that a GGUF file can say. */
const specialsOf = (processor: unknown): number => {
  const { processors, single } = (processor ?? {}) as { readonly processors?: ReadonlyArray<unknown>; readonly single?: ReadonlyArray<unknown> }
  return [...(processors ?? []).map(specialsOf), ...(single ?? []).map((piece) => Number(typeof piece === "object" && piece !== null && "SpecialToken" in piece))].reduce((sum, count) => sum + count, 0)
}

const chatTemplate = async (folder: string, config: JsonFile): Promise<string | undefined> => {
  const found = config.get("chat_template")
  if (typeof found === "string") return found
  if (found === undefined) {
    return readFile(join(folder, "chat_template.jinja"), "utf8").catch(({ code }: NodeJS.ErrnoException) => {
      if (code === "ENOENT") return undefined
      throw new ImportError(`${join(folder, "chat_template.jinja")}: cannot be read (${code})`)
    })
  }
  const named = Array.isArray(found) ? (found as ReadonlyArray<{ readonly name?: unknown; readonly template?: unknown }>).find(({ name }) => name === "default") : undefined
  return typeof named?.template === "string" ? named.template : config.refuse("chat_template", 'a text, or a list with a template named "default"')
}

/**
 * The metadata of a byte-level BPE tokenizer in a Hugging Face folder: tokenizer.json, tokenizer_config.json and, for what ends an
 * answer, generation_config.json or config.json.
 * @param vocabulary rows of the embedding; ids that no token has are filled
 */
export const tokenizerMetadata = async (folder: string, model: JsonFile, vocabulary: number): Promise<Metadata> => {
  const file = await JsonFile.read(folder, "tokenizer.json")
  const config = await JsonFile.read(folder, "tokenizer_config.json")
  file.oneOf("model.type", "BPE")
  file.oneOf("model.byte_fallback", false, undefined)
  file.oneOf("model.continuing_subword_prefix", "", undefined)
  file.oneOf("model.end_of_word_suffix", "", undefined)
  file.oneOf("decoder.type", "ByteLevel")
  if (file.get("normalizer") !== undefined) file.refuse("normalizer", "nothing")
  const pre = Object.keys(preTokenizers).find((name) => isDeepStrictEqual(stagesOf(file.get("pre_tokenizer")), preTokenizers[name]))
  if (pre === undefined) return file.refuse("pre_tokenizer", `one of ${Object.keys(preTokenizers).join(", ")}`)
  file.oneOf("model.ignore_merges", ...(preTokenizer(pre).ignoreMerges ? [true] : [false, undefined]))

  const tokens: Array<string> = Array.from({ length: vocabulary }, (_, id) => `[PAD${id}]`)
  const types: Array<number> = tokens.map(() => tokenType.unused)
  const ids = new Map<unknown, number>()
  const put = (key: string, content: string, id: unknown, type: number): void => {
    if (!Number.isInteger(id) || (id as number) < 0 || (id as number) >= vocabulary) file.refuse(key, `ids in 0 … ${vocabulary - 1}, and not ${JSON.stringify(id)} for ${JSON.stringify(content)}`)
    if (types[id as number] !== tokenType.unused && tokens[id as number] !== content) file.refuse(key, `one token for each id, and not two for ${String(id)}`)
    tokens[id as number] = content
    types[id as number] = type
    ids.set(content, id as number)
  }
  for (const [content, id] of Object.entries(file.get("model.vocab") ?? {})) put("model.vocab", content, id, tokenType.normal)
  const added = file.get("added_tokens") ?? []
  if (!Array.isArray(added) || !added.every(isAdded)) return file.refuse("added_tokens", "a list of tokens, each with id, content and special")
  for (const [at, token] of (added as ReadonlyArray<AddedToken>).entries()) {
    for (const flag of ["lstrip", "rstrip", "single_word"]) file.oneOf(`added_tokens.${at}.${flag}`, false, undefined)
    put("added_tokens", token.content, token.id, token.special ? tokenType.control : tokenType.userDefined)
  }
  // Older files write a merge as one text, newer ones as two.
  const merges = file.get("model.merges")
  const pairs = Array.isArray(merges) ? merges.map((merge: unknown) => (Array.isArray(merge) ? merge.join(" ") : merge)) : []
  if (!Array.isArray(merges) || !pairs.every((pair) => typeof pair === "string" && /^\S+ \S+$/.test(pair))) return file.refuse("model.merges", "a list of pairs")

  const idOf = (key: string): number | undefined => {
    const token = tokenText(config.get(key))
    return token === undefined ? undefined : (ids.get(token) ?? config.refuse(key, "a token of tokenizer.json"))
  }
  const bos = idOf("bos_token")
  const generation = await JsonFile.find(folder, "generation_config.json")
  const stated = [generation, model].find((each) => each?.get("eos_token_id") !== undefined)
  const ends = [...new Set([idOf("eos_token"), stated?.get("eos_token_id")].flat())].filter((id) => id !== undefined)
  if (ends.length === 0) config.refuse("eos_token", "a token, or an eos_token_id in generation_config.json")
  // A GGUF file names what ends an answer as the end of the text, of the turn and of the message.
  const endKeys = ["eos", "eot", "eom"]
  if (ends.length > endKeys.length || ends.some((id) => !Number.isInteger(id) || (id as number) < 0 || (id as number) >= vocabulary)) {
    return (stated ?? config).refuse("eos_token_id", `with eos_token at most ${endKeys.length} token ids in 0 … ${vocabulary - 1}`)
  }
  const begins = beginsWith(file.get("post_processor"), tokenText(config.get("bos_token")))
  if (specialsOf(file.get("post_processor")) > Number(begins)) file.refuse("post_processor", "no special token but the bos_token before a text")
  const addBos = config.get("add_bos_token") ?? begins
  const template = await chatTemplate(folder, config)
  return [
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.pre", text(pre)],
    ["tokenizer.ggml.tokens", array("string", tokens)],
    ["tokenizer.ggml.token_type", array("i32", types)],
    ["tokenizer.ggml.merges", array("string", pairs as ReadonlyArray<string>)],
    ...(bos === undefined ? [] : [["tokenizer.ggml.bos_token_id", u32(bos)] as const]),
    ...ends.map((id, i) => [`tokenizer.ggml.${endKeys[i]}_token_id`, u32(id as number)] as const),
    ["tokenizer.ggml.add_bos_token", bool(addBos === true && bos !== undefined)],
    ...(template === undefined ? [] : [["tokenizer.chat_template", text(template)] as const]),
  ]
}
