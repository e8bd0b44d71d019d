/** A collector of traces: takes OTLP/HTTP in protobuf, and keeps the spans. Field numbers: opentelemetry/proto/trace/v1. */
import { createServer, type Server } from "node:http"
import type { AddressInfo } from "node:net"
import { all, fieldsOf, hex, text } from "./protobuf.ts"

export interface CollectedSpan {
  readonly service: string
  /** What runs in its process, for example "worker p0". */
  readonly component: string
  readonly traceId: string
  readonly spanId: string
  /** Empty for the root. */
  readonly parentId: string
  readonly name: string
  /** 1 internal, 2 server, 3 client. */
  readonly kind: number
  readonly startMs: number
  readonly endMs: number
  readonly attributes: Readonly<Record<string, unknown>>
  readonly links: ReadonlyArray<string>
  readonly failed: boolean
}

const valueOf = (bytes: Uint8Array): unknown => {
  const [field] = fieldsOf(bytes)
  switch (field?.number) {
    case 1:
      return Buffer.from(field.bytes).toString("utf8")
    case 2:
      return field.varint === 1n
    case 3:
      return Number(BigInt.asIntN(64, field.varint))
    case 4:
      return Buffer.from(field.bytes).readDoubleLE()
    case 5:
      return all(field.bytes, 1).map(valueOf)
    default:
      return undefined
  }
}

const attributesOf = (message: Uint8Array, number: number): Readonly<Record<string, unknown>> =>
  Object.fromEntries(all(message, number).map((pair) => [text(pair, 1), valueOf(all(pair, 2)[0] ?? new Uint8Array(0))]))

const milliseconds = (message: Uint8Array, number: number): number => Number(Buffer.from(all(message, number)[0]!).readBigUInt64LE() / 1000n) / 1000

/** The spans of an ExportTraceServiceRequest. */
export const spansOf = (request: Uint8Array): ReadonlyArray<CollectedSpan> =>
  all(request, 1).flatMap((resourceSpans) => {
    const resource = attributesOf(all(resourceSpans, 1)[0] ?? new Uint8Array(0), 1)
    return all(resourceSpans, 2).flatMap((scopeSpans) =>
      all(scopeSpans, 2).map((span) => ({
        service: String(resource["service.name"]),
        component: String(resource["penstock.component"]),
        traceId: hex(span, 1),
        spanId: hex(span, 2),
        parentId: hex(span, 4),
        name: text(span, 5),
        kind: Number(fieldsOf(span).find(({ number }) => number === 6)?.varint ?? 0n),
        startMs: milliseconds(span, 7),
        endMs: milliseconds(span, 8),
        attributes: attributesOf(span, 9),
        links: all(span, 13).map((link) => hex(link, 2)),
        failed: all(span, 15).some((status) => fieldsOf(status).some(({ number, varint }) => number === 3 && varint === 2n)),
      })),
    )
  })

export class OtlpCollector {
  readonly spans: Array<CollectedSpan> = []
  /** Everything that came, for what must not be in it. */
  bytes = Buffer.alloc(0)
  readonly #server: Server

  private constructor(server: Server) {
    this.#server = server
  }

  static async start(): Promise<OtlpCollector> {
    const server = createServer()
    const collector = new OtlpCollector(server)
    server.on("request", (request, response) => {
      const chunks: Array<Buffer> = []
      request.on("data", (chunk: Buffer) => chunks.push(chunk))
      request.on("end", () => {
        const body = Buffer.concat(chunks)
        const right = request.method === "POST" && request.url === "/v1/traces" && request.headers["content-type"] === "application/x-protobuf"
        if (right) {
          collector.spans.push(...spansOf(body))
          collector.bytes = Buffer.concat([collector.bytes, body])
        }
        response.writeHead(right ? 200 : 404, { "content-type": "application/x-protobuf" }).end()
      })
    })
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve))
    return collector
  }

  get endpoint(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}`
  }

  /** The spans of the trace whose root has this attribute, once `complete` holds for them. */
  async trace(key: string, value: unknown, complete: (spans: ReadonlyArray<CollectedSpan>) => boolean): Promise<ReadonlyArray<CollectedSpan>> {
    for (;;) {
      const root = this.spans.find(({ attributes, parentId }) => parentId === "" && attributes[key] === value)
      const spans = this.spans.filter(({ traceId }) => traceId === root?.traceId)
      if (root !== undefined && complete(spans)) return spans
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  async stop(): Promise<void> {
    this.#server.closeAllConnections()
    await new Promise((resolve) => this.#server.close(resolve))
  }
}
