/** What a request's root span says of it, by OpenTelemetry's conventions for generative AI. */
import { attributes, providerName } from "../config/telemetry.ts"
import type { Batch, GenerateOrder } from "./generation.ts"

export const requestAttributes = (model: string, responseId: string, orders: ReadonlyArray<GenerateOrder>): Record<string, unknown> => {
  const [first] = orders
  if (first === undefined) return {}
  const { sampling } = first // the same for all prompts of a batch
  return {
    [attributes.operationName]: first.prompt.kind === "chat" ? "chat" : "text_completion",
    [attributes.providerName]: providerName,
    [attributes.requestModel]: model,
    [attributes.responseModel]: model,
    [attributes.responseId]: responseId,
    ...(first.maxTokens === undefined ? {} : { [attributes.requestMaxTokens]: first.maxTokens }),
    ...(first.choices === 1 ? {} : { [attributes.requestChoices]: first.choices }),
    [attributes.requestTemperature]: sampling.temperature,
    [attributes.requestTopP]: sampling.topP,
    ...(sampling.topK === 0 ? {} : { [attributes.requestTopK]: sampling.topK }),
    [attributes.requestSeed]: sampling.seed,
  }
}

/** As far as it has come, where it is given up. */
export const responseAttributes = ({ seen }: Batch): Record<string, unknown> => ({
  [attributes.responseFinishReasons]: seen.finishes,
  [attributes.usageInputTokens]: seen.promptTokens,
  [attributes.usageOutputTokens]: seen.completionTokens,
  [attributes.usageCachedInputTokens]: seen.cachedTokens,
  ...(seen.firstAfterMs === undefined ? {} : { [attributes.responseTimeToFirstChunk]: seen.firstAfterMs / 1000 }),
})
