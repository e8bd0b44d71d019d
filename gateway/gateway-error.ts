import { Data } from "effect"

/** The gateway cannot start; the message says why and what to do, for the operator. */
export class GatewayError extends Data.TaggedError("GatewayError")<{ readonly message: string }> {}
