export interface OtlpOptions {
  /** A collector's OTLP/HTTP address, to which /v1/traces is added. */
  readonly endpoint: string
  readonly cluster: string
  /** What the process runs: its kind, which becomes a service of its own in Jaeger, and its name. */
  readonly component: { readonly kind: string; readonly id: string }
}

/**
 * Spans on their way to a collector, by the OpenTelemetry SDK, in batches, in the background and dropped where it does not
 * take them. Loaded by telemetry.ts, and only where tracing is on. The SDK reads its own standard variables, such as
 * OTEL_EXPORTER_OTLP_HEADERS and OTEL_TRACES_SAMPLER.
 */
import { hostname } from "node:os"
import * as OtelTracer from "@effect/opentelemetry/OtelTracer"
import * as Resource from "@effect/opentelemetry/Resource"
import type { Span } from "@opentelemetry/api"
import { OTLPTraceExporter } from "@opentelemetry/exporter-trace-otlp-proto"
import { BatchSpanProcessor, NodeTracerProvider, type SpanExporter } from "@opentelemetry/sdk-trace-node"
import { ATTR_SERVICE_INSTANCE_ID, ATTR_SERVICE_NAMESPACE } from "@opentelemetry/semantic-conventions"
import { Cause, Effect, Exit, Layer, Tracer } from "effect"
import { limits } from "../../config/limits.ts"
import { attributes } from "../../config/telemetry.ts"

export const otlp = ({ endpoint, cluster, component }: OtlpOptions): Layer.Layer<never> => {
  const name = `${component.kind} ${component.id}`
  const resource = Resource.layer({
    serviceName: component.kind === "penstock" ? "penstock" : `penstock-${component.kind}`,
    attributes: {
      [ATTR_SERVICE_NAMESPACE]: cluster,
      [ATTR_SERVICE_INSTANCE_ID]: `${name} ${hostname()} ${process.pid}`,
      [attributes.component]: name,
    },
  })
  const provider = Layer.effect(
    OtelTracer.OtelTracerProvider,
    Effect.gen(function* () {
      const resource = yield* Resource.Resource
      return yield* Effect.acquireRelease(
        Effect.sync(() => {
          const exporter = sayingOnce(new OTLPTraceExporter({ url: `${endpoint.replace(/\/+$/, "")}/v1/traces` }), endpoint)
          return new NodeTracerProvider({ resource, spanProcessors: [new BatchSpanProcessor(exporter, { scheduledDelayMillis: limits.telemetryDelayMs })] })
        }),
        (made) => Effect.tryPromise(() => made.shutdown()).pipe(Effect.ignore, Effect.interruptible, Effect.timeoutOption(limits.telemetryFlushDeadlineMs)),
      )
    }),
  )
  const tracer = Effect.map(OtelTracer.make, (made) =>
    // Without its `context`, which would run every step of every fibre in OpenTelemetry's own context: nothing here reads that.
    Tracer.make({ span: (options) => withLists(withoutText(made.span(options))) }),
  )
  return Layer.effect(Tracer.Tracer, tracer).pipe(Layer.provide(OtelTracer.layerTracer), Layer.provide(provider), Layer.provide(resource))
}

/** Tells of a collector that cannot be reached once, and drops what it does not take. */
const sayingOnce = (exporter: SpanExporter, endpoint: string): SpanExporter => {
  let said = false
  return {
    export: (batch, done) =>
      exporter.export(batch, (result) => {
        if (result.error !== undefined && !said) {
          said = true
          const { code, message } = result.error as NodeJS.ErrnoException
          console.error(`telemetry: ${new URL(endpoint).host} does not take traces (${code ?? message}); they are dropped, which this line says once`)
        }
        done(result)
      }),
    shutdown: () => exporter.shutdown(),
    forceFlush: () => exporter.forceFlush?.() ?? Promise.resolve(),
  }
}

/** Attributes that are lists stay lists, which the bridge would write as JSON. */
const withLists = (span: Tracer.Span): Tracer.Span => {
  const { span: own } = span as Tracer.Span & { readonly span: Span }
  const attribute = span.attribute.bind(span)
  span.attribute = (key, value) => (Array.isArray(value) ? void own.setAttribute(key, value.map(String)) : attribute(key, value))
  return span
}

/** A failed span says the kind of its error and no more: messages may quote a request. */
const withoutText = (span: Tracer.Span): Tracer.Span => {
  const end = span.end.bind(span)
  span.end = (endTime, exit) => {
    if (Exit.isSuccess(exit)) return end(endTime, exit)
    const error = Cause.squash(exit.cause) as { readonly code?: unknown; readonly name?: unknown; readonly status?: unknown } | null | undefined
    if (Cause.hasInterruptsOnly(exit.cause) || error?.code === "cancelled") {
      span.attribute(attributes.interrupted, true)
      return end(endTime, Exit.void)
    }
    const type = String(error?.code ?? error?.name ?? "error")
    span.attribute(attributes.errorType, type)
    // As for HTTP, what a client did wrong is no error of the server's.
    const clients = typeof error?.status === "number" && error.status < 500
    end(endTime, clients ? Exit.void : Exit.fail(Object.assign(new Error(type), { stack: type })))
  }
  return span
}
