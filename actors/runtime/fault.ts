/**
 * The one error that crosses actors: what went wrong, where (the hop), and whether the same request may be tried again.
 */
import { Schema } from "effect"

export const FaultCode = Schema.Literals([
  "invalid_request", // the request itself is wrong; `param` names the field
  "context_length_exceeded", // the prompt is longer than the context or the pool
  "model_not_found",
  "overloaded", // a bounded queue is full; `retryAfterMs`
  "unavailable", // nobody serves this now
  "deadline_exceeded", // the hop did not answer in time
  "disconnected", // the hop went away in the middle
  "cancelled", // whoever asked has gone
  "shutting_down",
  "moved", // whoever had it gives it away: it goes on elsewhere at once
  "stale", // an earlier incarnation, of whoever the hop names, was meant or has spoken
  "internal", // a defect; its details are in the log of the hop
])
export type FaultCode = typeof FaultCode.Type

const retryableCodes: ReadonlySet<FaultCode> = new Set(["overloaded", "unavailable", "deadline_exceeded", "disconnected", "shutting_down", "moved", "stale"])

export class Fault extends Schema.TaggedError<Fault>()("Fault", {
  code: FaultCode,
  message: Schema.String,
  /** Where it happened: an actor ("decode w0") or a step of the way ("bus memory"). */
  hop: Schema.String,
  /** The request's field at fault. */
  param: Schema.optional(Schema.String),
  retryAfterMs: Schema.optional(Schema.Number),
}) {
  /** Whether the same request may succeed elsewhere or later. */
  get retryable(): boolean {
    return retryableCodes.has(this.code)
  }

  /** Any thrown value as a Fault; a programmer's error becomes `internal` without its details. */
  static from(error: unknown, hop: string): Fault {
    if (error instanceof Fault) return error
    return new Fault({ code: "internal", message: "an unexpected error; the log has the details", hop })
  }
}
