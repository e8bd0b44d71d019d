/**
 * What clients are told when something fails: OpenAI error objects, and the one table from faults to HTTP statuses.
 */
import { Data } from "effect"
import { limits } from "../config/limits.ts"
import { Fault, type FaultCode } from "../actors/runtime/fault.ts"

export interface ErrorBody {
  readonly error: {
    readonly message: string
    readonly type: string
    readonly param: string | null
    readonly code: string | null
  }
}

export class ApiError extends Data.TaggedError("ApiError")<{
  readonly status: number
  readonly type: string
  readonly code: string | null
  readonly param?: string
  readonly message: string
  readonly headers?: Readonly<Record<string, string>>
}> {
  get body(): ErrorBody {
    return { error: { message: this.message, type: this.type, param: this.param ?? null, code: this.code } }
  }
}

const statuses: Readonly<Record<FaultCode, readonly [status: number, type: string, code: string | null]>> = {
  invalid_request: [400, "invalid_request_error", null],
  context_length_exceeded: [400, "invalid_request_error", "context_length_exceeded"],
  model_not_found: [404, "invalid_request_error", "model_not_found"],
  overloaded: [429, "rate_limit_error", "rate_limit_exceeded"],
  unavailable: [503, "server_error", "unavailable"],
  shutting_down: [503, "server_error", "shutting_down"],
  moved: [503, "server_error", "unavailable"],
  stale: [503, "server_error", "unavailable"],
  deadline_exceeded: [504, "server_error", "deadline_exceeded"],
  disconnected: [502, "server_error", "disconnected"],
  cancelled: [499, "invalid_request_error", "cancelled"], // nginx's status for a client that has gone
  internal: [500, "server_error", "internal_error"],
}

export const fromFault = (fault: Fault): ApiError => {
  const [status, type, code] = statuses[fault.code]
  const retryAfterMs = fault.retryAfterMs ?? (fault.code === "overloaded" ? limits.retryAfterMs : undefined)
  return new ApiError({
    status,
    type,
    code,
    message: fault.message,
    param: fault.param,
    headers: retryAfterMs === undefined ? undefined : { "retry-after": String(Math.ceil(retryAfterMs / 1000)), "retry-after-ms": String(Math.ceil(retryAfterMs)) },
  })
}

/** An operating error as an ApiError, or undefined where `error` is a defect. */
export const asApiError = (error: unknown): ApiError | undefined => {
  if (error instanceof ApiError) return error
  return error instanceof Fault ? fromFault(error) : undefined
}

export const invalid = (param: string | undefined, message: string, code: string | null = null): ApiError =>
  new ApiError({ status: 400, type: "invalid_request_error", code, param, message: param === undefined ? message : `${param}: ${message}` })

export const notSupported = (param: string, what: string): ApiError => invalid(param, `${what} is not supported yet`, "unsupported_parameter")

export const modelNotFound = (model: string, served: string): ApiError =>
  new ApiError({ status: 404, type: "invalid_request_error", code: "model_not_found", param: "model", message: `the model ${JSON.stringify(model.slice(0, 200))} does not exist here; this server has ${JSON.stringify(served)}` })

export const internalError = fromFault(Fault.from(undefined, "gateway"))

export const shuttingDown = new Fault({ code: "shutting_down", message: "the server is shutting down", hop: "gateway" })
export const clientGone = new Fault({ code: "cancelled", message: "the client went away", hop: "gateway" })

/** One line about a defect, without anything that a client sent: not even the error's message, which may quote it. */
export const reportDefect = (requestId: string, defect: unknown): void => {
  const error = defect instanceof Error ? defect : undefined
  const frames = error?.stack?.split("\n").filter((line) => line.startsWith("    at ")).slice(0, 6).map((line) => line.trim())
  console.error(JSON.stringify({ level: "error", message: "gateway: an unexpected error", requestId, error: error?.name ?? typeof defect, frames }))
}
