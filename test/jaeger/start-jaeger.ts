/** Jaeger as a process of its own, on free ports of loopback and in memory, and what it says of a trace. */
import { spawn } from "node:child_process"
import { mkdtempSync, rmSync, writeFileSync } from "node:fs"
import { createServer, type AddressInfo } from "node:net"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { childEnv } from "../../config/env.ts"
import type { TreeSpan } from "../support/span-tree.ts"
import { findJaeger } from "./find-jaeger.ts"

const config = (ports: { readonly http: number; readonly grpc: number; readonly otlp: number }): string => `
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines:
    traces: { receivers: [otlp], processors: [batch], exporters: [jaeger_storage_exporter] }
  telemetry:
    metrics: { level: none }
    logs: { level: warn }
extensions:
  jaeger_storage: { backends: { mem: { memory: { max_traces: 1000 } } } }
  jaeger_query:
    storage: { traces: mem }
    http: { endpoint: "127.0.0.1:${ports.http}" }
    grpc: { endpoint: "127.0.0.1:${ports.grpc}" }
receivers:
  otlp: { protocols: { http: { endpoint: "127.0.0.1:${ports.otlp}" } } }
processors: { batch: { timeout: 100ms } }
exporters:
  jaeger_storage_exporter: { trace_storage: mem }
`

const freePorts = async (count: number): Promise<Array<number>> => {
  const servers = await Promise.all(
    Array.from({ length: count }, () => {
      const server = createServer()
      return new Promise<typeof server>((resolve) => server.listen(0, "127.0.0.1", () => resolve(server)))
    }),
  )
  const ports = servers.map((server) => (server.address() as AddressInfo).port)
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))))
  return ports
}

export interface JaegerSpan extends TreeSpan {
  /** Of its process. */
  readonly instance: string
  readonly component: string
  readonly tags: Readonly<Record<string, unknown>>
}

interface Tag {
  readonly key: string
  readonly value: unknown
}

interface TraceJson {
  readonly traceID: string
  readonly spans: ReadonlyArray<{
    readonly spanID: string
    readonly operationName: string
    readonly references: ReadonlyArray<{ readonly refType: string; readonly traceID: string; readonly spanID: string }>
    readonly startTime: number
    readonly duration: number
    readonly processID: string
    readonly tags: ReadonlyArray<Tag>
  }>
  readonly processes: Readonly<Record<string, { readonly serviceName: string; readonly tags: ReadonlyArray<Tag> }>>
}

const record = (tags: ReadonlyArray<Tag>): Readonly<Record<string, unknown>> => Object.fromEntries(tags.map(({ key, value }) => [key, value]))

const spansOf = ({ spans, processes }: TraceJson): ReadonlyArray<JaegerSpan> =>
  spans.map(({ spanID, operationName, references, startTime, duration, processID, tags }) => {
    const { serviceName, tags: resource } = processes[processID]!
    const about = record(resource)
    return {
      spanId: spanID,
      parentId: references.find(({ refType }) => refType === "CHILD_OF")?.spanID ?? "",
      name: operationName,
      service: serviceName,
      startMs: startTime / 1000,
      endMs: (startTime + duration) / 1000,
      instance: String(about["service.instance.id"]),
      component: String(about["penstock.component"]),
      tags: record(tags),
    }
  })

export interface StartedJaeger {
  /** Where OTLP/HTTP is taken. */
  readonly otlp: string
  services(): Promise<ReadonlyArray<string>>
  /** The traces that have a span of this service with these tags. */
  traces(service: string, tags: Readonly<Record<string, string>>): Promise<ReadonlyArray<ReadonlyArray<JaegerSpan>>>
  stop(): Promise<void>
}

export const startJaeger = async (): Promise<StartedJaeger> => {
  const program = findJaeger()
  const folder = mkdtempSync(join(tmpdir(), "penstock-jaeger-"))
  const [http = 0, grpc = 0, otlp = 0] = await freePorts(3)
  const file = join(folder, "jaeger.yaml")
  writeFileSync(file, config({ http, grpc, otlp }))
  // Jaeger would trace itself too, and wait at its end for a collector that is not there.
  const child = spawn(program, ["--config", file], { stdio: ["ignore", "ignore", "pipe"], env: childEnv({ OTEL_TRACES_SAMPLER: "always_off" }) })
  let said = ""
  child.stderr.on("data", (chunk: Buffer) => (said = (said + chunk.toString()).slice(-10_000)))
  const ended = new Promise<void>((resolve) => child.once("close", () => resolve()))
  const api = async <A>(path: string): Promise<A> => ((await (await fetch(`http://127.0.0.1:${http}${path}`)).json()) as { readonly data: A }).data
  const stop = async () => {
    child.kill("SIGTERM")
    await ended
    rmSync(folder, { recursive: true, force: true })
  }
  const answers = async (): Promise<boolean> => fetch(`http://127.0.0.1:${http}/api/services`).then(({ ok }) => ok, () => false)
  while (!(await answers())) {
    if (child.exitCode !== null) throw new Error(`Jaeger ended with ${child.exitCode}: ${said}`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  return {
    otlp: `http://127.0.0.1:${otlp}`,
    services: async () => [...(await api<ReadonlyArray<string>>("/api/services"))].sort(),
    traces: async (service, tags) => (await api<ReadonlyArray<TraceJson> | null>(`/api/traces?service=${service}&lookback=1h&tags=${encodeURIComponent(JSON.stringify(tags))}`) ?? []).map(spansOf),
    stop,
  }
}
