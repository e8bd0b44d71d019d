/** From the fields of a request to what the request actor is asked. */
import { randomInt } from "node:crypto"
import { limits } from "../config/limits.ts"
import type { GenerateMessage } from "../actors/messages/request.ts"
import { defaultSampling } from "../actors/messages/sampling.ts"
import { show } from "./decode.ts"
import { invalid } from "./errors.ts"
import { maxInt, type SamplingFields } from "./schemas.ts"

type Drawing = Pick<GenerateMessage, "sampling" | "stop" | "stopTokenIds" | "ignoreEos" | "cacheSalt">

/** Throws an ApiError 400 for what a Schema cannot say. Draws a seed where the request has none. */
export const drawingOf = (fields: SamplingFields): Drawing => {
  const stop = typeof fields.stop === "string" ? [fields.stop] : (fields.stop ?? [])
  return {
    sampling: {
      temperature: fields.temperature ?? defaultSampling.temperature,
      topK: Math.max(0, fields.top_k ?? defaultSampling.topK), // -1 means "off" to some clients
      topP: fields.top_p ?? defaultSampling.topP,
      minP: fields.min_p ?? defaultSampling.minP,
      repetitionPenalty: fields.repetition_penalty ?? defaultSampling.repetitionPenalty,
      presencePenalty: fields.presence_penalty ?? defaultSampling.presencePenalty,
      frequencyPenalty: fields.frequency_penalty ?? defaultSampling.frequencyPenalty,
      logitBias: logitBiasOf(fields.logit_bias ?? {}),
      minTokens: fields.min_tokens ?? defaultSampling.minTokens,
      seed: fields.seed === undefined || fields.seed === null ? randomInt(2 ** 48 - 1) : foldSeed(fields.seed),
    },
    stop: stop.filter((string) => string !== ""), // an empty stop string would stop at once: OpenAI ignores it
    stopTokenIds: fields.stop_token_ids ?? [],
    ignoreEos: fields.ignore_eos ?? false,
    cacheSalt: fields.cache_salt ?? undefined,
  }
}

/** Any integer seed as one that the sampler takes: itself where it can be, else its low 53 bits. */
export const foldSeed = (seed: number): number => (Number.isSafeInteger(seed) && seed >= 0 ? seed : Number(BigInt.asUintN(53, BigInt(seed))))

const logitBiasOf = (bias: Readonly<Record<string, number>>): ReadonlyArray<readonly [number, number]> => {
  const entries = Object.entries(bias)
  if (entries.length > limits.logitBiases) throw invalid("logit_bias", `expected at most ${limits.logitBiases} tokens, found ${entries.length}`)
  return entries.map(([token, value]) => {
    if (!/^\d{1,10}$/.test(token) || Number(token) > maxInt) throw invalid("logit_bias", `expected token ids as keys, found ${show(token)}`)
    return [Number(token), value]
  })
}
