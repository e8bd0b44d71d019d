/**
 * Names of what is traced. The gen_ai.* and messaging.* ones are OpenTelemetry's semantic conventions, still incubating
 * there and so copied here; the penstock.* ones are this project's. No attribute holds text of a prompt or an answer, or a
 * key.
 */

/** One of each for a request, but for what is tried again and kv_store.put, of which there is one a batch of blocks. */
export const spans = {
  /** A request at the door, until the last byte of its answer. */
  gatewayRequest: "gateway.request",
  /** From text to text: in the request actor. */
  requestGenerate: "request.generate",
  /** Until the scheduler has found a place, queueing included. */
  schedulerPlace: "scheduler.place",
  /** The prompt: what is fetched and what is computed. */
  prefillRun: "prefill.run",
  /** From the first chunk of KV to the receiver's word that it has everything: it overlaps the computation. */
  kvTransfer: "kv.transfer",
  /** Blocks of a prefix: of kind client where they are asked for, of kind server in the store. */
  kvStoreGet: "kv_store.get",
  /** Blocks on their way into the store, in the background, mostly after the request's own end. */
  kvStorePut: "kv_store.put",
  /** From the reservation to the last token. */
  decodeRun: "decode.run",
} as const

export const attributes = {
  operationName: "gen_ai.operation.name",
  providerName: "gen_ai.provider.name",
  requestModel: "gen_ai.request.model",
  requestMaxTokens: "gen_ai.request.max_tokens",
  requestTemperature: "gen_ai.request.temperature",
  requestTopP: "gen_ai.request.top_p",
  requestTopK: "gen_ai.request.top_k",
  requestSeed: "gen_ai.request.seed",
  requestStream: "gen_ai.request.stream",
  requestChoices: "gen_ai.request.choice.count",
  responseId: "gen_ai.response.id",
  responseModel: "gen_ai.response.model",
  responseFinishReasons: "gen_ai.response.finish_reasons",
  /** Seconds. */
  responseTimeToFirstChunk: "gen_ai.response.time_to_first_chunk",
  usageInputTokens: "gen_ai.usage.input_tokens",
  usageOutputTokens: "gen_ai.usage.output_tokens",
  usageCachedInputTokens: "gen_ai.usage.cache_read.input_tokens",

  /** "nats" or "memory". */
  messagingSystem: "messaging.system",
  /** The subject that the message was sent to. */
  messagingDestination: "messaging.destination.name",

  httpRoute: "http.route",
  httpStatus: "http.response.status_code",
  /** A Fault's code, or the name of an error. */
  errorType: "error.type",

  /** Of a resource: the part of the topology that the process runs, for example "worker p0". */
  component: "penstock.component",
  requestId: "penstock.request.id",
  attempt: "penstock.request.attempt",
  /** Times that the request was placed: more than 1 where a worker was lost. */
  placements: "penstock.request.placements",
  worker: "penstock.worker",
  /** The work was given up, mostly because the client has gone. */
  interrupted: "penstock.interrupted",

  policy: "penstock.place.policy",
  placedPrefill: "penstock.place.prefill",
  placedDecode: "penstock.place.decode",
  /** Leading blocks of the prompt that the prefill worker is thought to hold. */
  prefixBlocks: "penstock.place.prefix_blocks",
  queueWaitMs: "penstock.place.queue_wait_ms",

  computedTokens: "penstock.prefill.computed_tokens",
  cachedTokens: "penstock.prefill.cached_tokens",

  /** Tokens that the worker held KV of when it took the reservation. */
  heldTokens: "penstock.decode.held_tokens",
  /** Of all choices; without the first of each where another worker has prefilled. */
  drawnTokens: "penstock.decode.drawn_tokens",

  transferFrom: "penstock.transfer.from",
  transferTo: "penstock.transfer.to",
  transferBytes: "penstock.transfer.bytes",
  transferChunks: "penstock.transfer.chunks",
  transferResent: "penstock.transfer.resent",
  transferMbPerS: "penstock.transfer.mb_per_s",
  /** Time that the sender had chunks and no credit. */
  transferWaitedMs: "penstock.transfer.waited_ms",
  /** What the transfer took once the last layer was computed: all that the overlap does not hide. */
  transferTailMs: "penstock.transfer.tail_ms",
  /** From this bandwidth on it is faster to move KV than to compute it here. */
  transferBreakEvenMbPerS: "penstock.transfer.break_even_mb_per_s",

  /** Where a prefix comes from: "store", "prefill" and a worker's name, or "compute" where that was estimated to be faster, or nobody has it. */
  prefixSource: "penstock.prefix.source",
  /** Estimates: until the sequence goes on by the way that was chosen, and if all of it were computed. */
  prefixPlanMs: "penstock.prefix.plan_ms",
  prefixComputeMs: "penstock.prefix.compute_ms",

  wantedBlocks: "penstock.blocks.wanted",
  /** Those that came, or were put. */
  movedBlocks: "penstock.blocks.moved",
} as const

export const providerName = "penstock"
