/**
 * Kernels that draw a token from a hash of the KV they find, and of the sampler's parameters: a wrong table, a block that
 * was given to two sequences or never computed shows as a wrong token, or as an error right away.
 */
import { crc32c, type Engine as Kernels, type Batch, type EngineInfo, type SamplerOptions, type StepResult } from "../../kernels/index.ts"
import type { StepKernels } from "../../actors/engine/engine.ts"

/** Drawn about once in 40 tokens. */
export const fakeStopToken = 2
const fakeVocabulary = 1000

const hashOf = (tokens: Iterable<number>, seed: number): number => {
  let hash = 0x811c9dc5 ^ seed
  for (const token of tokens) hash = Math.imul(hash ^ token, 0x01000193) ^ (hash >>> 13)
  return hash >>> 0
}

/** What is drawn after `tokens`: a pure function. */
export const fakeToken = (tokens: Iterable<number>, { seed, choice }: Pick<SamplerOptions, "seed" | "choice">): number => {
  const hash = hashOf(tokens, Math.imul(seed + 1, 31) + choice)
  return hash % 40 === 0 ? fakeStopToken : 3 + (hash % (fakeVocabulary - 3))
}

/** The log probability of `target` after `tokens`. */
export const fakeLogprob = (tokens: Iterable<number>, target: number): number => -(hashOf(tokens, target) % 4096) / 256

interface FakeSampler {
  readonly options: SamplerOptions
  readonly tokens: Array<number>
}

export class FakeKernels implements StepKernels {
  readonly info: EngineInfo
  readonly samplers = new Map<number, FakeSampler>()
  /** Makes the next step fail. */
  failure: Error | undefined
  steps = 0
  /** Decides how long a step takes; by default to the next turn of the event loop. */
  pause: () => Promise<void> = () => new Promise((resolve) => setImmediate(resolve))
  readonly #blocks: Array<Int32Array>
  #nextSampler = 1
  #inFlight: { readonly written: ReadonlySet<number>; readonly read: ReadonlySet<number>; readonly samplers: ReadonlySet<number> } | undefined

  constructor(options: { readonly blocks: number; readonly blockTokens: number; readonly context: number }) {
    const { blocks, blockTokens, context } = options
    this.info = {
      architecture: "fake",
      layers: 1,
      hidden: 1,
      heads: 1,
      kvHeads: 1,
      headDim: 1,
      vocabulary: fakeVocabulary,
      contextLength: context,
      blocks,
      blockTokens,
      kvDtype: "f16",
      blockBytes: blockTokens * 4,
      layerBlockBytes: blockTokens * 4,
      isa: "reference",
      threads: 1,
      device: "cpu",
    }
    this.#blocks = Array.from({ length: blocks }, () => new Int32Array(blockTokens).fill(-1))
  }

