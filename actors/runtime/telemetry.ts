/**
 * Tracing of a process: on where there is a collector to send spans to, else switched off, so that spans are not even made
 * and nothing of the SDK is loaded.
 */
import { Effect, Layer, References } from "effect"
import type { OtlpOptions } from "./otlp.ts"

export interface TelemetryOptions extends Omit<OtlpOptions, "endpoint"> {
  /** A collector's address; undefined: tracing is off. */
  readonly endpoint: string | undefined
}

/** Sends spans until its Scope closes, which waits for the last ones, but not long. */
export const telemetry = (options: TelemetryOptions): Layer.Layer<never> => {
  const { endpoint } = options
  if (endpoint === undefined) return Layer.succeed(References.TracerEnabled, false)
  return Layer.unwrap(Effect.map(Effect.promise(() => import("./otlp.ts")), ({ otlp }) => otlp({ ...options, endpoint })))
}
