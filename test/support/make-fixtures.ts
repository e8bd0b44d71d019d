/**
 * Writes test/fixtures: what independent programs say about SmolLM2-135M-Instruct. About two minutes.
 *
 *     npm install --prefix ELSEWHERE --ignore-scripts node-llama-cpp@3.22.1
 *     python3 -m venv ELSEWHERE/python && ELSEWHERE/python/bin/pip install numpy
 *     node_modules/.bin/tsx test/support/make-fixtures.ts MODEL.gguf ELSEWHERE/node_modules/node-llama-cpp ELSEWHERE/python/bin/python
 *
 * - smollm2-tokens.json: texts and their tokens by llama.cpp (through node-llama-cpp, which is no dependency of the project).
 *   Left out are the bytes that the vocabulary lacks (0x04, 0x06, 0x13 ...): llama.cpp drops them after merging, the
 *   tokenizers library before, so that a merge across the gap differs.
 * - smollm2-teacher-forced.json: for each position of gateway/bench/text.txt, what the float64 forward of exact-forward.py says
 *   of the next token (it agrees with reference-forward.ts to the last digit that is kept), and how far llama.cpp is from that.
 */
import { execFileSync } from "node:child_process"
import { createHash } from "node:crypto"
import { readFileSync, writeFileSync } from "node:fs"
import { join, resolve } from "node:path"
import { fileURLToPath, pathToFileURL } from "node:url"
import { loadLlamaCpp, openLlamaCpp } from "../../gateway/bench/llama-cpp-runtime.ts"

const hostileTexts: ReadonlyArray<string> = [
  "",
  " ",
  "Hello, world!",
  "  leading and trailing  ",
  "a  b   c    d     e",
  "\t\ttabs\tand spaces \t mixed",
  "\n\n\nline\n\nline\r\nline\r\r\n \n\t\n end\n",
  " ".repeat(300),
  "\n".repeat(70) + " " + "\t".repeat(40),
  "x" + " ".repeat(65) + "y\u00a0\u00a0z\u2003\u2009\u3000w\u200b\u200bv\ufeffu",
  "don't can't I'll we've he'd she's I'm they're",
  "DON'T CAN'T I'LL WE'VE HE'D SHE'S I'M THEY'RE 'S 'LL 'T'S's'S''s '",
  "\u2019s \u2019ll it\u2019s",
  "1234567890",
  "3.14159e-10 0x1F 1,000,000 12/31/1999 1st 2nd a1b2c3 007",
  "\u00bd \u00b2 x\u00b2 \u00bc\u00be \u2460\u2461 \u2167 \u0663\u0664\u0665 \u096a\u096b \u{1d7d8}\u{1d7d9} \u4e94\u5341 \u3007",
  "\u{1f468}\u200d\u{1f469}\u200d\u{1f467}\u200d\u{1f466} \u{1f3f3}\ufe0f\u200d\u{1f308} \u{1f1e9}\u{1f1ea}\u{1f1eb}\u{1f1f7} \u{1f44d}\u{1f3fd} \u2764\ufe0f",
  "\u{1f600}\u{1f600}\u{1f600} emoji\u{1f600}inside",
  "e\u0301 n\u0303 o\u0308\u0304 Z\u0351\u036b\u0343\u036a\u0302A\u0334\u0335L\u0360G\u0322O\u0489 \u1100\u1161\u11a8",
  "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd, \u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645! \u202eabc\u202c \u200fx\u200e",
  "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\uff01 \ud55c\uad6d\uc5b4 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \u{20000}\u{2a6d6}",
  "\u041f\u0440\u0438\u0432\u0435\u0442 \u0393\u03b5\u03b9\u03ac \u00c5ngstr\u00f6m na\u00efve \ufb01ne \u0130stanbul \u00df\u1e9e \u01c5",
  "nul:\u0000:soh\u0001 bell\u0007 esc\u001b[31mred\u001b[0m del\u007f nel\u0085 ls\u2028ps\u2029",
  "\u0000\u0000\u0000",
  "replacement \ufffd\ufffd lone high \ud800 lone low \udc00 end\ud83d",
  "private \ue000\uf8ff noncharacter \uffff\u{10ffff} tag\u{e0041}\u{e007f}",
  "<|im_start|>user\nignore<|im_end|>\n<|im_start|>assistant\n",
  "text<|im_start|>text <|im_end|> <|endoftext|><|endoftext|>",
  "<|im_start |> <|im_start> <im_start|> <|IM_START|> <|im_|start|> <|im_start|<|im_end|>|>",
  "<repo_name>penstock<file_sep>a.ts<gh_stars>5<jupyter_start>",
  "<s></s><pad><unk>[INST][/INST]<|begin_of_text|><bos>",
  "def f(x, *args, **kw):\n    return {k: v for k, v in kw.items() if v is not None}\n\n\nif __name__ == '__main__':\n\tprint(f(1, y=2))\n",
  "const x = (a ?? b)?.c!.d as unknown; // \u2192 ok\n/* ===== */ #include <stdio.h>\nfor(;;){}\n<div class=\"a\">&nbsp;</div>",
  "https://example.com/a?b=c&d=%20#frag user@example.org C:\\Users\\x /usr/local/bin",
  "!!!???...,,,;;;:::---___===+++***///\\\\\\|||~~~```^^^$$$%%%&&&###@@@",
  "antidisestablishmentarianism".repeat(40),
  "a".repeat(500),
  "\u00e9".repeat(200),
  "camelCaseAndPascalCase snake_case_name kebab-case-name SCREAMING_SNAKE iPhone15Pro",
  "The quick brown fox jumps over the lazy dog. \u201cQuoted,\u201d she said \u2014 \u2018twice\u2019\u2026",
  "\u00ab Bonjour \u00bb \u00bfQu\u00e9 tal? \u00a1Bien! 5 \u20ac \u2264 10 \u00a3 \u2260 \u221e \u2211\u222b\u221a \u00b5m 20\u00b0C",
]

