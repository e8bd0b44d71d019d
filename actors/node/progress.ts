const mib = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`

/** Where progress is shown; `process.stderr`, so that stdout stays the command's own. */
export interface ProgressSink {
  readonly isTTY?: boolean
  readonly columns?: number
  write(text: string): unknown
}

/** Redraws of one terminal line; more often cannot be read. */
const redrawMs = 100

/**
 * Progress of a transfer of bytes: on a terminal one line redrawn, elsewhere a line at every tenth.
 */
export class Progress {
  readonly #sink: ProgressSink
  readonly #label: string
  readonly #started = performance.now()
  #total: number | undefined
  #first: number | undefined
  #drawn = Number.NEGATIVE_INFINITY
  #tenth = 0
  #open = false

  /** @param total bytes, where known */
  constructor(sink: ProgressSink, label: string, total: number | undefined) {
    this.#sink = sink
    this.#label = label
    this.#total = total
  }

  set total(bytes: number) {
    this.#total = bytes
  }

  /** @param done bytes so far, those of an earlier attempt included */
  update(done: number): void {
    // Speed counts what came now; what an earlier attempt left is no speed.
    this.#first ??= done
    const share = this.#total === undefined || this.#total === 0 ? undefined : Math.min(1, done / this.#total)
    if (this.#sink.isTTY === true) {
      const now = performance.now()
      if (now - this.#drawn < redrawMs && share !== 1) return
      this.#drawn = now
      this.#open = true
      this.#sink.write(`\r${this.#line(done, share).slice(0, (this.#sink.columns ?? 80) - 1)}\u001b[K`)
    } else if (share !== undefined && Math.floor(share * 10) > this.#tenth) {
      this.#tenth = Math.floor(share * 10)
      this.#sink.write(`${this.#label}: ${this.#tenth * 10} % of ${mib(this.#total ?? 0)}\n`)
    }
  }

  /** Ends the terminal's line, so that the next message begins on its own. */
  end(): void {
    if (this.#open) this.#sink.write("\n")
    this.#open = false
  }

  #line(done: number, share: number | undefined): string {
    const seconds = (performance.now() - this.#started) / 1000
    const speed = seconds > 0.3 ? (done - (this.#first ?? 0)) / seconds : 0
    const rate = speed > 0 ? `  ${mib(speed)}/s` : ""
    if (share === undefined) return `${this.#label}  ${mib(done)}${rate}`
    const width = 24
    const full = Math.round(share * width)
    const left = speed > 0 && share < 1 ? `  ${Math.ceil(((this.#total ?? 0) - done) / speed)} s left` : ""
    return `${this.#label}  [${"#".repeat(full)}${"-".repeat(width - full)}] ${Math.floor(share * 100)} %  ${mib(done)} of ${mib(this.#total ?? 0)}${rate}${left}`
  }
}
