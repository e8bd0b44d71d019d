import { access } from "node:fs/promises"
import { basename, resolve } from "node:path"
import { awqTensors } from "./awq-tensors.ts"
import { writeGguf } from "./gguf-file.ts"
import { ImportError } from "./import-error.ts"
import { JsonFile } from "./json-file.ts"
import { readLlamaConfig } from "./llama-config.ts"
import { readCheckpoint } from "./safetensors.ts"
import { tokenizerMetadata } from "./tokenizer-metadata.ts"

/**
 * Makes one GGUF file of a Hugging Face folder that AutoAWQ has written (AWQ: Lin et al. 2023): config.json, model.safetensors or
 * several with their index, tokenizer.json, tokenizer_config.json and, where there is one, generation_config.json. Reads and writes in
 * pieces of some megabytes; all checks come first.
 * @param signal ends it, and leaves nothing
 * @returns what was rounded, for people
 * @throws ImportError naming what is not as it should be
 */
export const importAwq = async (folder: string, path: string, signal?: AbortSignal): Promise<ReadonlyArray<string>> => {
  const there = await access(path).then(() => true, () => false)
  if (there) throw new ImportError(`${path}: is there already`)
  const model = await JsonFile.read(folder, "config.json")
  const config = readLlamaConfig(model, basename(resolve(folder)))
  const tokenizer = await tokenizerMetadata(folder, model, config.vocabulary)
  const checkpoint = await readCheckpoint(folder)
  await writeGguf(path, [...config.metadata, ...tokenizer], awqTensors(checkpoint, config), signal)
  return ["model.embed_tokens.weight", "lm_head.weight"].flatMap((name) => {
    const dtype = checkpoint.get(name)?.dtype ?? "F16"
    return dtype === "F16" || (config.tied && name === "lm_head.weight") ? [] : [`${name}: ${dtype} has become F16`]
  })
}
