/** Running token sequences through an engine, for tests that compare logits. */
import type { Engine, SamplerOptions } from "../../kernels/index.ts"

export const greedy: SamplerOptions = {
  temperature: 0,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
  logitBias: [],
  suppressedTokens: [],
  minTokens: 0,
  seed: 1,
  choice: 0,
}

/** Numbers 0 … count - 1. */
export const upTo = (count: number): Array<number> => Array.from({ length: count }, (_, i) => i)

export const shuffled = <A>(items: ReadonlyArray<A>, random: () => number): Array<A> => {
  const out = [...items]
  for (let i = out.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1))
    ;[out[i], out[j]] = [out[j]!, out[i]!]
  }
  return out
}

/** Part of a sequence: what of it one step computes. */
export interface Run {
  readonly tokens: ReadonlyArray<number>
  readonly from: number
  readonly to: number
  /** Block numbers, for the whole sequence. */
  readonly table: ReadonlyArray<number>
}

/** One step over the runs; the logits of every row, run after run. */
export const stepLogits = async (engine: Engine, runs: ReadonlyArray<Run>): Promise<Array<Array<Buffer>>> => {
  const rows = runs.reduce((sum, run) => sum + run.to - run.from, 0)
  let entry = 0
  const segments = runs.flatMap((run) => [run.to - run.from, run.from, (entry += run.table.length) - run.table.length, run.table.length])
  const { logits } = await engine.step({
    tokens: Int32Array.from(runs.flatMap((run) => run.tokens.slice(run.from, run.to))),
    segments: Int32Array.from(segments),
    blockTables: Int32Array.from(runs.flatMap((run) => run.table)),
    outputs: Int32Array.from(upTo(rows).flatMap((row) => [row, -1, -1, -1])),
    wantLogits: true,
  })
  const { vocabulary } = engine.info
  let row = 0
  return runs.map((run) =>
    upTo(run.to - run.from).map(() => Buffer.from(logits!.buffer, logits!.byteOffset + row++ * vocabulary * 4, vocabulary * 4)),
  )
}

/** The logits at every position of one sequence from `from` on, computed in chunks that end at `ends`. */
export const sequenceLogits = async (
  engine: Engine,
  tokens: ReadonlyArray<number>,
  table: ReadonlyArray<number>,
  ends: ReadonlyArray<number> = [tokens.length],
  from = 0,
): Promise<Array<Buffer>> => {
  const out: Array<Buffer> = []
  let start = from
  for (const to of ends) {
    out.push(...(await stepLogits(engine, [{ tokens, from: start, to, table }]))[0]!)
    start = to
  }
  return out
}

/** Chunk ends at random, the last at `length`. */
export const randomEnds = (length: number, random: () => number, from = 0): Array<number> => {
  const ends: Array<number> = []
  for (let at = from; at < length; ) {
    // Many short chunks and a few long ones.
    at = Math.min(length, at + 1 + Math.floor((length - from) * random() ** 3))
    ends.push(at)
  }
  return ends
}

/** The first position whose logits differ in any bit, or -1. */
export const firstDifference = (left: ReadonlyArray<Buffer>, right: ReadonlyArray<Buffer>): number =>
  left.length === right.length ? left.findIndex((row, i) => !row.equals(right[i]!)) : Math.min(left.length, right.length)
