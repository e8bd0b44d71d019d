/** How a text is cut into words before BPE. Each stage cuts the pieces of the one before. */
export interface PreTokenizer {
  readonly stages: ReadonlyArray<RegExp>
  /** A word that is an entry of the vocabulary is that entry, whatever the merges say. */
  readonly ignoreMerges: boolean
  /** What `tokenizer.ggml.add_bos_token` is where the file does not say. */
  readonly addBos: boolean
}

// White_Space is Unicode's and llama.cpp's set: JavaScript's \s has U+FEFF in it and lacks U+0085.
const ws = "\\p{White_Space}"
const gpt2 = new RegExp(`'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^${ws}\\p{L}\\p{N}]+|${ws}+(?!\\P{White_Space})|${ws}+`, "gu")
// (?i:…) is newer than Node 20, so both cases are written out.
const contractions = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
const llama3 = (digits: string) =>
  new RegExp(
    `${contractions}|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|${digits}| ?[^${ws}\\p{L}\\p{N}]+[\\r\\n]*|${ws}*[\\r\\n]+|${ws}+(?!\\P{White_Space})|${ws}+`,
    "gu"
  )
const singleDigits = /\p{N}/gu

const known: Readonly<Record<string, PreTokenizer>> = {
  "gpt-2": { stages: [gpt2], ignoreMerges: false, addBos: false },
  smollm: { stages: [singleDigits, gpt2], ignoreMerges: false, addBos: false },
  "llama-bpe": { stages: [llama3("\\p{N}{1,3}")], ignoreMerges: true, addBos: true },
  qwen2: { stages: [llama3("\\p{N}")], ignoreMerges: false, addBos: false }
}

/** Pieces of `text`: the matches of `pattern` and what lies between them, in order. */
function* cut(text: string, pattern: RegExp): Generator<string> {
  let end = 0
  for (const match of text.matchAll(pattern)) {
    if (match.index > end) yield text.slice(end, match.index)
    yield match[0]
    end = match.index + match[0].length
  }
  if (end < text.length) yield text.slice(end)
}

/** Words of `text`, lazily, so that a caller can stop at a limit. */
export function* words(text: string, stages: ReadonlyArray<RegExp>): Generator<string> {
  const [first, ...rest] = stages
  if (first === undefined) {
    yield text
  } else {
    for (const piece of cut(text, first)) yield* words(piece, rest)
  }
}

/**
 * The pre-tokenizer that a model file names.
 * @param name `tokenizer.ggml.pre`
 * @throws Error that names the supported ones
 */
export const preTokenizer = (name: string): PreTokenizer => {
  const found = Object.hasOwn(known, name) ? known[name] : undefined
  if (found === undefined) throw new Error(`tokenizer.ggml.pre: "${name}" is not supported; supported: ${Object.keys(known).join(", ")}`)
  return found
}