  createSampler(options: SamplerOptions, prompt: Int32Array, output: Int32Array): number {
    for (const [token] of options.logitBias) if (token >= fakeVocabulary) throw new Error(`sampler: logitBias: token ${token} is not in 0 ... ${fakeVocabulary - 1}`)
    this.samplers.set(this.#nextSampler, { options, tokens: [...prompt, ...output] })
    return this.#nextSampler++
  }

  freeSampler(id: number): void {
    if (this.#inFlight?.samplers.has(id)) throw new Error(`sampler ${id} is freed while a step draws with it`)
    if (!this.samplers.delete(id)) throw new Error(`sampler ${id} is freed twice`)
  }

  async step(batch: Batch): Promise<StepResult> {
    if (this.#inFlight !== undefined) throw new Error("another step is in flight")
    const { blockTokens } = this.info
    const { failure } = this
    this.failure = undefined
    const segments: Array<{ readonly tokens: Int32Array; readonly position: number; readonly table: ReadonlyArray<number> }> = []
    const rows: Array<{ readonly segment: number; readonly position: number }> = []
    const [written, read] = [new Map<number, number>(), new Map<number, Set<number>>()]
    for (let at = 0; at < batch.segments.length; at += 4) {
      const [count, position, from, entries] = [...batch.segments.subarray(at, at + 4)] as [number, number, number, number]
      const segment = segments.length
      const table = [...batch.blockTables.subarray(from, from + entries)]
      if (table.length !== entries || count < 1 || position + count > entries * blockTokens) throw new Error(`segment ${segment}: ${count} rows from ${position} do not fit a table of ${table.length} blocks`)
      segments.push({ tokens: batch.tokens.slice(rows.length, rows.length + count), position, table })
      for (const block of table) read.set(block, (read.get(block) ?? new Set()).add(segment))
      for (let i = 0; i < count; i++) {
        const block = table[Math.floor((position + i) / blockTokens)]!
        if ((written.get(block) ?? segment) !== segment) throw new Error(`block ${block} is written by segments ${written.get(block)} and ${segment}`)
        written.set(block, segment)
        rows.push({ segment, position: position + i })
      }
    }
    if (rows.length !== batch.tokens.length) throw new Error(`${batch.tokens.length} tokens in ${rows.length} rows`)
    for (const [block, segment] of written) if (read.get(block)!.size > 1) throw new Error(`block ${block} is written by segment ${segment} and read by others`)
    const outputs = Array.from({ length: batch.outputs.length / 4 }, (_, i) => [...batch.outputs.subarray(4 * i, 4 * i + 4)] as [number, number, number, number])
    this.#inFlight = { written: new Set(written.keys()), read: new Set(read.keys()), samplers: new Set(outputs.map(([, sampler]) => sampler)) }
    await this.pause()
    this.#inFlight = undefined
    this.steps++
    if (failure !== undefined) throw failure

    for (const { tokens, position, table } of segments) {
      tokens.forEach((token, i) => (this.#blocks[table[Math.floor((position + i) / blockTokens)]!]![(position + i) % blockTokens] = token))
    }
    const contextOf = (row: number): ReadonlyArray<number> => {
      const { segment, position } = rows[row]!
      const { table } = segments[segment]!
      const tokens = Array.from({ length: position + 1 }, (_, i) => this.#blocks[table[Math.floor(i / blockTokens)]!]![i % blockTokens]!)
      if (tokens.includes(-1)) throw new Error(`segment ${segment} reads position ${tokens.indexOf(-1)}, which nobody computed`)
      return tokens
    }
    const topWidth = Math.max(0, ...outputs.map(([, , , top]) => top))
    const drawn = outputs.map(([row, id, target]) => {
      const tokens = contextOf(row)
      if (target >= 0) return { token: target, logprob: fakeLogprob(tokens, target) }
      const sampler = this.samplers.get(id)
      if (sampler === undefined) throw new Error(`sampler ${id} is not there`)
      if (String(sampler.tokens) !== String(tokens)) throw new Error(`sampler ${id} knows other tokens than its KV holds`)
      const token = fakeToken(tokens, sampler.options)
      sampler.tokens.push(token)
      return { token, logprob: fakeLogprob(tokens, token) }
    })
    return {
      tokens: Int32Array.from(drawn, ({ token }) => token),
      logprobs: Float32Array.from(drawn, ({ logprob }) => logprob),
      topWidth,
      topTokens: Int32Array.from(outputs.flatMap(([, , , top], i) => Array.from({ length: topWidth }, (_, k) => (k < top ? drawn[i]!.token + k : -1)))),
      topLogprobs: Float32Array.from(outputs.flatMap((_, i) => Array.from({ length: topWidth }, (_, k) => drawn[i]!.logprob - k))),
      logits: undefined,
      computeMs: 1,
    }
  }

  #read(block: number, into: Uint8Array): void {
    if (this.#inFlight?.written.has(block)) throw new Error(`block ${block} is exported while a step writes it`)
    if (this.#blocks[block]!.includes(-1)) throw new Error(`block ${block} is exported but not computed`)
    into.set(new Uint8Array(this.#blocks[block]!.buffer))
  }

  #write(block: number, from: Uint8Array): void {
    this.#notInUse(block, "imported")
    this.#blocks[block]!.set(new Int32Array(new Uint8Array(from).buffer))
  }

  exportLayers(blocks: Int32Array, _firstLayer: number, _layers: number, into: Uint8Array, offset: number, seed: number): number {
    const { blockBytes } = this.info
    blocks.forEach((block, i) => this.#read(block, into.subarray(offset + i * blockBytes, offset + (i + 1) * blockBytes)))
    return crc32c(into.subarray(offset, offset + blocks.length * blockBytes), seed)
  }

  importLayers(blocks: Int32Array, _firstLayer: number, _layers: number, from: Uint8Array, offset: number, seed: number, crc: number): boolean {
    const { blockBytes } = this.info
    blocks.forEach((block, i) => this.#write(block, from.subarray(offset + i * blockBytes, offset + (i + 1) * blockBytes)))
    return crc32c(from.subarray(offset, offset + blocks.length * blockBytes), seed) === crc
  }

  /** Of another pool: never. */
  canCopy(_from: object): _from is Kernels {
    return false
  }

  copyLayers(): void {
    throw new Error("there is nothing to copy from")
  }

  copyBlock(from: number, to: number): void {
    this.#notInUse(to, "copied to")
    this.#blocks[to]!.set(this.#blocks[from]!)
  }

  #notInUse(block: number, what: string): void {
    if (this.#inFlight?.read.has(block)) throw new Error(`block ${block} is ${what} while a step uses it`)
  }
}