/** The part of node-llama-cpp that is used here. */
interface Llama {
  readonly llamaCppRelease: { readonly repo: string; readonly release: string }
  loadModel(options: { modelPath: string; vocabOnly: boolean }): Promise<{ tokenize(text: string, special: boolean): ReadonlyArray<number> }>
}

const [modelArgument, moduleArgument, python] = process.argv.slice(2)
if (modelArgument === undefined || moduleArgument === undefined || python === undefined) throw new Error("make-fixtures: expected MODEL.gguf, the folder of node-llama-cpp and a python that has numpy")
const modelPath = resolve(modelArgument)
const reference = resolve(moduleArgument)
const fixtures = fileURLToPath(new URL("../fixtures/", import.meta.url))
const sha256 = createHash("sha256").update(readFileSync(modelPath)).digest("hex")
const { version } = JSON.parse(readFileSync(join(reference, "package.json"), "utf8")) as { version: string }

/** JSON in ASCII with one entry of an array a line, so that fixtures survive any editor and diffs stay small. */
const write = (name: string, value: Readonly<Record<string, unknown>>): void => {
  const ascii = (part: unknown): string =>
    JSON.stringify(part).replace(/[\u007f-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`)
  const lines = Object.entries(value).map(([key, part]) =>
    Array.isArray(part) && typeof part[0] === "object" ? `"${key}": [\n${part.map(ascii).join(",\n")}\n]` : `"${key}": ${ascii(part)}`,
  )
  writeFileSync(join(fixtures, name), `{\n${lines.join(",\n")}\n}\n`)
}

const main = async (): Promise<void> => {
  const { getLlama } = (await import(pathToFileURL(join(reference, "dist/index.js")).href)) as {
    getLlama(options: { build: "never"; gpu: false }): Promise<Llama>
  }
  const llama = await getLlama({ build: "never", gpu: false })
  const tool = `llama.cpp ${llama.llamaCppRelease.release} through node-llama-cpp ${version}`
  const model = await llama.loadModel({ modelPath, vocabOnly: true })
  write("smollm2-tokens.json", {
    made: `${tool}, tokenize without and with special tokens parsed, nothing added; lone surrogates count as U+FFFD`,
    modelSha256: sha256,
    cases: hostileTexts.map((text) => {
      const wellFormed = Buffer.from(text).toString("utf8")
      return { text, ids: [...model.tokenize(wellFormed, false)], idsWithSpecials: [...model.tokenize(wellFormed, true)] }
    }),
  })

  const textPath = "gateway/bench/text.txt"
  const tokens = [...model.tokenize(readFileSync(fileURLToPath(new URL(`../../${textPath}`, import.meta.url)), "utf8"), false)]
  const exact = JSON.parse(
    execFileSync(python, [fileURLToPath(new URL("./exact-forward.py", import.meta.url)), modelPath], { input: JSON.stringify(tokens), stdio: ["pipe", "pipe", "inherit"], maxBuffer: 2 ** 26 }).toString(),
  ) as { readonly argmax: ReadonlyArray<number>; readonly logprob: ReadonlyArray<number>; readonly gap: ReadonlyArray<number> }

  const options = { path: modelPath, threads: 2, isa: undefined, from: reference, scored: tokens.length }
  const theirs = await (await openLlamaCpp(options, await loadLlamaCpp(options), tokens.slice(0, 16))).scored(tokens)
  const round = (value: number): number => Number(value.toFixed(5))
  write("smollm2-teacher-forced.json", {
    made: `tokens: ${tool}; argmax, logprob and gap: test/support/exact-forward.py, float64, nothing quantised but the file's weights`,
    modelSha256: sha256,
    text: textPath,
    llamaCpp: {
      made: `${tool}: the same file as it is, the same tokens, 2 threads, flash attention, KV in f16, chunks of 512; log p from its logits`,
      meanDifference: round(theirs.reduce((sum, { logprob }, n) => sum + Math.abs(logprob - exact.logprob[n]!), 0) / theirs.length), // of |log p - exact log p|
      sameArgmax: theirs.filter(({ argmax }, n) => argmax === exact.argmax[n]).length, // positions
    },
    tokens,
    argmax: exact.argmax, // [tokens - 1] the most likely token after position n
    logprob: exact.logprob.map(round), // [tokens - 1] log p of the token that does come at n + 1
    gap: exact.gap.map(round), // [tokens - 1] log p of the most likely less that of the second
  })
  process.exit(0)
}

await main()
