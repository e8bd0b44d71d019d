/**
 * The fields that the endpoints share, with OpenAI's ranges; what they mean to the sampler is in sampling.ts.
 */
import { Schema } from "effect"
import { limits } from "../config/limits.ts"

type Plain<A> = Schema.Codec<A, A, never, never>

/** A field that may be absent or null. `expected` completes "expected …" in the error. */
export const optional = <A>(expected: string, schema: Plain<A>) => Schema.optional(Schema.NullOr(schema).annotate({ expected }))

export const number = (minimum: number, maximum: number) => Schema.Finite.check(Schema.isBetween({ minimum, maximum }))
export const integer = (minimum: number, maximum: number) => Schema.Int.check(Schema.isBetween({ minimum, maximum }))
const between = (minimum: number, maximum: number) => optional(`a number between ${minimum} and ${maximum}`, number(minimum, maximum).annotate({ expected: `a number between ${minimum} and ${maximum}` }))
export const whole = (minimum: number, maximum: number) => {
  const expected = maximum >= maxInt ? `an integer of ${minimum} or more` : `an integer between ${minimum} and ${maximum}`
  return optional(expected, integer(minimum, maximum).annotate({ expected }))
}
export const flag = optional("true or false", Schema.Boolean)
export const text = optional("a string", Schema.String)
export const maxInt = 2 ** 31 - 1

export const tokenId = integer(0, maxInt).annotate({ expected: "a token id (an integer of 0 or more)" })
export const modelField = Schema.String.annotate({ expected: "the id of a model (a string; GET /v1/models lists them)" })

const stopExpected = `a string or an array of at most ${limits.stopStrings} strings, each of 1 to ${limits.stopStringChars} characters`
const stopString = Schema.String.check(Schema.isMaxLength(limits.stopStringChars)).annotate({ expected: stopExpected })

/** Int64, of which JSON keeps 53 bits exactly: any integer will do. */
const seed = Schema.Finite.check(Schema.makeFilter((value) => Number.isInteger(value) && Math.abs(value) <= 2 ** 63))

const bias = Schema.Record(Schema.String, number(-100, 100).annotate({ expected: "a number between -100 and 100" }))

export const samplingFields = {
  temperature: between(0, 2),
  top_p: optional("a number above 0 and at most 1", Schema.Finite.check(Schema.isGreaterThan(0), Schema.isLessThanOrEqualTo(1, { expected: "a number above 0 and at most 1" }))),
  top_k: whole(-1, maxInt),
  min_p: between(0, 1),
  repetition_penalty: between(0.01, 100),
  presence_penalty: between(-2, 2),
  frequency_penalty: between(-2, 2),
  logit_bias: optional("an object of token ids and numbers between -100 and 100", bias),
  seed: optional("an integer", seed.annotate({ expected: "an integer" })),
  stop: optional(stopExpected, Schema.Union([stopString, Schema.Array(stopString).check(Schema.isMaxLength(limits.stopStrings)).annotate({ expected: stopExpected })])),
  stop_token_ids: optional("an array of token ids", Schema.Array(tokenId).check(Schema.isMaxLength(limits.stopTokenIds)).annotate({ expected: `at most ${limits.stopTokenIds} token ids` })),
  ignore_eos: flag,
  min_tokens: whole(0, maxInt),
  cache_salt: optional("a string of at most 256 characters", Schema.String.check(Schema.isMaxLength(256)).annotate({ expected: "a string of at most 256 characters" })),
  return_token_ids: flag,
  stream: flag,
  user: text,
} as const

export const choicesField = whole(1, limits.choices)

export const streamOptionsField = optional("an object", Schema.Struct({ include_usage: flag }))

const Sampling = Schema.Struct(samplingFields)
export type SamplingFields = typeof Sampling.Type
