/** One sequence on an engine, for tests: it owns a run of blocks and knows its position. */
import type { Engine, SamplerOptions, StepResult } from "../../kernels/index.ts"

/** Draws the most likely token. */
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
  seed: 0,
  choice: 0,
}

export interface Output {
  /** Row of this step; negative: counted from the end. */
  readonly row: number
  readonly sampler?: number
  readonly target?: number
  /** Number of top log probabilities. */
  readonly top?: number
}

export class Sequence {
  readonly #engine: Engine
  readonly #table: Int32Array
  #position = 0

  constructor(engine: Engine, firstBlock = 0, blocks: number = engine.info.blocks - firstBlock) {
    this.#engine = engine
    this.#table = Int32Array.from({ length: blocks }, (_, i) => firstBlock + i)
  }

  /** Runs the next tokens in one step. */
  async feed(tokens: ReadonlyArray<number>, outputs: ReadonlyArray<Output>, wantLogits = false): Promise<StepResult> {
    const result = await this.#engine.step({
      tokens: Int32Array.from(tokens),
      segments: Int32Array.of(tokens.length, this.#position, 0, this.#table.length),
      blockTables: this.#table,
      outputs: Int32Array.from(
        outputs.flatMap(({ row, sampler, target, top }) => [row < 0 ? tokens.length + row : row, sampler ?? -1, target ?? -1, top ?? -1]),
      ),
      wantLogits,
    })
    this.#position += tokens.length
    return result
  }
}

/** Tokens that a fresh sampler draws after `prompt` and `output`. */
export const generate = async (
  engine: Engine,
  options: SamplerOptions,
  prompt: ReadonlyArray<number>,
  output: ReadonlyArray<number>,
  count: number,
): Promise<Array<number>> => {
  const sampler = engine.createSampler(options, Int32Array.from(prompt), Int32Array.from(output))
  try {
    const sequence = new Sequence(engine)
    const drawn: Array<number> = []
    let next: ReadonlyArray<number> = [...prompt, ...output]
    while (drawn.length < count) {
      drawn.push((await sequence.feed(next, [{ row: -1, sampler }])).tokens[0]!)
      next = [drawn.at(-1)!]
    }
    return drawn
  } finally {
    engine.freeSampler(sampler)
  }
}
