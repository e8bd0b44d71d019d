/**
 * Server-sent events on a Node response. Written to directly, with its back-pressure, since one Effect per token would
 * cost more than the token. The head is sent with the first byte, so that a failure before it still has its status.
 */
import type { ServerResponse } from "node:http"

export interface SseOptions {
  readonly headers: Readonly<Record<string, string>>
  readonly keepAliveMs: number
  readonly stallMs: number
}

export class SseWriter {
  readonly #response: ServerResponse
  readonly #headers: Readonly<Record<string, string>>
  readonly #keepAlive: NodeJS.Timeout
  #idle = true
  #waiting: (() => void) | undefined

  constructor(response: ServerResponse, options: SseOptions) {
    this.#response = response
    this.#headers = options.headers
    // Node resets this timeout with every byte that the client takes, and closes the socket when it fires.
    response.setTimeout(options.stallMs)
    response.on("drain", () => this.#resume())
    response.once("close", () => this.#close())
    this.#keepAlive = setInterval(() => this.#ping(), options.keepAliveMs)
  }

  /** Whether the client has seen a status already. */
  get opened(): boolean {
    return this.#response.headersSent
  }

  get closed(): boolean {
    return this.#response.destroyed || this.#response.writableEnded
  }

  /** Sends text (whole events). Returns a promise to wait for where the client is slow. */
  write(text: string): Promise<void> | undefined {
    if (this.closed) return undefined
    this.#open()
    this.#idle = false
    if (this.#response.write(text)) return undefined
    return new Promise((resolve) => (this.#waiting = resolve))
  }

  /** Leaves the response to somebody else, before anything was sent. */
  abandon(): void {
    this.#close()
  }

  end(): void {
    if (!this.closed) this.#open()
    this.#close()
    this.#response.end()
  }

  #open(): void {
    if (this.#response.headersSent) return
    this.#response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no", ...this.#headers })
  }

  #ping(): void {
    if (this.#idle && this.#waiting === undefined) void this.write(": ping\n\n")
    this.#idle = true
  }

  #resume(): void {
    const waiting = this.#waiting
    this.#waiting = undefined
    waiting?.()
  }

  #close(): void {
    clearInterval(this.#keepAlive)
    this.#resume()
  }
}

export const sseData = (value: unknown): string => `data: ${JSON.stringify(value)}\n\n`
export const sseEvent = (name: string, value: unknown): string => `event: ${name}\ndata: ${JSON.stringify(value)}\n\n`
export const sseDone = "data: [DONE]\n\n"
