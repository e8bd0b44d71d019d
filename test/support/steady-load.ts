/** Streams that are asked again as soon as they are answered, and what their clients see while the server changes. */
import { performance } from "node:perf_hooks"

export interface Seen {
  readonly index: number
  readonly text: string
  readonly tokens: ReadonlyArray<number>
  /** Longest time without a token, from the request on. */
  readonly longestGapMs: number
}

export type Ask = Readonly<Record<string, unknown>>

/** Greedy and sampled completions, long enough that each lives through several changes. */
export const steadyRequests = (streams: number, tokens: number): ReadonlyArray<Ask> =>
  Array.from({ length: streams }, (_, i) => ({
    prompt: `${"The miller opened the gate and the water came down. ".repeat(i % 4)}Story number ${i} begins here:`,
    max_tokens: tokens - (i % 5) * 7,
    ignore_eos: true,
    ...[{ temperature: 0 }, { temperature: 1, seed: i }, { temperature: 0.8, top_p: 0.9, top_k: 40, seed: i }, { temperature: 1.2, presence_penalty: 0.4, seed: i }][i % 4],
  }))

/** One streamed completion, with the time of each of its events. Rejects where it errs or ends early. */
export const watched = async (url: string, model: string, index: number, ask: Ask): Promise<Seen> => {
  let lastMs = performance.now()
  let longestGapMs = 0
  const response = await fetch(`${url}/v1/completions`, { method: "POST", body: JSON.stringify({ model, stream: true, return_token_ids: true, ...ask }) })
  if (!response.ok) throw new Error(`stream ${index}: ${response.status} ${await response.text()}`)
  let [text, rest, isDone] = ["", "", false]
  const tokens: Array<number> = []
  for await (const piece of response.body!.pipeThrough(new TextDecoderStream())) {
    const nowMs = performance.now()
    longestGapMs = Math.max(longestGapMs, nowMs - lastMs)
    lastMs = nowMs
    const events = (rest + piece).split("\n\n")
    rest = events.pop()!
    for (const event of events) {
      if (!event.startsWith("data: ")) continue
      if (event === "data: [DONE]") isDone = true
      else {
        const chunk = JSON.parse(event.slice(6)) as { error?: unknown; choices: Array<{ text: string; token_ids?: Array<number> | null }> }
        if (chunk.error !== undefined) throw new Error(`stream ${index} after ${tokens.length} tokens: ${JSON.stringify(chunk.error)}`)
        for (const choice of chunk.choices) {
          text += choice.text
          tokens.push(...(choice.token_ids ?? []))
        }
      }
    }
  }
  if (!isDone) throw new Error(`stream ${index} ended without [DONE] after ${tokens.length} tokens`)
  return { index, text, tokens, longestGapMs }
}

export class SteadyLoad {
  readonly #seen: Array<Seen> = []
  readonly #failures: Array<string> = []
  readonly #running: ReadonlyArray<Promise<void>>
  #stopping = false

  /** @param url asked for anew for each request */
  constructor(url: () => string, model: () => string, requests: ReadonlyArray<Ask>) {
    this.#running = requests.map(async (ask, index) => {
      // KV of its own each time, so that none of it is there already.
      for (let round = 0; !this.#stopping; round++) {
        try {
          this.#seen.push(await watched(url(), model(), index, { ...ask, cache_salt: `${index} ${round}` }))
        } catch (error) {
          this.#failures.push(error instanceof Error ? error.message : String(error))
          return
        }
      }
    })
  }

  get answered(): number {
    return this.#seen.length
  }

  get failures(): ReadonlyArray<string> {
    return this.#failures
  }

  /** Waits for what runs, and starts nothing more. */
  async stop(): Promise<ReadonlyArray<Seen>> {
    this.#stopping = true
    await Promise.all(this.#running)
    return this.#seen
  }
}

/** `{ streams, p50, p99, max }` of the longest times without a token, in ms. */
export const gapFigures = (seen: ReadonlyArray<Seen>) => {
  const sorted = seen.map(({ longestGapMs }) => Math.round(longestGapMs)).sort((a, b) => a - b)
  const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]
  return { streams: sorted.length, p50Ms: at(0.5), p99Ms: at(0.99), maxMs: sorted.at(-1) }
}
