/** How tokens are drawn: the parameters that travel with a request. Names and meaning as in kernels' SamplerOptions. */
import { Schema } from "effect"
import { limits } from "../../config/limits.ts"

const number = (minimum: number, maximum: number) => Schema.Finite.check(Schema.isBetween({ minimum, maximum }))
const integer = (minimum: number, maximum: number) => Schema.Int.check(Schema.isBetween({ minimum, maximum }))

export const Sampling = Schema.Struct({
  temperature: number(0, 100),
  topK: integer(0, 2 ** 31 - 1),
  topP: number(0, 1),
  minP: number(0, 1),
  repetitionPenalty: number(0.01, 100),
  presencePenalty: number(-100, 100),
  frequencyPenalty: number(-100, 100),
  logitBias: Schema.Array(Schema.Tuple([integer(0, 2 ** 31 - 1), number(-1000, 1000)])).check(Schema.isMaxLength(limits.logitBiases)),
  minTokens: integer(0, 2 ** 31 - 1),
  seed: integer(0, Number.MAX_SAFE_INTEGER),
})
export type Sampling = typeof Sampling.Type

/** What a request gets where it says nothing (OpenAI's defaults). The seed is the gateway's to fix. */
export const defaultSampling: Omit<Sampling, "seed"> = {
  temperature: 1,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  minTokens: 0,
}
