/** The span that work belongs to, as the W3C `traceparent` that crosses processes. */
import { Context, Effect, Tracer } from "effect"
import { attributes } from "../../config/telemetry.ts"
import type { Bus } from "./bus.ts"

/** Undefined where tracing is off. */
const traceparentOf = (span: Tracer.AnySpan | undefined): string | undefined =>
  span === undefined || Context.get(span.annotations, Tracer.DisablePropagation) ? undefined : `00-${span.traceId}-${span.spanId}-${span.sampled ? "01" : "00"}`

/** Of the span that runs here, or the caller's. */
export const currentTraceparent: Effect.Effect<string | undefined> = Effect.map(Effect.context<never>(), (context) => traceparentOf(Context.getOrUndefined(context, Tracer.ParentSpan)))

/** The span that a traceparent names; undefined where there is none, or not a sane one. */
export const spanOf = (traceparent: string | undefined): Tracer.ExternalSpan | undefined => {
  const match = /^00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})$/.exec(traceparent ?? "")
  if (match === null) return undefined
  return Tracer.externalSpan({ traceId: match[1]!, spanId: match[2]!, sampled: (parseInt(match[3]!, 16) & 1) === 1 })
}

/** Of a span that serves a message. */
export const messageAttributes = (link: { readonly bus: Bus }, subject: string): Record<string, unknown> => ({
  [attributes.messagingSystem]: link.bus.name,
  [attributes.messagingDestination]: subject,
})
